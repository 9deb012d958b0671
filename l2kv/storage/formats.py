"""Formats: how the vectors of a layer's kv heads are stored, and read back. Knows no storage and no attention.

A stored vector is one row, of numbers or of bytes, and is read by itself, given what all vectors of its head share. So
a storage moves and overwrites rows, whatever is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from l2kv.heads import of_kv_heads

_LEAST_SPREAD = 0.1  # of a channel, as a share of the mean one: later vectors may differ where the first did not


@dataclass(frozen=True, slots=True)
class Format:
    """Format of the vectors of some kv heads: chosen channels of each, and numbers of so many bits.

    Channels are first brought to one centre and spread, by the vectors that the format was fitted to; then each vector
    is rounded to 2^bits levels from its lowest to its highest number. So a channel of outliers does not coarsen
    the others, which is why KIVI rounds keys by channel (Liu et al., arXiv 2402.02750) and SmoothQuant scales channels
    (Xiao et al., arXiv 2211.10438), and yet no row depends on its neighbours.
    """

    dtype: torch.dtype
    """That of the vectors, and of a row's lowest number and step."""
    bits: int | None = None
    """8, 4 or, for numbers as they are, None."""
    channels: Tensor | None = None
    """Numbers of the stored channels, int64 [B, h, C] ascending; None where all are."""
    centre: Tensor | None = None
    """Mean of each stored channel, float32 [B, h, 1, C]; None without bits, as is the next."""
    spread: Tensor | None = None
    """Standard deviation of each stored channel, float32 [B, h, 1, C]."""

    def encode(self, vectors: Tensor) -> Tensor:
        """Turn vectors [B, h, T, D] into rows: [B, h, T, C] of their dtype, or uint8 [B, h, T, bytes]."""
        vectors = self.narrow(vectors)
        if self.bits is None:
            return vectors
        assert self.centre is not None and self.spread is not None
        even = (vectors.float() - self.centre) / self.spread
        lowest, highest = even.aminmax(dim=-1, keepdim=True)
        top = 2**self.bits - 1
        low_and_step = torch.cat([lowest, (highest - lowest) / top], dim=-1).to(self.dtype)
        low, step = low_and_step.float().split(1, dim=-1)  # as they will be read
        codes = ((even - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(0, top)
        return torch.cat([_packed(codes.to(torch.uint8), self.bits), low_and_step.view(torch.uint8)], dim=-1)

    def decode(self, rows: Tensor) -> Tensor:
        """Turn rows back into vectors, float32 [B, h, T, C]."""
        if self.bits is None:
            return rows.float()
        assert self.centre is not None and self.spread is not None
        numbers = 2 * self.dtype.itemsize
        codes = _unpacked(rows[..., :-numbers], self.bits)[..., : self.centre.shape[-1]]
        low, step = rows[..., -numbers:].contiguous().view(self.dtype).float().split(1, dim=-1)
        return torch.addcmul(self.centre, torch.addcmul(low, codes.float(), step), self.spread)

    def narrow(self, vectors: Tensor) -> Tensor:
        """Select the stored channels of vectors [B, h, T, D], as of queries that meet stored keys."""
        if self.channels is None:
            return vectors
        return vectors.gather(-1, self.channels[:, :, None].expand(-1, -1, vectors.shape[2], -1))

    def of(self, heads: tuple[int, ...]) -> Format:
        """Format of some of the heads."""
        return self._map(lambda shared: of_kv_heads(shared, heads))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Format:
        """Format after a `change` that copies rows of the batch."""
        return self._map(change)

    @property
    def shared(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What all vectors of a head share: channels, centre and spread."""
        return self.channels, self.centre, self.spread

    def _map(self, change: Callable[[Tensor], Tensor]) -> Format:
        channels, centre, spread = (x if x is None else change(x) for x in self.shared)
        return replace(self, channels=channels, centre=centre, spread=spread)


@dataclass(frozen=True, slots=True)
class Coding:
    """Formats of a layer's keys and values, and its latest pairs as they came."""

    formats: tuple[Format, Format]
    latest: tuple[Tensor, Tensor]  # [B, Hkv, r, D], by position

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Turn keys and values [B, Hkv, T, D] into rows."""
        return self.formats[0].encode(keys), self.formats[1].encode(values)

    def after(self, keys: Tensor, values: Tensor) -> Coding:
        """Coding after the next pairs [B, Hkv, q, D] came."""
        held, new = self.latest, (keys.detach(), values.detach())
        return replace(self, latest=(torch.cat([held[0], new[0]], dim=2), torch.cat([held[1], new[1]], dim=2)))

    def of(self, heads: tuple[int, ...]) -> tuple[tuple[Format, Format], tuple[Tensor, Tensor]]:
        """Formats and latest pairs of some of the heads."""
        (of_keys, of_values), (keys, values) = self.formats, self.latest
        return (of_keys.of(heads), of_values.of(heads)), (of_kv_heads(keys, heads), of_kv_heads(values, heads))

    def last(self, n: int) -> Coding:
        """Coding with the n latest pairs as they came, and no others."""
        n = min(n, self.latest[0].shape[2])
        keys, values = (x[:, :, x.shape[2] - n :].clone() for x in self.latest)  # a view would keep all
        return replace(self, latest=(keys, values))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Coding:
        """Coding after a `change` that copies rows of the batch."""
        (of_keys, of_values), (keys, values) = self.formats, self.latest
        return Coding((of_keys.map_rows(change), of_values.map_rows(change)), (change(keys), change(values)))

    @property
    def nbytes(self) -> int:
        """Number of bytes of the latest pairs and of what the vectors of each head share."""
        shared = [x for each in self.formats for x in each.shared if x is not None]
        return sum(x.nbytes for x in (*shared, *self.latest))


def joined(formats: Sequence[Format]) -> Format:
    """Join the formats of the kv heads of a layer, in their order."""
    by_name = zip(*(of_heads.shared for of_heads in formats), strict=True)
    there = [[x for x in of_heads if x is not None] for of_heads in by_name]
    channels, centre, spread = (torch.cat(of_heads, dim=1) if of_heads else None for of_heads in there)
    return replace(formats[0], channels=channels, centre=centre, spread=spread)


def fitted(vectors: Tensor, of_text: Tensor, *, bits: int | None, channels: Tensor | None = None) -> Format:
    """Fit a format to vectors [B, h, T, D], of which those with `of_text` (bool, broadcasts to [B, h, T]) count."""
    chosen = Format(vectors.dtype, bits, channels)
    if bits is None:
        return chosen
    weight = of_text[..., None].float()
    weight = weight / weight.sum(dim=2, keepdim=True).clamp_min(1.0)
    vectors = chosen.narrow(vectors).float()
    centre = (vectors * weight).sum(dim=2, keepdim=True)
    variance = ((vectors - centre).square() * weight).sum(dim=2, keepdim=True)
    least = _LEAST_SPREAD**2 * variance.mean(dim=-1, keepdim=True)
    spread = torch.maximum(variance, least).sqrt()
    return replace(chosen, centre=centre, spread=torch.where(spread > 0, spread, 1.0))


def weightiest_channels(queries: Tensor, keys: Tensor, of_text: tuple[Tensor, Tensor], n: int) -> Tensor:
    """Find the n channels of each kv head that its queries weigh most, int64 [B, h, n] ascending.

    The weight of a channel is the norm of what it adds to the scores of all queries and keys, |Q_c| |K_c|. Source: Xu
    et al., "ThinK", arXiv 2407.21018, Eq. 7; query heads that share keys count as more queries.

    Args:
        queries: latest queries, [B, h * G, w, D].
        keys: keys, [B, h, T, D].
        of_text: which of both count, bool, broadcast to [B, w] and [B, h, T].
        n: number of channels.
    """
    in_groups = queries.unflatten(1, (keys.shape[1], -1)).float()
    of_queries = (in_groups.square() * of_text[0][:, None, None, :, None]).sum(dim=(2, 3))
    of_keys = (keys.float().square() * of_text[1][..., None]).sum(dim=2)
    heaviest = (of_queries * of_keys).argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.sort(heaviest, dim=-1).values


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 [..., C], two to a byte where they have 4 bits."""
    if bits == 8:
        return codes
    low, high = pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    packed: Tensor = low | high << 4
    return packed


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`, with a code more where their number is odd."""
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
