"""One layer of a compressed cache: how its pairs are ranked, and which are evicted. What they are stored in: `slots`.

Heads with the same target hold the same number of pairs, and share their storage: a `Group`. A layer whose heads all
have one target is one group, and its keys are one tensor, as in any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from l2kv import ranks
from l2kv.heads import of_kv_heads, of_query_heads, options_of_heads
from l2kv.policies import POLICIES, Pairs, Policy
from l2kv.slots import Slots
from l2kv.spec import WHOLE, CompressionSpec, Target
from l2kv.weights import probabilities

_KEYS, _VALUES, _RANKS, _RECEIVED = range(4)  # the buffers of a group
_BLOCK = 128  # queries whose attention is worked out at a time


@dataclass
class Group:
    """The kv heads of a layer that have one target, and their pairs."""

    heads: tuple[int, ...]
    target: Target
    slots: Slots = field(default_factory=Slots)
    ranked: int = 0  # slots that have a rank; what came after them came in order, and has none yet

    @property
    def held(self) -> int:
        """Pairs of each of its heads."""
        return self.slots.held

    @property
    def keys(self) -> Tensor:
        """[B, h, held, D] in storage order."""
        return self.slots[_KEYS]

    @property
    def values(self) -> Tensor:
        """[B, h, held, D] in storage order."""
        return self.slots[_VALUES]


class CompressedLayer(CacheLayerMixin):
    """The cached pairs of one layer. For inference: no gradient passes.

    `keys` and `values` are [B, Hkv, held, D] views in storage order where all heads hold the same number of pairs;
    where they do not, they are None, and attention goes by `groups`.

    Args:
        spec: what to keep.
        layer_idx: which layer this is.
        filters: [Hkv, D] for a policy that needs them.
    """

    is_sliding = False

    def __init__(self, spec: CompressionSpec, layer_idx: int, filters: Tensor | None = None) -> None:
        super().__init__()
        self.spec, self._layer_idx, self._filters = spec, layer_idx, filters
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.groups: list[Group] = []
        self.seen = self._evicted_at = 0
        self.first_real: Tensor | None = None  # [B], where a row begins that is padded on the left
        self.unattended = False  # appended to, and attention has not come by yet
        self._queries: Tensor | None = None  # [B, H, w, D], the last ones
        self.is_initialized = False

    @property
    def _policy(self) -> Policy:
        return POLICIES[self.spec.policy]

    @property
    def n_heads(self) -> int:
        """kv heads."""
        return sum(len(group.heads) for group in self.groups)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        head_dim = key_states.shape[-1]
        if self._filters is not None and self._filters.shape[-1] != head_dim:
            raise ValueError(
                f"The filters of layer {self._layer_idx} must have {head_dim} numbers for each kv head (head_dim), "
                f"got some of shape {list(self._filters.shape)}."
            )
        self.groups = self._make_groups(key_states.shape[1])
        self.is_initialized = True

    def _make_groups(self, kv_heads: int) -> list[Group]:
        by_target: dict[Target, list[int]] = {}
        for head in range(kv_heads):
            by_target.setdefault(self.spec.target_of(self._layer_idx, head), []).append(head)
        return [Group(tuple(heads), target) for target, heads in by_target.items()]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append new pairs [B, Hkv, q, D]; returns all that is held, or only those where heads hold different numbers.

        Evicts nothing: see `evict`.
        """
        self.append(key_states, value_states)
        self.seen += key_states.shape[-2]
        self.unattended = True
        return (key_states, value_states) if self.ragged else (self.keys, self.values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store pairs [B, Hkv, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for group in self.groups:
            of_group = (of_kv_heads(keys, group.heads), of_kv_heads(values, group.heads))
            if group.slots.capacity:
                group.slots.append(*of_group)
            else:
                group.slots.adopt(*of_group)
        self._rank_arrivals(keys, values)
        self._show()

    def load(self, source: CompressedLayer) -> None:
        """Begin with what another layer holds; it is not written to."""
        self.dtype, self.device, self.is_initialized = source.dtype, source.device, True
        self.seen, self.first_real = source.seen, source.first_real
        for old, positions in zip(source.groups, source.positions(), strict=True):
            group = Group(old.heads, self.spec.target_of(self._layer_idx, old.heads[0]))
            group.slots.adopt(old.keys, old.values)
            self._rank(group, positions)
            self.groups.append(group)
        self._show()

    def evict_no_more(self) -> None:
        """Keep all that is held and all that comes."""
        self.spec = CompressionSpec(keep_ratio=1.0)
        for group in self.groups:
            group.target = WHOLE

    @property
    def ragged(self) -> bool:
        """Whether heads may hold different numbers of pairs."""
        return len(self.groups) > 1

    @property
    def held(self) -> int:
        """Pairs of the head that holds most."""
        return max((group.held for group in self.groups), default=0)

    @property
    def held_by_head(self) -> tuple[int, ...]:
        """Pairs of each kv head."""
        return tuple(held for _, held in sorted((head, group.held) for group in self.groups for head in group.heads))

    def evict(self, query: Tensor, options: Mapping[str, object]) -> None:
        """Bring every head down to what the spec allows after the tokens seen so far.

        Args:
            query: the latest queries [B, H, q, D], for policies that go by attention.
            options: of the attention call: scaling, softcap, s_aux.
        """
        self.unattended = False
        if self._policy.needs_received:
            for group in self.groups:
                self._receive(group, query, options)
        if rows := self._policy.needs_rows:
            queries = query if self._queries is None else torch.cat([self._queries, query], dim=2)
            self._queries = queries[:, :, -rows:]
        if self.seen - self._evicted_at >= self.spec.evict_every:
            self.evict_now(options)

    def evict_now(self, options: Mapping[str, object] | None = None) -> None:
        """Evict, whenever the last time was."""
        self._evicted_at = self.seen
        for group in self.groups:
            kept = self.spec.kept(group.held, self.seen, group.target)
            if kept < group.held:
                group.slots.keep(self._rank_of_all(group, options or {}), kept)
                group.ranked = kept
            else:
                group.slots.let_go()
        self._show()

    def positions(self) -> list[Tensor]:
        """Per group, the true positions of the pairs held, [B, h, held] int64 in storage order."""
        return [self._positions(group) for group in self.groups]

    def kept_positions(self) -> list[Tensor]:
        """Per kv head, the true positions of the pairs held: ascending, int64 [B, held]."""
        by_head = {
            head: positions
            for group, of_group in zip(self.groups, self.positions(), strict=True)
            for head, positions in zip(group.heads, of_group.sort(dim=-1).values.unbind(dim=1), strict=True)
        }
        return [by_head[head] for head in sorted(by_head)]

    def _positions(self, group: Group) -> Tensor:
        pending = self._pending(group).expand(*group.keys.shape[:2], -1)
        if not group.ranked:
            return pending
        return torch.cat([ranks.position(group.slots[_RANKS][:, :, : group.ranked]), pending], dim=-1)

    def _pending(self, group: Group) -> Tensor:
        """Positions of the pairs that have no rank yet: the latest, in order."""
        return torch.arange(self.seen - (group.held - group.ranked), self.seen, device=self.device)

    def _rank_arrivals(self, keys: Tensor, values: Tensor) -> None:
        """Rank new pairs [B, Hkv, q, D] of all heads at once, where those before them have ranks.

        Group by group, when an eviction is due, would give the same ranks, and take a token three times as long.
        """
        n = keys.shape[2]
        groups = [group for group in self.groups if 0 < group.ranked == group.held - n]
        if not self._policy.on_arrival or not groups:
            return
        positions = torch.arange(self.seen, self.seen + n, device=self.device)
        pairs = self._pairs(tuple(range(self.n_heads)), keys, values, positions)
        new = ranks.rank(self._policy.score(pairs), positions, self.first_real).expand(keys.shape[:3])
        for group in groups:
            group.slots[_RANKS][:, :, group.ranked :] = of_kv_heads(new, group.heads)
            group.ranked = group.held

    def _rank(self, group: Group, positions: Tensor) -> None:
        """Rank the pairs that have no rank yet; their `positions` broadcast to [B, h, T]."""
        new = slice(group.ranked, group.held)
        score = torch.zeros((), device=self.device)
        if self._policy.on_arrival:
            score = self._policy.score(
                self._pairs(group.heads, group.keys[:, :, new], group.values[:, :, new], positions)
            )
        of_new = ranks.rank(score, positions, self.first_real)
        if group.slots.has(_RANKS):
            group.slots[_RANKS][:, :, new] = of_new
        else:
            group.slots.add_buffer(of_new)
        group.ranked = group.held

    def _rank_of_all(self, group: Group, options: Mapping[str, object]) -> Tensor:
        """The order in which pairs stay, [B, h, held] int64: by score, and the protected above all."""
        if group.ranked < group.held:
            self._rank(group, self._pending(group))
        order = group.slots[_RANKS]
        if not self._policy.on_arrival:
            positions = ranks.position(order)
            pairs = self._pairs(group.heads, group.keys, group.values, positions)
            if self._policy.needs_received:
                pairs = replace(pairs, received=group.slots[_RECEIVED])
            if self._policy.needs_rows:
                pairs = replace(pairs, last_rows=self._attention(group, self._queries, 0, positions, options))
            order = ranks.rank(self._policy.score(pairs), positions, self.first_real)
        first, last = self.spec.protect_first, self.spec.protect_last
        return ranks.protect(order, first=first, last=last, seen=self.seen, starts=self.first_real)

    def _pairs(self, heads: tuple[int, ...], keys: Tensor, values: Tensor, positions: Tensor) -> Pairs:
        directions = self.spec.directions
        return Pairs(
            keys=keys,
            values=values,
            positions=ranks.in_text(positions, self.first_real),
            layer_idx=self._layer_idx,
            heads=heads,
            seed=self.spec.seed,
            directions=tuple(directions[self._layer_idx][head] for head in heads) if directions else None,
            filters=None if self._filters is None else self._filters[list(heads)].to(self.device),
        )

    def visible(self, group: Group, queries: int) -> Tensor:
        """What the latest queries may look at, of rows that are padded: bool [B, h, q, held], or [B, 1, q, held].

        A query of the padding may look at all that precedes it: it must not look at nothing, and is looked at by none.
        """
        positions = self._positions(group)
        if not group.ranked:  # all heads alike
            positions = positions[:, :1]
        query_positions = torch.arange(self.seen - queries, self.seen, device=self.device)
        causal = positions[:, :, None] <= query_positions[:, None]
        padding = ranks.in_text(query_positions.expand(1, 1, -1), self.first_real) < 0  # [B, 1, q]
        return causal & ((ranks.in_text(positions, self.first_real) >= 0)[:, :, None] | padding[..., None])

    def _receive(self, group: Group, query: Tensor, options: Mapping[str, object]) -> None:
        """Add the attention of the latest queries to what each pair has received."""
        positions, known = self._positions(group), group.ranked
        self._rank(group, self._pending(group))
        if not group.slots.has(_RECEIVED):
            group.slots.add_buffer(torch.zeros(group.keys.shape[:3], device=self.device))
        received = group.slots[_RECEIVED]
        received[:, :, known:] = 0.0
        queries = query.shape[2]
        for start in range(0, queries, _BLOCK):
            end = min(start + _BLOCK, queries)
            received += self._attention(group, query[:, :, start:end], queries - end, positions, options).sum(
                dim=(2, 3)
            )

    def _attention(
        self, group: Group, query: Tensor, later: int, positions: Tensor, options: Mapping[str, object]
    ) -> Tensor:
        """Attention of queries [B, H, q, D], which `later` others follow, to a group's pairs: [B, h, G, q, held]."""
        query_positions = torch.arange(self.seen - later - query.shape[2], self.seen - later, device=self.device)
        hidden = positions[:, :, None, None] > query_positions[:, None]
        if self.first_real is not None:
            hidden = hidden | (ranks.in_text(positions, self.first_real) < 0)[:, :, None, None]
        of_group, options = (
            of_query_heads(query, group.heads, self.n_heads),
            options_of_heads(options, group.heads, self.n_heads),
        )
        shape = (query.shape[0], len(group.heads), -1, query.shape[2], group.held)
        weights = probabilities(
            of_group, group.keys, lambda scores: scores.view(shape).masked_fill_(hidden, -torch.inf), options
        )
        # A query of the padding sees nothing at all, and its row is 0 / 0.
        return (weights if self.first_real is None else weights.nan_to_num(0.0)).view(shape)

    def get_seq_length(self) -> int:
        """Tokens SEEN, not held: transformers derives the positions of new tokens from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over the pairs held, numbered as if they were the latest tokens."""
        return self.held + query_length, self.seen - self.held

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of key and value storage, slack included."""
        return sum(group.slots.nbytes for group in self.groups)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(group.slots.used_nbytes for group in self.groups)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "A compressed cache cannot be cropped: what it has evicted cannot come back. "
                "Assisted and contrastive decoding need a plain DynamicCache."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda b: b.index_select(0, beam_idx.to(b.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda b: b.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda b: b[indices.to(b.device)])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for group in self.groups:
            group.slots.map_rows(change)
        self._queries, self.first_real = (x if x is None else change(x) for x in (self._queries, self.first_real))
        self._show()

    def _show(self) -> None:
        if self.groups and not self.ragged:
            self.keys, self.values = self.groups[0].keys, self.groups[0].values
