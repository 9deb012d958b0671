"""Slots: the storage of some kv heads that hold the same number of pairs. Knows no spec and no policy.

Keys already carry their position (rotary embedding), so the order of the slots means nothing to attention, and a slot
may be used again: a new pair goes to the end, an evicted one is overwritten by a survivor from the end. With buffers
that grow by a fraction, a decoded token then moves a few pairs instead of the whole cache.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GROWTH = 1 / 8  # slack of a buffer: memory given away, against how often it is copied
_MIN_SLACK = 4


class Slots:
    """Buffers of the same capacity along their third dimension, of which the first `held` slots are filled.

    The first two are keys and values, [B, h, capacity, D]; the others go with them, [B, h, capacity].
    """

    def __init__(self) -> None:
        self.held = 0
        self._buffers: list[Tensor] = []
        self._owned = True  # False: the buffers are the model's own tensors, which are not written to

    @property
    def capacity(self) -> int:
        """Slots, filled or not."""
        return self._buffers[0].shape[2] if self._buffers else 0

    def __getitem__(self, index: int) -> Tensor:
        """The filled part of a buffer, in storage order."""
        return self._buffers[index][:, :, : self.held]

    def has(self, index: int) -> bool:
        """Whether there is such a buffer."""
        return index < len(self._buffers)

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Begin with pairs [B, h, T, D], without a copy: they are never written to."""
        self._buffers, self._owned, self.held = [keys.detach(), values.detach()], False, keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Fill more slots with keys and values [B, h, q, D]. What goes with them is for the caller to fill in."""
        end = self.held + keys.shape[2]
        # What was made in inference mode cannot be written to outside of it.
        frozen = any(buffer.is_inference() for buffer in self._buffers) and not torch.is_inference_mode_enabled()
        if end > self.capacity or frozen or not self._owned:
            self._move(with_slack(end))
        self._buffers[0][:, :, self.held : end] = keys.detach()
        self._buffers[1][:, :, self.held : end] = values.detach()
        self.held = end

    def add_buffer(self, values: Tensor) -> None:
        """Let another number go with each pair, `values` [B, h, held]; taken without a copy where it can be."""
        shape = self._buffers[0].shape[:3]
        if self.held < self.capacity:
            buffer = values.new_empty(shape)
            buffer[:, :, : self.held] = values
            self._buffers.append(buffer)
        else:
            self._buffers.append(values.expand(shape).contiguous())

    def keep(self, rank: Tensor, kept: int) -> None:
        """Keep the `kept` slots of highest rank, [B, h, held] int64 without ties, and free what the others took."""
        excess = self.held - kept
        if not self._owned or with_slack(with_slack(kept)) < self.capacity:
            self._move(with_slack(kept), _highest(rank, kept))
        elif excess == 1:
            self._refill(rank.argmin(dim=-1, keepdim=True), kept)
        else:
            self._fill_holes(rank.topk(excess, dim=-1, largest=False, sorted=False).indices, kept)
        self.held = kept

    def let_go(self) -> None:
        """Take what is held out of storage that others have a part in: it would keep theirs in memory, too."""
        if not self._owned and any(b.untyped_storage().nbytes() > b.nbytes for b in self._buffers):
            self._move(with_slack(self.held))

    @property
    def nbytes(self) -> int:
        """Bytes of key and value storage, slack included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers[:2])

    @property
    def used_nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(self[i].nbytes for i in range(2)) if self._buffers else 0

    def map_rows(self, change) -> None:
        """Change the rows of the batch of every buffer."""
        self._buffers, self._owned = [change(buffer) for buffer in self._buffers], True

    def _refill(self, hole: Tensor, last: int) -> None:
        """The last pair moves to the one slot [B, h, 1] that is dropped (onto itself, where that is the last)."""
        for buffer in self._buffers:
            buffer.scatter_(2, _index(hole, buffer), buffer[:, :, last : last + 1].clone())

    def _fill_holes(self, dropped: Tensor, kept: int) -> None:
        """Overwrite the `dropped` slots [B, h, excess] below `kept` with the survivors from the slots above.

        A head has as many holes below `kept` as survivors above; sorted, they pair up. The pairs of indices left over
        are dropped slots on both sides: moving one onto another does nothing.
        """
        holes = dropped.sort(dim=-1).values
        shape = (*self._buffers[0].shape[:2], self.held)
        evicted = torch.zeros(shape, dtype=torch.uint8, device=holes.device).scatter_(-1, holes, 1)
        survivors = kept + evicted[:, :, kept:].argsort(dim=-1, stable=True)
        for buffer in self._buffers:
            buffer.scatter_(2, _index(holes, buffer), buffer.gather(2, _index(survivors, buffer)))

    def _move(self, capacity: int, slots: Tensor | None = None) -> None:
        """Move to buffers of `capacity` slots, with all that is held, or only the `slots` [B, h, kept]."""
        if slots is not None:  # filled up with any slot: a buffer made in one go is faster than one copied into
            slots = torch.nn.functional.pad(slots, (0, capacity - slots.shape[-1]))
        for i, old in enumerate(self._buffers):
            if slots is None:
                self._buffers[i] = old.new_empty((*old.shape[:2], capacity, *old.shape[3:]))
                self._buffers[i][:, :, : self.held] = old[:, :, : self.held]
            else:
                self._buffers[i] = _take(old, slots)
        self._owned = True


def with_slack(n: int) -> int:
    """Capacity of a buffer that is to hold `n`."""
    return n + max(_MIN_SLACK, int(n * _GROWTH))


def _highest(rank: Tensor, n: int) -> Tensor:
    """Slots [B, h, n] of the n highest ranks [B, h, T]."""
    if rank.device.type != "cpu":
        return rank.topk(n, dim=-1, sorted=False).indices
    # On a CPU numpy's partial sort is ten times as fast as torch's, and slots in order are faster to copy.
    if n == 0:
        return rank.new_empty((*rank.shape[:2], 0))
    ranks, length = rank.numpy(), rank.shape[-1]
    threshold = np.partition(ranks, length - n, axis=-1)[..., length - n, None]
    return torch.from_numpy(np.flatnonzero(ranks >= threshold).reshape(*rank.shape[:2], n) % length)


def _take(buffer: Tensor, slots: Tensor) -> Tensor:
    """The slots [B, h, n] of a buffer [B, h, T, ...]: as rows of one long table, which is faster than `gather`."""
    if buffer.dim() == 3:
        return buffer.gather(2, slots)
    width = buffer.shape[-1]
    if buffer.stride(-1) != 1 or any(stride % width for stride in buffer.stride()[:-1]):
        buffer = buffer.contiguous()
    per_row, per_head, per_slot = (stride // width for stride in buffer.stride()[:-1])
    batch, heads, length, _ = buffer.shape
    rows = 1 + (batch - 1) * per_row + (heads - 1) * per_head + (length - 1) * per_slot
    table = buffer.as_strided((rows, width), (width, 1))
    first = torch.arange(batch, device=slots.device)[:, None] * per_row
    first = first + torch.arange(heads, device=slots.device) * per_head
    index = first[..., None] + slots * per_slot
    return table.index_select(0, index.flatten()).view(*slots.shape, width)


def _index(slots: Tensor, buffer: Tensor) -> Tensor:
    """Slots [B, h, n] as an index for `gather` and `scatter` along the slots of a buffer."""
    return slots if buffer.dim() == 3 else slots[..., None].expand(-1, -1, -1, buffer.shape[-1])
