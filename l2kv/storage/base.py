"""Storage of a layer's key/value pairs, per kv head. Knows no specs and no policies.

Keys already carry their position (rotary embedding), so the order of the slots means nothing to attention, and a slot
may be used again: a new pair goes to the end, an evicted one is overwritten by a survivor from the end. With buffers
that grow by a fraction, a decoded token then moves a few pairs instead of the whole cache.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

KEYS, VALUES, RANKS, RECEIVED = range(4)  # buffers; the last two are there once somebody asked for them
_GROWTH = 1 / 8  # slack of a buffer: memory given away, against how often it is copied
_MIN_SLACK = 4


class Table(NamedTuple):
    """All slots of a layer's kv heads, filled or not. Head h has `rooms[h]` of them, of which the first are filled."""

    keys: Tensor
    """[B, Hkv, slots, D], or [B, 1, slots of all heads, D], one head after the other."""
    values: Tensor
    ranks: Tensor | None
    """The same without D, int64, where they are kept."""
    rooms: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether the heads stand in one run of slots."""
        return self.keys.shape[1] != len(self.rooms)


class Storage(ABC):
    """Parallel buffers: keys, values and numbers that belong to them, per row, kv head and slot.

    Its parts are kv heads that hold the same number of pairs, [B, h, held, ...] each.
    """

    _slot_dim: int
    """Dimension of a buffer that holds the slots."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._owned = True  # False: the buffers are somebody else's, too, and are not written to
        self._known_firsts: Tensor | None = None

    @property
    @abstractmethod
    def heads(self) -> list[tuple[int, ...]]:
        """Numbers of the kv heads in each part."""

    @property
    @abstractmethod
    def held(self) -> tuple[int, ...]:
        """Number of pairs that each kv head holds."""

    @property
    @abstractmethod
    def rooms(self) -> tuple[int, ...]:
        """Number of slots of each kv head, filled or not."""

    @abstractmethod
    def whole(self, index: int) -> Tensor:
        """Get one buffer, all parts together."""

    @abstractmethod
    def parts(self, whole: Tensor) -> list[Tensor]:
        """Split a tensor laid out like a `whole` buffer into the filled slots of each part, [B, h, held, ...]."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys and values [B, Hkv, q, D]; other numbers of these pairs are added by `fill`."""

    @abstractmethod
    def fill(self, index: int, latest: Tensor) -> None:
        """Write the numbers `latest` [B, Hkv, q] of the pairs that were last appended into a buffer."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Lay numbers of each part, [B, h, held], out like a `whole` buffer: the inverse of `parts`."""

    @abstractmethod
    def add_buffer(self, index: int, whole: Tensor) -> None:
        """Add a buffer of one more number per pair: RANKS first, then RECEIVED."""

    @abstractmethod
    def recode(self, index: int, encode: Callable[[tuple[int, ...], Tensor], Tensor]) -> None:
        """Replace the vectors of a buffer by `encode` of kv heads and theirs, [B, h, slots, ...], in free slots too."""

    @abstractmethod
    def keep(self, order: Tensor, kept: Sequence[int]) -> None:
        """Keep the pairs of highest rank of each kv head, and free the slots of the others.

        Args:
            order: ranks laid out like a `whole` buffer, int64 without ties.
            kept: how many pairs each kv head keeps.
        """

    @abstractmethod
    def reserve(self, room_for: Sequence[int]) -> None:
        """Move to buffers of its own with room for so many pairs of each kv head."""

    @abstractmethod
    def note_held(self, held: Sequence[int]) -> None:
        """Take note of pairs that others wrote into the `table` and evicted from it."""

    @property
    def table(self) -> Table:
        """All slots, as views."""
        heads = () if self._slot_dim == 2 else (slice(None), None)
        keys, values, *others = (buffer[heads] for buffer in self._buffers)
        return Table(keys, values, others[0] if others else None, self.rooms)

    def __getitem__(self, index: int) -> list[Tensor]:
        """Get the filled slots of one buffer, per part: [B, h, held, ...] in storage order."""
        return self.parts(self.whole(index))

    @property
    def buffers(self) -> list[Tensor]:
        """Get all buffers, each as from `whole`."""
        return [self.whole(index) for index in range(len(self._buffers))]

    def has(self, index: int) -> bool:
        """Tell whether there is such a buffer."""
        return index < len(self._buffers)

    @property
    def nbytes(self) -> int:
        """Number of bytes of key and value storage, slack included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers[:2])

    @property
    def used_nbytes(self) -> int:
        """Number of bytes of the keys and values held."""
        return sum(part.nbytes for index in (KEYS, VALUES) for part in self[index])

    @abstractmethod
    def let_go(self) -> None:
        """Copy the pairs out of borrowed memory where a reference would keep that from being freed."""

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by `change` of it, which copies rows of the batch."""
        self._buffers, self._owned = [change(buffer).contiguous() for buffer in self._buffers], True
        self._known_firsts = None

    def _widen(self, *arrived: Tensor) -> bool:
        """Hold keys and values as `cat` would, if others have a wider dtype (a prompt may be read under autocast)."""
        before = self._buffers[: VALUES + 1]
        for index, (held, new) in enumerate(zip(before, arrived, strict=True)):
            if held.dtype != new.dtype:
                self._buffers[index] = held.to(torch.promote_types(held.dtype, new.dtype))
        return any(now is not then for now, then in zip(self._buffers, before, strict=False))

    def lend(self) -> Storage:
        """Share keys and values with a new storage; the first of the two to write moves to buffers of its own."""
        self._owned = False
        other = copy.copy(self)
        other._buffers = self._buffers[:2]
        return other

    @property
    def _firsts(self) -> Tensor:
        """The first slot of each row and kv head, [B, Hkv, ...], counted over all rows and heads of a buffer."""
        if self._known_firsts is None:
            self._known_firsts = self._first_slots()
        return self._known_firsts

    @abstractmethod
    def _first_slots(self) -> Tensor: ...

    def _overwrite(self, holes: Tensor, survivors: Tensor) -> None:
        """Move pairs into other slots; both are counted as `_firsts` are."""
        holes, survivors = holes.flatten(), survivors.flatten()
        for buffer in self._buffers:
            slots = buffer.view(-1, *buffer.shape[self._slot_dim + 1 :])
            slots.index_copy_(0, holes, slots.index_select(0, survivors))

    def _writable(self) -> bool:
        return self._owned and not any(frozen(buffer) for buffer in self._buffers)


def with_slack(n: int) -> int:
    """Capacity of a buffer for `n` pairs."""
    return n + max(_MIN_SLACK, int(n * _GROWTH))


def frozen(buffer: Tensor) -> bool:
    """Tell whether a buffer was made in inference mode and cannot be written to outside it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def host(ranks: Tensor) -> np.ndarray[Any, np.dtype[np.int64]] | Tensor:
    """Give ranks to numpy on a CPU, which finds the lowest in a tenth (many) to a half (one) of torch's time."""
    return ranks.numpy() if ranks.device.type == "cpu" else ranks


def highest(rank: Tensor, n: int) -> Tensor:
    """Find the slots [B, h, n] of the n highest of ranks [B, h, T]."""
    length = rank.shape[-1]
    if n == length:
        return torch.arange(n, device=rank.device).expand(rank.shape)
    if n == 0:
        return rank.new_empty((*rank.shape[:2], 0))
    ranks = host(rank)
    if isinstance(ranks, Tensor):
        return rank.topk(n, dim=-1, sorted=False).indices
    threshold = np.partition(ranks, length - n, axis=-1)[..., length - n, None]
    return torch.from_numpy(np.flatnonzero(ranks >= threshold).reshape(*rank.shape[:2], n) % length)  # in order


def moves(rank: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Find the moves between slots after which the first `kept` slots hold the highest of ranks [B, h, T].

    A head has as many dropped slots below `kept` (holes) as survivors above; sorted, they pair up. The pairs of indices
    left over are dropped slots on both sides: moving one onto another does nothing.

    Returns:
        (holes, survivors), [B, h, T - kept] each.
    """
    excess = rank.shape[-1] - kept
    if excess == 1:
        hole = torch.as_tensor(host(rank).argmin(-1))[..., None]
        return hole, torch.full_like(hole, kept)
    holes = rank.topk(excess, dim=-1, largest=False).indices.sort(dim=-1).values
    evicted = torch.zeros_like(rank, dtype=torch.uint8).scatter_(-1, holes, 1)
    return holes, kept + evicted[:, :, kept:].argsort(dim=-1, stable=True)


def take(buffer: Tensor, heads: Tensor, slots: Tensor) -> Tensor:
    """Take the `slots` [B, ...] of the `heads` [...] from a buffer [B, h, T, D] (or [B, h, T]): [B, ..., D].

    It reads rows of one long table, which is faster than `gather` except for single numbers.
    """
    if buffer.dim() == 3:
        index = (heads * buffer.shape[2] + slots).flatten(1)
        return buffer.flatten(1).gather(1, index).view(slots.shape)
    width = buffer.shape[-1]
    if buffer.stride(-1) != 1 or any(stride % width for stride in buffer.stride()[:-1]):
        buffer = buffer.contiguous()
    per_row, per_head, per_slot = (stride // width for stride in buffer.stride()[:-1])
    batch, n_heads, length, _ = buffer.shape
    rows = 1 + (batch - 1) * per_row + (n_heads - 1) * per_head + (length - 1) * per_slot
    table = buffer.as_strided((rows, width), (width, 1))
    first = torch.arange(batch, device=slots.device).view(-1, *[1] * heads.dim()) * per_row + heads * per_head
    return table.index_select(0, (first + slots * per_slot).flatten()).view(*slots.shape, width)
