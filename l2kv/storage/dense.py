"""Storage of kv heads that hold the same number of pairs: one rectangle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from l2kv.storage.base import KEYS, VALUES, Storage, highest, moves, take, with_slack


class DenseStorage(Storage):
    """Storage in buffers [B, Hkv, capacity, ...].

    It begins with `keys` and `values`, [B, Hkv, T, D], without a copy: they are never written to.
    """

    _slot_dim = 2

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._buffers, self._owned = [keys.detach(), values.detach()], False
        self._n_heads, self._held = keys.shape[1:3]

    @property
    def heads(self) -> list[tuple[int, ...]]:
        return [tuple(range(self._n_heads))]

    @property
    def held(self) -> tuple[int, ...]:
        return (self._held,) * self._n_heads

    @property
    def rooms(self) -> tuple[int, ...]:
        return (self._capacity,) * self._n_heads

    def whole(self, index: int) -> Tensor:
        return self._buffers[index][:, :, : self._held]

    def parts(self, whole: Tensor) -> list[Tensor]:
        return [whole]

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._widen(keys, values)
        start, end = self._held, self._held + keys.shape[2]
        if end > self._capacity or not self._writable():
            self._move(with_slack(end))
        self._buffers[KEYS][:, :, start:end] = keys.detach()
        self._buffers[VALUES][:, :, start:end] = values.detach()
        self._held = end

    def fill(self, index: int, latest: Tensor) -> None:
        self._buffers[index][:, :, self._held - latest.shape[2] : self._held] = latest

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def add_buffer(self, index: int, whole: Tensor) -> None:
        if self._held < self._capacity:
            self._buffers.insert(index, whole.new_empty(self._buffers[KEYS].shape[:3]))
            self.whole(index)[:] = whole
        else:
            self._buffers.insert(index, whole.contiguous())

    def recode(self, index: int, encode: Callable[[tuple[int, ...], Tensor], Tensor]) -> None:
        self._buffers[index] = encode(self.heads[0], self._buffers[index])

    def keep(self, order: Tensor, kept: Sequence[int]) -> None:
        if len(set(kept)) > 1:
            raise ValueError(f"kv heads of one rectangle cannot keep {sorted(set(kept))} pairs: make it a PagedStorage")
        n = kept[0]
        if not self._writable() or with_slack(with_slack(n)) < self._capacity:
            self._move(with_slack(n), highest(order, n))
        else:
            holes, survivors = moves(order, n)
            self._overwrite(holes + self._firsts, survivors + self._firsts)
        self._held = n

    def reserve(self, room_for: Sequence[int]) -> None:
        if not self._writable() or max(room_for) > self._capacity:
            self._move(max(room_for))

    def note_held(self, held: Sequence[int]) -> None:
        (self._held,) = set(held)

    def let_go(self) -> None:
        if not self._owned and any(b.untyped_storage().nbytes() > b.nbytes for b in self._buffers):
            self._move(with_slack(self._held))

    def _first_slots(self) -> Tensor:
        rows, device = self._buffers[KEYS].shape[0], self._buffers[KEYS].device
        return (torch.arange(rows * self._n_heads, device=device) * self._capacity).view(rows, -1, 1)

    @property
    def _capacity(self) -> int:
        return self._buffers[KEYS].shape[2]

    def _move(self, capacity: int, slots: Tensor | None = None) -> None:
        """Move to buffers of `capacity` slots, with all that is held, or only the `slots` [B, Hkv, kept]."""
        if slots is not None:  # filled up with any slot: a buffer made in one go is faster than one copied into
            slots = torch.nn.functional.pad(slots, (0, capacity - slots.shape[-1]))
            heads = torch.arange(self._n_heads, device=slots.device)[:, None]
        for i, old in enumerate(self._buffers):
            if slots is None:
                self._buffers[i] = old.new_empty((*old.shape[:2], capacity, *old.shape[3:]))
                self._buffers[i][:, :, : self._held] = old[:, :, : self._held]
            else:
                self._buffers[i] = take(old, heads, slots)
        self._owned, self._known_firsts = True, None
