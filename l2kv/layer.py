"""One layer of a compressed cache: where its pairs are stored, how they are ranked, and which are evicted.

Storage. Keys already carry their position (rotary embedding), so the order of the slots means nothing to attention,
and a slot may be reused: a new pair goes to the end, an evicted one is overwritten by a survivor from the end. With
buffers that grow by a fraction, a decoded token then moves a few pairs instead of the whole cache.

Ranking. One int64 per slot holds the score in its high half and the position in its low half, so that ranks have no
ties (of equal scores the earlier position ranks higher), and the order of evaluation cannot show.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from l2kv.policies import POLICIES, NewPairs
from l2kv.spec import CompressionSpec

_GROWTH = 1 / 8  # slack of a buffer: memory given away, against how often it is copied
_MIN_SLACK = 4
_LOW_HALF = 0xFFFFFFFF
_PROTECTED = torch.iinfo(torch.int64).max


class CompressedLayer(CacheLayerMixin):
    """The cached pairs of one layer: every kv head holds the same number of them, each head its own.

    `keys` and `values` are [B, Hkv, held, D] views of the buffers, in storage order. For inference: no gradient passes.
    """

    is_sliding = False

    def __init__(self, spec: CompressionSpec, layer_idx: int) -> None:
        super().__init__()
        self.spec, self._layer_idx = spec, layer_idx
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self._buffers: tuple[Tensor, ...] = ()  # keys and values [B, Hkv, capacity, D], ranks [B, Hkv, capacity]
        self.held = self.seen = 0
        self.unattended = False  # appended to, and attention has not come by yet
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        ranks = key_states.new_empty((*key_states.shape[:2], 0), dtype=torch.int64)
        self._buffers = (key_states.detach()[:, :, :0], value_states.detach()[:, :, :0], ranks)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append new pairs [B, Hkv, q, D]; returns all that is held. Evicts nothing: see `evict`."""
        new = key_states.shape[-2]
        self.append(key_states, value_states, torch.arange(self.seen, self.seen + new, device=key_states.device))
        self.seen += new
        self.unattended = True
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store and rank pairs [B, Hkv, T, D]; their positions broadcast to [B, Hkv, T]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end = self.held + keys.shape[-2]
        # What was made in inference mode cannot be written to outside of it.
        frozen = self._buffers[2].is_inference() and not torch.is_inference_mode_enabled()
        if end > self._buffers[2].shape[-1] or frozen:
            # A prompt gets no slack: its buffer is gone again as soon as the prompt is compressed.
            self._reallocate(_with_slack(end) if self.held else end)
        score = POLICIES[self.spec.policy](NewPairs(keys, values, positions, self._layer_idx, self.spec.seed))
        for buffer, new in zip(self._buffers, (keys, values, _rank(score, positions)), strict=True):
            buffer[:, :, self.held : end] = new.detach()
        self._hold(end)

    def evict(self) -> None:
        """Bring every head down to what the spec allows after the tokens seen so far."""
        self.unattended = False
        if self._layer_idx not in self.spec.skip_layers:
            self.evict_to(self.spec.kept(self.held, self.seen))

    def evict_to(self, kept: int) -> None:
        """Keep the `kept` pairs of each head that rank highest, and free what the others took."""
        excess = self.held - kept
        if excess <= 0:
            return
        rank = self._protected_rank()
        if _with_slack(_with_slack(kept)) < self._buffers[2].shape[-1]:
            best = rank.topk(kept, dim=-1, sorted=False).indices.sort(dim=-1).values  # the original order, while cheap
            self._reallocate(_with_slack(kept), slots=best)
        else:
            self._fill_holes(rank.topk(excess, dim=-1, largest=False, sorted=False).indices, kept)
        self._hold(kept)

    def _protected_rank(self) -> Tensor:
        rank = self._ranks
        first, last = self.spec.protect_first, self.spec.protect_last
        if first or last:
            position = _position(rank)
            rank = rank.masked_fill((position < first) | (position >= self.seen - last), _PROTECTED)
        return rank

    def _fill_holes(self, dropped: Tensor, kept: int) -> None:
        """Overwrite the `dropped` slots [B, Hkv, excess] below `kept` with the survivors from the slots above.

        A head has as many holes below `kept` as survivors above; sorted, they pair up. The pairs of indices left over
        are dropped slots on both sides: moving one onto another does nothing.
        """
        holes = dropped.sort(dim=-1).values
        evicted = torch.zeros_like(self._ranks, dtype=torch.uint8).scatter_(-1, holes, 1)
        survivors = kept + evicted[:, :, kept:].argsort(dim=-1, stable=True)
        for buffer in self._buffers:
            buffer.scatter_(2, _index(holes, buffer), buffer.gather(2, _index(survivors, buffer)))

    @property
    def _ranks(self) -> Tensor:
        return self._buffers[2][:, :, : self.held]

    def positions(self) -> Tensor:
        """True positions of the pairs held, [B, Hkv, held] int64, in storage order."""
        return _position(self._ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of key and value storage, slack included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers[:2])

    def _reallocate(self, capacity: int, slots: Tensor | None = None) -> None:
        """Move to buffers of `capacity` slots, with all that is held, or only the `slots` [B, Hkv, kept]."""
        old = self._buffers
        self._buffers = tuple(b.new_empty((*b.shape[:2], capacity, *b.shape[3:])) for b in old)
        for target, source in zip(self._buffers, old, strict=True):
            moved = source[:, :, : self.held] if slots is None else source.gather(2, _index(slots, source))
            target[:, :, : moved.shape[2]] = moved

    def _hold(self, held: int) -> None:
        self.held = held
        self.keys, self.values = (buffer[:, :, :held] for buffer in self._buffers[:2])

    def get_seq_length(self) -> int:
        """Tokens SEEN, not held: transformers derives the positions of new tokens from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over the pairs held, numbered as if they were the latest tokens."""
        return self.held + query_length, self.seen - self.held

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "A compressed cache cannot be cropped: what it has evicted cannot come back. "
                "Assisted and contrastive decoding need a plain DynamicCache."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda b: b.index_select(0, beam_idx.to(b.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda b: b.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda b: b[indices])

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._buffers = tuple(map(change, self._buffers))
            self._hold(self.held)


def _with_slack(n: int) -> int:
    return n + max(_MIN_SLACK, int(n * _GROWTH))


def _rank(score: Tensor, positions: Tensor) -> Tensor:
    """Scores [B, Hkv, T] and positions [T] -> int64 [B, Hkv, T], ordered by score, then earlier position first."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # IEEE 754: negative floats order backwards
    return (ordered << 32) | (_LOW_HALF - positions)


def _position(rank: Tensor) -> Tensor:
    return _LOW_HALF - (rank & _LOW_HALF)


def _index(slots: Tensor, buffer: Tensor) -> Tensor:
    """Slots [B, Hkv, n] as an index for `gather` and `scatter` along the slots of a buffer."""
    return slots if buffer.dim() == 3 else slots[..., None].expand(-1, -1, -1, buffer.shape[-1])
