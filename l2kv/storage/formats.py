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

_LEAST_REACH = 0.1  # of a channel, as a share of the mean one: later vectors may differ where the first did not


@dataclass(frozen=True, slots=True)
class Format:
    """Format of the vectors of some kv heads: chosen channels of each, and numbers of so many bits.

    Each vector is rounded to 2^bits levels from its lowest to its highest number. Where channels differ in range, as in
    keys, all are first brought to one: so a channel of outliers does not coarsen the others (KIVI rounds keys by
    channel: Liu et al., arXiv 2402.02750; SmoothQuant scales channels: Xiao et al., arXiv 2211.10438), and yet no row
    depends on its neighbours.
    """

    dtype: torch.dtype
    """That of the vectors, and of a row's lowest number and step."""
    width: int
    """Number of stored channels."""
    bits: int | None = None
    """8, 4 or, for numbers as they are, None."""
    channels: Tensor | None = None
    """Numbers of the stored channels, int64 [B, h, width] ascending; None where all are."""
    centre: Tensor | None = None
    """Middle of each stored channel's range, float32 [B, h, 1, width]; None where channels stay as they are."""
    reach: Tensor | None = None
    """Half of each stored channel's range, likewise."""

    def encode(self, vectors: Tensor) -> Tensor:
        """Turn vectors [B, h, T, D] into rows: [B, h, T, width] of their dtype, or uint8 [B, h, T, bytes]."""
        vectors = self.narrow(vectors)
        if self.bits is None:
            return vectors
        even = vectors.float()
        if self.centre is not None and self.reach is not None:
            even = (even - self.centre) / self.reach
        lowest, highest = even.aminmax(dim=-1, keepdim=True)
        top = 2**self.bits - 1
        low_and_step = torch.cat([lowest, (highest - lowest) / top], dim=-1).to(self.dtype)
        low, step = low_and_step.float().split(1, dim=-1)  # as they will be read
        codes = ((even - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(0, top)
        return torch.cat([_packed(codes.to(torch.uint8), self.bits), low_and_step.view(torch.uint8)], dim=-1)

    def decode(self, rows: Tensor) -> Tensor:
        """Turn rows back into vectors, float32 [B, h, T, width]."""
        if self.bits is None:
            return rows.float()
        numbers = 2 * self.dtype.itemsize
        codes = _unpacked(rows[..., :-numbers], self.bits)[..., : self.width]
        low_and_step = rows[..., -numbers:].clone(memory_format=torch.contiguous_format)  # aligned, to be viewed
        low, step = low_and_step.view(self.dtype).float().split(1, dim=-1)
        even = codes.mul_(step).add_(low)
        return even if self.centre is None or self.reach is None else even.mul_(self.reach).add_(self.centre)

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
        """What all vectors of a head share: channels, centre and reach."""
        return self.channels, self.centre, self.reach

    def _map(self, change: Callable[[Tensor], Tensor]) -> Format:
        channels, centre, reach = (x if x is None else change(x) for x in self.shared)
        return replace(self, channels=channels, centre=centre, reach=reach)


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
    channels, centre, reach = (torch.cat(of_heads, dim=1) if of_heads else None for of_heads in there)
    return replace(formats[0], channels=channels, centre=centre, reach=reach)


def fitted(form: Format, vectors: Tensor, of_text: Tensor) -> Format:
    """Fit a format to vectors [B, h, T, D]: it brings channels like theirs to one range.

    Args:
        of_text: which of them count, bool [B, h, T].
    """
    vectors, counts = form.narrow(vectors).float(), of_text[..., None]
    low = torch.where(counts, vectors, torch.inf).amin(dim=2, keepdim=True)
    high = torch.where(counts, vectors, -torch.inf).amax(dim=2, keepdim=True)
    low, high = (torch.where(low > high, 0.0, end) for end in (low, high))  # of a row that has no text yet
    reach = (high - low) / 2
    reach = torch.maximum(reach, _LEAST_REACH * reach.mean(dim=-1, keepdim=True))
    return replace(form, centre=(low + high) / 2, reach=torch.where(reach > 0, reach, 1.0))


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
    """Pack codes, uint8 [..., C], two to a byte where they have 4 bits: one of each half of the channels."""
    if bits == 8:
        return codes
    low, high = pad(codes, (0, codes.shape[-1] % 2)).chunk(2, dim=-1)
    packed: Tensor = low | high << 4
    return packed


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpack codes to float32, with one more where their number is odd. As floats, which a CPU shifts faster."""
    numbers = packed.float()
    if bits == 8:
        return numbers
    high = (numbers / 16).floor_()
    return torch.cat([numbers.sub_(high, alpha=16), high], dim=-1)
