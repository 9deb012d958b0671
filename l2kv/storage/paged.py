"""Storage of kv heads that hold different numbers of pairs: one table of slots, in pages of one head each.

One table, so that a token is written, and evicted, for all heads at once; in pages of one size, so that one call can
attend to all of them, and the threads of a CPU share the work evenly, however unlike the heads are. The pages of a head
follow each other, so that what it holds is one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from l2kv.storage.base import KEYS, VALUES, Storage, frozen, highest, host, moves, take, with_slack

_FEWEST, _MOST = 16, 256  # slots of a page: of few, many short products; of many, large empty ones


class Pages(NamedTuple):
    """All slots of a layer, filled or not: P pages of m slots."""

    keys: Tensor  # [B, P, m, D]
    values: Tensor  # [B, P, m, D]
    slot_mask: Tensor  # [1, P, 1, m] of the keys' dtype: 0 where a slot is filled, else the lowest number there is
    heads: Tensor  # [P] int64, the kv head of each page
    head_mask: Tensor  # [Hkv, P] float32: 0 where a page is the head's, else -inf


class PagedStorage(Storage):
    """Storage in buffers [B, slots, ...], one kv head after the other.

    Args:
        source: storage to begin with; not written to.
        order: ranks of its pairs, [B, Hkv, held] int64 without ties.
        kept: number of pairs, those of highest rank, that each kv head takes over.
    """

    _slot_dim = 1
    _held: tuple[int, ...]
    _page: int  # slots of a page
    _capacities: list[int]  # slots of each kv head
    _starts: list[int]  # first slot of each kv head
    _written: Tensor  # slots that were written last, int64 [Hkv * q]
    _held_before: tuple[int, ...]  # that write
    _page_heads: Tensor
    _head_mask: Tensor

    def __init__(self, source: Storage, order: Tensor, kept: Sequence[int]) -> None:
        super().__init__()
        self._known_pages: Pages | None = None
        chosen = [highest(of_head, n)[:, 0] for of_head, n in zip(order.split(1, dim=1), kept, strict=True)]
        self._lay_out(source.buffers, range(len(kept)), chosen, kept)

    @property
    def heads(self) -> list[tuple[int, ...]]:
        return [(head,) for head in range(len(self._held))]

    @property
    def held(self) -> tuple[int, ...]:
        return self._held

    @property
    def rooms(self) -> tuple[int, ...]:
        return tuple(self._capacities)

    def whole(self, index: int) -> Tensor:
        return self._buffers[index][:, None]

    def parts(self, whole: Tensor) -> list[Tensor]:
        return [whole[:, :, start : start + n] for start, n in zip(self._starts, self._held, strict=True)]

    @property
    def pages(self) -> Pages:
        """Pages of all slots, as views."""
        if self._known_pages is None or frozen(self._known_pages.slot_mask):
            keys, values = (self._buffers[index].unflatten(1, (-1, self._page)) for index in (KEYS, VALUES))
            slot_mask = keys.new_full(keys.shape[1:3], torch.finfo(keys.dtype).min)[None, :, None]
            self._known_pages = Pages(keys, values, slot_mask, self._page_heads, self._head_mask)
            self._marked = (0,) * len(self._held)
        if self._marked != self._held:  # not where, since the last time, as many pairs came as went
            self._mark(self._known_pages.slot_mask.view(-1))
        return self._known_pages

    def _mark(self, slot_mask: Tensor) -> None:
        """Bring `slot_mask` [slots] up to date, in which the first `_marked` slots of each head are filled."""
        q = self._written.shape[0] // len(self._held)
        changes = zip(self._held, self._marked, self._held_before, strict=True)
        # Nothing is filled that was not marked, but what was written last: as at every token.
        if all(before <= marked <= held == before + q for held, marked, before in changes):
            slot_mask.index_fill_(0, self._written, 0.0)
        else:
            for start, marked, held in zip(self._starts, self._marked, self._held, strict=True):
                slot_mask[start + marked : start + held] = 0.0
                slot_mask[start + held : start + marked] = torch.finfo(slot_mask.dtype).min
        self._marked = self._held

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        self._known_pages = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        if self._widen(keys, values):
            self._known_pages = None
        held = tuple(n + keys.shape[2] for n in self._held)
        if not self._writable() or any(n > room for n, room in zip(held, self._capacities, strict=True)):
            self._move_all(held)
        if self._held_before != self._held or self._written.shape[0] != keys.shape[2] * len(held):  # else as last time
            ends = np.add(self._starts, self._held)[:, None]
            self._written, self._held_before = self._indices((ends + np.arange(keys.shape[2])).ravel()), self._held
        self._held = held
        self.fill(KEYS, keys.detach())
        self.fill(VALUES, values.detach())

    def fill(self, index: int, latest: Tensor) -> None:
        self._buffers[index].index_copy_(1, self._written, latest.flatten(1, 2).to(self._buffers[index].dtype))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        whole = parts[0].new_zeros(self._buffers[KEYS].shape[:2])[:, None]
        for of_part, given in zip(self.parts(whole), parts, strict=True):
            of_part[:] = given
        return whole

    def add_buffer(self, index: int, whole: Tensor) -> None:
        self._buffers.insert(index, whole[:, 0])

    def recode(self, index: int, encode: Callable[[tuple[int, ...], Tensor], Tensor]) -> None:
        of_heads = zip(self.heads, self._buffers[index].split(self._capacities, dim=1), strict=True)
        self._buffers[index] = torch.cat([encode(heads, vectors[:, None])[:, 0] for heads, vectors in of_heads], dim=1)
        self._known_pages = None

    def keep(self, order: Tensor, kept: Sequence[int]) -> None:
        kept = tuple(kept)
        if not self._writable() or with_slack(sum(_capacities(kept)[1])) < sum(self._capacities):
            ranks = zip(self.parts(order), kept, strict=True)
            self._move([highest(of_head, n)[:, 0] for of_head, n in ranks], kept)
            return
        fewer = [head for head, n in enumerate(kept) if n < self._held[head]]
        if sum(self._held) - sum(kept) == len(fewer):  # one of each, as when tokens come one by one
            holes = self._lowest(order, fewer)
            survivors = self._indices(np.array([self._starts[head] + kept[head] for head in fewer]))
        else:
            parts, starts = self.parts(order), self._starts
            of_heads = ([starts[head] + slots for slots in moves(parts[head], kept[head])] for head in fewer)
            holes, survivors = (torch.cat(slots, dim=-1)[:, 0] for slots in zip(*of_heads, strict=True))
        self._overwrite(self._firsts + holes, self._firsts + survivors)
        if holes.shape[-1] > len(fewer):  # a single one is overwritten before anyone looks
            self._clear(kept, self._held)
        self._held = kept

    def _clear(self, lower: Sequence[int], upper: Sequence[int]) -> None:
        """Empty slots hold zeros: attention gives them a probability of 0, and 0 times infinity would not be 0."""
        for buffer in self._buffers[: VALUES + 1]:
            for start, low, up in zip(self._starts, lower, upper, strict=True):
                buffer[:, start + low : start + up] = 0.0

    def _lowest(self, order: Tensor, heads: Sequence[int]) -> Tensor:
        """The slots of lowest rank of some heads, [B, h]."""
        ranks = host(order[:, 0])
        of_heads = [(self._starts[head], self._starts[head] + self._held[head]) for head in heads]
        lowest = [start + ranks[:, start:end].argmin(1) for start, end in of_heads]
        return torch.stack([torch.as_tensor(slots) for slots in lowest], dim=1)

    def reserve(self, room_for: Sequence[int]) -> None:
        if not self._writable() or any(n > room for n, room in zip(room_for, self._capacities, strict=True)):
            self._move_all(room_for)

    def note_held(self, held: Sequence[int]) -> None:
        self._clear(held, self._capacities)
        self._held, self._known_pages = tuple(held), None

    def let_go(self) -> None:
        if not self._owned:
            self._move_all(self._held)

    def _first_slots(self) -> Tensor:
        rows, slots = self._buffers[KEYS].shape[:2]
        return self._indices(np.arange(rows)[:, None] * slots)

    def _indices(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._buffers[KEYS].device)

    def _move_all(self, room_for: Sequence[int]) -> None:
        """Move all that is held to a new table."""
        rows, device = self._buffers[KEYS].shape[0], self._buffers[KEYS].device
        self._move([torch.arange(n, device=device).expand(rows, n) for n in self._held], room_for)

    def _move(self, chosen: Sequence[Tensor], room_for: Sequence[int]) -> None:
        """Move the `chosen` slots of each head, [B, n], to a new table."""
        of_table = [start + slots for start, slots in zip(self._starts, chosen, strict=True)]
        self._lay_out(self.buffers, [0] * len(chosen), of_table, room_for)

    def _lay_out(
        self, buffers: Sequence[Tensor], source_heads: Sequence[int], chosen: Sequence[Tensor], room_for: Sequence[int]
    ) -> None:
        """Make the table of the `chosen` slots of each kv head, [B, n]: each from one of the heads of `buffers`."""
        self._held = tuple(slots.shape[1] for slots in chosen)
        self._page, self._capacities = _capacities(room_for)
        self._starts = [0, *accumulate(self._capacities)][:-1]
        # Filled up with any slot, and cleared below: a buffer made in one go is faster than one copied into.
        spread = zip(chosen, self._capacities, strict=True)
        slots = torch.cat([pad(of_head, (0, n - of_head.shape[1])) for of_head, n in spread], dim=1)
        of_slots = torch.from_numpy(np.repeat(source_heads, self._capacities)).to(slots.device)
        self._buffers, self._owned = [take(buffer, of_slots, slots) for buffer in buffers], True
        self._known_firsts = self._known_pages = None
        self._written, self._held_before = self._indices(np.arange(0)), self._held
        self._clear(self._held, self._capacities)
        every = np.arange(len(chosen))
        page_heads = np.repeat(every, np.array(self._capacities) // self._page)
        self._page_heads = self._indices(page_heads)
        self._head_mask = self._indices(np.where(page_heads == every[:, None], np.float32(0), -np.float32(np.inf)))


def _capacities(room_for: Sequence[int]) -> tuple[int, list[int]]:
    """(slots of a page, slots of each head) for so many pairs of each: whole pages, small ones beside the mean head."""
    mean = sum(room_for) // len(room_for)
    page = max(_FEWEST, min(_MOST, 1 << (mean // 8).bit_length()))
    # Empty slots take time here, as attention comes by them all: so there are fewer than with_slack() leaves.
    return page, [(n + n // 64) // page * page + page for n in room_for]
