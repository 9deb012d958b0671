"""One layer of a compressed cache: ranks its pairs and evicts. The pairs are in a `Storage`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from l2kv import kernels, ranks
from l2kv.errors import SpecError
from l2kv.heads import of_query_heads, options_of_heads
from l2kv.parts import CodedPart, Part, slots_of_latest, take_slots
from l2kv.policies import POLICIES, WINDOW, Pairs, Policy
from l2kv.probabilities import OPTIONS, QUERIES, attention_scale, normalised
from l2kv.spec import WHOLE, CompressionSpec, Target, share
from l2kv.storage.base import KEYS, RANKS, RECEIVED, VALUES, Storage, Table
from l2kv.storage.dense import DenseStorage
from l2kv.storage.formats import Coding, Format, fitted, joined, weightiest_channels
from l2kv.storage.paged import PagedStorage, Pages


class CompressedLayer(CacheLayerMixin):
    """The cached pairs of one layer. For inference: no gradient passes.

    `keys` and `values` are [B, Hkv, held, D] views in storage order while all heads hold the same number of pairs.
    After an eviction that leaves some more than others they are None: attention goes by `pages`, or by `parts`. So they
    are from the end of the first step on where pairs are stored in fewer bits or channels.

    Args:
        spec: what to keep.
        layer_idx: which layer this is.
        filters: [Hkv, D] for a policy that needs them.
    """

    is_sliding = False
    observer: Callable[[Tensor, Mapping[str, Any]], object] | None = None
    """Called with the arguments of `evict` before it evicts: every pair that was attended to is still held."""

    def __init__(self, spec: CompressionSpec, layer_idx: int, filters: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]  # theirs
        self.spec, self._layer_idx, self._filters = spec, layer_idx, filters
        self.recorded: Policy | None = None  # what to keep at hand for other layers, see `CompressedCache.recording`
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.seen = self._evicted_at = 0
        self.first_real: Tensor | None = None  # [B], where a row begins that is padded on the left
        self.special: Tensor | None = None  # [B, seen or more] bool, of tokens, where the policy goes by their ids
        self.unattended = False  # appended to, and attention has not come by yet
        self._stored: Storage | None = None  # nothing before the first token
        self._coding: Coding | None = None  # of pairs that are not stored as they come
        self._targets: tuple[Target, ...] = ()  # of each kv head
        self._queries: Tensor | None = None  # [B, H, w, D], the last ones
        self._options: dict[str, Any] = {}  # of their attention call
        self._beside: list[Tensor] = []  # positions that each kv head holds for being pinned alone
        self.is_initialized = False

    @property
    def _policy(self) -> Policy:
        return self.recorded or POLICIES[self.spec.policy]

    @property
    def _storage(self) -> Storage:
        assert self._stored is not None, "nothing has been stored yet"
        return self._stored

    @property
    def n_heads(self) -> int:
        """Number of kv heads."""
        return len(self._targets)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with the first pairs [B, Hkv, T, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        head_dim = key_states.shape[-1]
        if self._filters is not None and self._filters.shape[-1] != head_dim:
            raise ValueError(
                f"The filters of layer {self._layer_idx} must have {head_dim} numbers for each kv head (head_dim), "
                f"got some of shape {list(self._filters.shape)}."
            )
        self._begin(DenseStorage(key_states, value_states))

    def _begin(self, storage: Storage) -> None:
        self._stored = storage
        self._targets = tuple(self.spec.target_of(self._layer_idx, head) for head in range(len(storage.held)))
        self._beside = [torch.empty(0, dtype=torch.long, device=self.device) for _ in storage.held]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new pairs [B, Hkv, q, D]; return all that is held, or only the new where that is no rectangle.

        Evicts nothing: see `evict`.
        """
        self.append(key_states, value_states)
        self.seen += key_states.shape[-2]
        self.unattended = True
        if self.keys is None or self.values is None:
            return key_states, value_states
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store pairs [B, Hkv, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        else:
            rows = keys, values
            if self._coding is not None:
                rows = self._coding.encode(keys.detach(), values.detach())
                self._coding = self._coding.after(keys, values)
            self._storage.append(*rows)
        if self._storage.has(RANKS):
            positions = torch.arange(self.seen, self.seen + keys.shape[2], device=self.device)
            self._storage.fill(RANKS, self._rank(Part(tuple(range(self.n_heads)), keys, values), positions))
        if self._storage.has(RECEIVED):
            self._storage.fill(RECEIVED, keys.new_zeros(keys.shape[:3], dtype=torch.float32))
        self._show()

    def load(self, source: CompressedLayer) -> None:
        """Begin with what another layer holds, and with what it knows of attention; it is not written to.

        Raises:
            TypeError: that is coded.
        """
        if source.coded:
            raise TypeError(
                "A cache of fewer bits or channels cannot be compressed again: its keys are not there as they came. "
                "Compress the full cache."
            )
        self.dtype, self.device = source.dtype, source.device
        self.seen, self.first_real = source.seen, source.first_real
        self._begin(source._storage.lend())
        self._add_ranks(source.positions())
        if self._policy.needs_received and source._storage.has(RECEIVED):
            self._storage.add_buffer(RECEIVED, source._storage.whole(RECEIVED).clone())
        if (rows := self._rows) and source._queries is not None:
            self._queries, self._options = source._queries[:, :, -rows:], source._options
        self._show()

    def evict_no_more(self) -> None:
        """Keep all that is held and all that comes."""
        self.spec = CompressionSpec(keep_ratio=1.0)
        self._targets = (WHOLE,) * self.n_heads

    @property
    def ragged(self) -> bool:
        """True if kv heads hold different numbers of pairs, or once did."""
        return isinstance(self._stored, PagedStorage)

    @property
    def coded(self) -> bool:
        """True if the pairs held are in fewer bits or channels than they came in."""
        return self._coding is not None

    @property
    def table(self) -> Table:
        """All slots of the pairs held, which are stored as they came."""
        assert not self.coded
        return self._storage.table

    def check_steady(self) -> None:
        """Raise ValueError unless steps of one token can be taken on the `table` itself, by ranks known on arrival."""
        policy = self._policy
        by_more = not policy.on_arrival or policy.needs_token_ids or policy.needs_filters or self.recorded is not None
        reasons = {
            "it is empty": self._stored is None,
            "its rows are padded": self.first_real is not None,
            "its pairs are in fewer bits or channels": self.spec.codes_in(self._layer_idx),
            "it has pinned tokens": bool(self.spec.pinned),
            f"the policy {self.spec.policy} ranks pairs by more than they are": by_more,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(f"Layer {self._layer_idx} of the cache cannot be decoded over in one graph: {found[0]}.")

    def reserve_steps(self, steps: int) -> list[tuple[int, ...]]:
        """Make room for so many steps of one token: what each kv head holds now, and after each."""
        counts = [self.held_by_head, *(held for held, _ in self._steps(steps))]
        if any(after != tuple(n + 1 for n in before) for before, after in pairwise(counts)) and (
            not self._storage.has(RANKS)
        ):
            self._add_ranks(self.positions())
        self._storage.reserve([max(of_head) + 1 for of_head in zip(*counts, strict=True)])
        self._show()
        return counts

    def note_steps(self, steps: int) -> None:
        """Take note of steps of one token, taken on the `table` itself."""
        *_, (held, self._evicted_at) = [(self.held_by_head, self._evicted_at), *self._steps(steps)]
        self._storage.note_held(held)
        self.seen += steps
        self._show()

    def _steps(self, steps: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """What each kv head holds after each of the next steps of one token, and when it last evicted."""
        held, evicted_at = self.held_by_head, self._evicted_at
        for seen in range(self.seen + 1, self.seen + steps + 1):
            held = tuple(n + 1 for n in held)
            if seen - evicted_at >= self.spec.evict_every:
                evicted_at = seen
                held = tuple(self.spec.kept(n, seen, of) for n, of in zip(held, self._targets, strict=True))
            yield held, evicted_at

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Score new pairs [B, Hkv, q, D] at positions [q], by which they rank: float32 [B, Hkv, q]."""
        pairs = self._pairs(Part(tuple(range(self.n_heads)), keys, values), positions)
        return self._policy.score(pairs).float().expand(keys.shape[:3])

    @property
    def pages(self) -> Pages:
        """Slots of a `ragged` layer, as pages."""
        assert isinstance(self._stored, PagedStorage)
        return self._stored.pages

    def parts(self) -> Sequence[Part | CodedPart]:
        """Parts of the pairs held: a single one, or one for each kv head of a `ragged` layer."""
        stored, coding = self._stored, self._coding
        if stored is None:
            return []
        buffers = zip(stored.heads, stored[KEYS], stored[VALUES], strict=True)
        if coding is None:
            return [Part(*part) for part in buffers]
        return [
            CodedPart(heads, (keys, values), *coding.of(heads), positions)
            for (heads, keys, values), positions in zip(buffers, self.positions(), strict=True)
        ]

    @property
    def held(self) -> int:
        """Number of pairs in the kv head that holds most."""
        return max(self.held_by_head, default=0)

    @property
    def held_by_head(self) -> tuple[int, ...]:
        """Number of pairs that each kv head holds."""
        return self._stored.held if self._stored else ()

    @torch.no_grad()
    def evict(self, query: Tensor, options: Mapping[str, Any]) -> None:
        """Bring every head down to what the spec allows after the tokens seen so far.

        Args:
            query: the latest queries [B, H, q, D], for policies that go by attention.
            options: of the attention call: scaling, softcap, s_aux.
        """
        self.unattended = False
        if self.observer is not None:
            self.observer(query, options)
        if self._policy.needs_received:
            self._receive(query, options)
        if rows := self._rows:
            queries = query if self._queries is None else torch.cat([self._queries, query], dim=2)
            self._queries = queries[:, :, -rows:].clone()  # a view would keep all of a prompt's
            self._options = {name: options[name] for name in OPTIONS if name in options}
        if self.seen - self._evicted_at >= self.spec.evict_every:
            self.evict_now()
        else:
            self._settle()

    def evict_now(self) -> None:
        """Evict now, whenever the last time was."""
        self._evicted_at = self.seen
        held = self._storage.held
        competing = tuple(n - len(beside) for n, beside in zip(held, self._beside, strict=True))
        of_heads = list(zip(competing, self._targets, strict=True))
        allowed = {(n, target): self.spec.kept(n, self.seen, target) for n, target in set(of_heads)}
        kept = tuple(allowed[of_head] for of_head in of_heads)
        if kept != competing:
            self._keep(self._order(), kept)
        self._settle()

    def _keep(self, order: Tensor, kept: tuple[int, ...]) -> None:
        """Keep so many pairs of each kv head, those of highest rank, and the pinned ones beside them."""
        if self.spec.pinned:
            order, kept = self._pin(order, kept)
        if kept == self._storage.held:  # all that would go are pinned
            return
        if self.ragged or len(set(kept)) == 1:
            self._storage.keep(order, kept)
        else:
            self._stored = PagedStorage(self._storage, order, kept)

    def _pin(self, order: Tensor, kept: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Ranks by which pinned pairs stay, too, and how many each kv head then keeps."""
        if len(order) > 1:
            raise SpecError(f"Pinned tokens are those of one text, got a batch of {len(order)}. Run it row by row.")
        order = order.clone()  # it may be the buffer of ranks
        pinned = torch.tensor(self.spec.pinned, device=order.device)
        if self.first_real is not None:
            pinned = pinned + self.first_real.to(order.device)
        of_heads = [head for part in self._storage.parts(order) for head in part[0]]
        for i, (head, n) in enumerate(zip(of_heads, kept, strict=True)):
            head[:], self._beside[i] = ranks.pin(head, n, pinned, self._beside[i])
        return order, tuple(n + len(beside) for n, beside in zip(kept, self._beside, strict=True))

    def _settle(self) -> None:
        """Give up what a step needed and the next does not: numbers as they came, and borrowed memory."""
        if self.spec.codes_in(self._layer_idx):
            self._coding = (self._coding or self._coded()).last(self.spec.protect_last)
        self._storage.let_go()
        self._show()

    def _coded(self) -> Coding:
        """Code all that is held, by formats that are fitted to it."""
        if not self._storage.has(RANKS):
            self._add_ranks(self.positions())
        formats, latest = [], []
        for part, positions in zip(self.parts(), self.positions(), strict=True):
            slots = slots_of_latest(positions, min(self.spec.protect_last, self.seen))
            latest.append([take_slots(vectors, slots) for vectors in (part.keys, part.values)])
            formats.append(self._fitted(part, ranks.in_text(positions, self.first_real) >= 0))
        of_keys, of_values = (joined(of_parts) for of_parts in zip(*formats, strict=True))
        keys, values = (torch.cat(of_parts, dim=1) for of_parts in zip(*latest, strict=True))
        self._storage.recode(KEYS, lambda heads, vectors: of_keys.of(heads).encode(vectors))
        self._storage.recode(VALUES, lambda heads, vectors: of_values.of(heads).encode(vectors))
        if not self._policy.needs_rows:
            self._queries = None
        return Coding((of_keys, of_values), (keys, values))

    def _fitted(self, part: Part | CodedPart, of_text: Tensor) -> tuple[Format, Format]:
        """Formats of the keys and the values of a part, fitted to those `of_text` [B, h, held]."""
        spec, channels, width = self.spec, None, part.keys.shape[-1]
        if (n := share(spec.key_channels, width)) < width:
            assert self._queries is not None
            queries = of_query_heads(self._queries, part.heads, self.n_heads)
            latest = torch.arange(self.seen - queries.shape[2], self.seen, device=self.device)
            counting = ranks.in_text(latest.expand(1, 1, -1), self.first_real)[:, 0] >= 0
            channels = weightiest_channels(queries, part.keys, (counting, of_text), n)
        of_keys = Format(part.keys.dtype, n, spec.key_bits, channels)
        of_values = Format(part.values.dtype, part.values.shape[-1], spec.value_bits)
        return of_keys if spec.key_bits is None else fitted(of_keys, part.keys, of_text), of_values

    @property
    def _rows(self) -> int:
        """Number of latest queries that are needed."""
        narrows = self.spec.key_channels < 1 and self.spec.codes_in(self._layer_idx) and not self.coded
        return max(self._policy.needs_rows, WINDOW if narrows else 0)

    def positions(self) -> list[Tensor]:
        """Positions in the text of the pairs held, per part: int64 [B, h, held] in storage order."""
        if self._storage.has(RANKS):
            return [ranks.position(of_part) for of_part in self._storage[RANKS]]
        held = torch.arange(self.seen - self.held, self.seen, device=self.device)  # all, in order
        return [held.expand(part.keys.shape[:3]) for part in self.parts()]

    def kept_positions(self) -> list[Tensor]:
        """Positions in the text of the pairs held, per kv head: int64 [B, held], ascending."""
        by_part = self.positions() if self.is_initialized else []
        return [head.sort(dim=-1).values for part in by_part for head in part.unbind(dim=1)]

    def _add_ranks(self, positions: list[Tensor]) -> None:
        """Rank all pairs held, which are at these `positions`; from now on, pairs are ranked as they come."""
        of_parts = [self._rank(*of_part) for of_part in zip(self.parts(), positions, strict=True)]
        self._storage.add_buffer(RANKS, self._storage.join(of_parts))

    def _rank(self, part: Part | CodedPart, positions: Tensor) -> Tensor:
        """Ranks of pairs, [B, h, T], as far as they do not depend on other pairs; positions broadcast to that."""
        score = torch.zeros((), device=self.device)
        if self._policy.on_arrival:
            score = self._policy.score(self._pairs(part, positions))
        return ranks.rank(score, positions, self.first_real).expand(part.keys.shape[:3])

    def _order(self) -> Tensor:
        """Ranks of all pairs held, laid out like a `whole` buffer: by score, and the protected above all."""
        storage = self._storage
        if not storage.has(RANKS):
            self._add_ranks(self.positions())
        if self._policy.on_arrival:
            return self._protect(storage.whole(RANKS))
        received = storage[RECEIVED] if self._policy.needs_received else None
        of_parts = []
        for i, (part, positions) in enumerate(zip(self.parts(), self.positions(), strict=True)):
            pairs = self._pairs(part, positions)
            if received:
                pairs = replace(pairs, received=received[i])
            if (rows := self._policy.needs_rows) and self._queries is not None:
                queries = self._queries[:, :, -rows:]
                pairs = replace(pairs, last_rows=self.attention(part, queries, 0, positions, self._options))
            of_parts.append(ranks.rank(self._policy.score(pairs), positions, self.first_real))
        return self._protect(storage.join(of_parts))

    def _protect(self, order: Tensor) -> Tensor:
        first, last = self.spec.protect_first, self.spec.protect_last
        return ranks.protect(order, first=first, last=last, seen=self.seen, starts=self.first_real)

    def _pairs(self, part: Part | CodedPart, positions: Tensor) -> Pairs:
        heads, directions = part.heads, self.spec.directions
        return Pairs(
            keys=part.keys,
            values=part.values,
            positions=ranks.in_text(positions, self.first_real),
            layer_idx=self._layer_idx,
            heads=heads,
            seed=self.spec.seed,
            directions=tuple(directions[self._layer_idx][head] for head in heads) if directions else None,
            filters=None if self._filters is None else self._filters[list(heads)].to(self.device),
            special=None if self.special is None else self._special_at(positions),
        )

    def _special_at(self, positions: Tensor) -> Tensor:
        """Which tokens are special, at positions [T] or [B, h, T]: bool [B, 1 or h, T]."""
        assert self.special is not None
        at = positions.expand(len(self.special), 1, -1) if positions.dim() == 1 else positions
        return self.special.to(self.device)[:, None].expand(-1, at.shape[1], -1).gather(-1, at)

    def visible(self, queries: int) -> list[Tensor]:
        """Mask of the pairs that the latest queries see where rows are padded, per part: bool [B, h or 1, q, held].

        A query in the padding sees all that precedes it: it must see something, and no other query sees it.
        """
        alike = not self._storage.has(RANKS)  # all heads hold all
        query_positions = torch.arange(self.seen - queries, self.seen, device=self.device)
        padding = ranks.in_text(query_positions.expand(1, 1, -1), self.first_real) < 0  # [B, 1, q]
        masks = []
        for positions in self.positions():
            positions = positions[:, :1] if alike else positions
            causal = positions[:, :, None] <= query_positions[:, None]
            real = ranks.in_text(positions, self.first_real) >= 0
            masks.append(causal & (real[:, :, None] | padding[..., None]))
        return masks

    def _receive(self, query: Tensor, options: Mapping[str, Any]) -> None:
        """Add the attention of the latest queries to what each pair has received."""
        if not self._storage.has(RANKS):
            self._add_ranks(self.positions())
        if not self._storage.has(RECEIVED):
            self._storage.add_buffer(RECEIVED, torch.zeros_like(self._storage.whole(RANKS), dtype=torch.float32))
        queries = query.shape[2]
        for part, positions, received in zip(self.parts(), self.positions(), self._storage[RECEIVED], strict=True):
            if self._is_prompt(query, part) and kernels.enabled(self.device):
                from l2kv.kernels.statistics import attention_statistics

                given, _, _ = attention_statistics(query, part.keys, width=queries, options=options)
                received += given.unflatten(0, (self.n_heads, -1)).sum(dim=1)
                continue
            for start in range(0, queries, QUERIES):
                end = min(start + QUERIES, queries)
                block = self.attention(part, query[:, :, start:end], queries - end, positions, options)
                received += block.sum(dim=(2, 3))

    def _is_prompt(self, query: Tensor, part: Part | CodedPart) -> bool:
        """True if the queries are all of one text so far, and the part holds the pair of each as it came, in order."""
        queries = query.shape[2]
        alone = len(query) == 1 and self.first_real is None
        return alone and isinstance(part, Part) and not self.ragged and queries == self.seen == part.held

    def attention(
        self, part: Part | CodedPart, query: Tensor, later: int, positions: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """Attention of queries [B, H, q, D], which `later` others follow, to a part's pairs: [B, h, G, q, held].

        `positions` are those of the part, and `options` as for `evict`.
        """
        query_positions = torch.arange(self.seen - later - query.shape[2], self.seen - later, device=self.device)
        hidden = positions[:, :, None, None] > query_positions[:, None]
        if self.first_real is not None:
            hidden = hidden | (ranks.in_text(positions, self.first_real) < 0)[:, :, None, None]
        of_part = of_query_heads(query, part.heads, self.n_heads)
        options = options_of_heads(options, part.heads, self.n_heads)
        shape = (query.shape[0], len(part.heads), -1, query.shape[2], part.held)
        scores = part.scores(of_part, attention_scale(query, options))
        probabilities = normalised(scores, lambda some: some.view(shape).masked_fill_(hidden, -torch.inf), options)
        # A query of the padding sees nothing at all, and its row is 0 / 0.
        return (probabilities if self.first_real is None else probabilities.nan_to_num(0.0)).view(shape)

    def get_seq_length(self) -> int:
        """Number of tokens SEEN, not held: transformers derives the positions of new tokens from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over the pairs held, numbered as if they were the latest tokens."""
        return self.held + query_length, self.seen - self.held

    def get_max_length(self) -> int:
        """Maximal length: -1, there is none."""
        return -1

    @property
    def nbytes(self) -> int:
        """Number of bytes of key and value storage, slack included."""
        return self._coding_nbytes + (self._stored.nbytes if self._stored else 0)

    @property
    def used_nbytes(self) -> int:
        """Number of bytes of the keys and values held, without slack."""
        return self._coding_nbytes + (self._stored.used_nbytes if self._stored else 0)

    @property
    def _coding_nbytes(self) -> int:
        return self._coding.nbytes if self._coding else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back. Raises ValueError, unless there are none to take."""
        if tokens_to_remove:
            raise ValueError(
                "A compressed cache cannot be cropped: what it has evicted cannot come back. "
                "Assisted and contrastive decoding need a plain DynamicCache."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows of the batch by those of `beam_idx` [B]."""
        self._map_rows(lambda b: b.index_select(0, beam_idx.to(b.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._map_rows(lambda b: b.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of the batch that `indices` names."""
        self._map_rows(lambda b: b[indices.to(b.device)])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._stored:
            self._stored.map_rows(change)
            self._coding = self._coding and self._coding.map_rows(change)
            self._show()
        rows = (self._queries, self.first_real, self.special)
        self._queries, self.first_real, self.special = (x if x is None else change(x) for x in rows)

    def _show(self) -> None:
        no_rectangle = self.ragged or self.coded
        self.keys, self.values = (None if no_rectangle else self._storage.whole(index) for index in (KEYS, VALUES))


class CompressedHybridLayer(CompressedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]  # as theirs
    """A layer with a running state beside its attention (Falcon-H1), which is left to transformers."""

    is_croppable = False

    def lazy_initialization(self, *pairs: Tensor, **states: Any) -> None:  # type: ignore[override]  # as its parent
        """Begin with the first pairs, or with the first states."""
        if pairs:
            CompressedLayer.lazy_initialization(self, *pairs)
        else:
            LinearAttentionLayer.lazy_initialization(self, **states)

    def reset(self) -> None:
        """Forget all pairs and states."""
        CompressedLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows of pairs and states by those of `beam_idx` [B]."""
        CompressedLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
