"""Several compressed caches decoded as one batch: each has its own spec and its own rows. Knows no model.

Decoding is bound by reading the weights, so a batch takes little longer than a row. `CachesTogether` hands each cache
its rows: what it appends, attends to and evicts is what it would alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from l2kv.cache import CompressedCache, Layer, check_prepared
from l2kv.compat import DummyLayer
from l2kv.errors import UnsupportedModelError
from l2kv.hooks import TracedCache
from l2kv.layer import CompressedLayer
from l2kv.spec import CompressionSpec

Member = TypeVar("Member", bound=CacheLayerMixin)


class CachesTogether(TracedCache):
    """A batch whose rows belong to several caches, for forward passes of a model prepared with `compressible`.

    The caches are used, not copied. All have seen equally many tokens.

    Args:
        caches: caches of one model.
        rows: number of rows of each.

    Raises:
        UnsupportedModelError: a layer has a running state, whose rows cannot be handed out.
    """

    def __init__(self, caches: Sequence[CompressedCache], rows: Sequence[int]) -> None:
        if len({cache.get_seq_length() for cache in caches}) != 1 or len(rows) != len(caches):
            raise ValueError("caches that run together must have seen equally many tokens, each in a number of rows")
        self.caches, self.rows = tuple(caches), tuple(rows)
        of_layers = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[_joined(of_layer, self.rows) for of_layer in of_layers])
        self.serving = False  # as of a `CompressedCache`

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the pairs of one layer, as models do. Raises RuntimeError on a model that was not prepared."""
        check_prepared(self.serving)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def only(self, rows: Sequence[int]) -> CachesTogether:
        """Go on with these rows of the batch, ascending; caches that have none of them are left as they are."""
        left = []
        for cache, (start, end) in zip(self.caches, pairwise(accumulate(self.rows, initial=0)), strict=True):
            chosen = [row - start for row in rows if start <= row < end]
            if chosen and len(chosen) < end - start:
                for layer in cache.layers:
                    if isinstance(layer, CompressedLayer | DynamicSlidingWindowLayer):
                        layer.batch_select_indices(torch.tensor(chosen))
            left.append((cache, len(chosen)))
        return CachesTogether(*zip(*((cache, n) for cache, n in left if n), strict=True))

    def compressed_layers(self) -> list[CompressedLayer]:
        """Layers of all caches that may evict."""
        return [layer for cache in self.caches for layer in cache.compressed_layers()]

    def note_padding(self, begins: Tensor | None) -> None:
        """As `CompressedCache.note_padding`, of each cache."""
        for cache, of_cache in zip(self.caches, _split(begins, self.rows), strict=True):
            cache.note_padding(of_cache)

    def note_tokens(self, input_ids: Tensor | None) -> None:
        """As `CompressedCache.note_tokens`, of each cache."""
        for cache, of_cache in zip(self.caches, _split(input_ids, self.rows), strict=True):
            cache.note_tokens(of_cache)

    def check_even(self) -> None:
        """As `CompressedCache.check_even`, of each cache."""
        for cache in self.caches:
            cache.check_even()

    @property
    def lender(self) -> int | None:
        """As `CompressedCache.lender`."""
        return self.caches[0].lender

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of the mask that all compressed layers share: that of the longest, which the others crop."""
        return max(cache.get_mask_sizes(query_length, layer_idx) for cache in self.caches)


class _Members(CacheLayerMixin, Generic[Member]):
    """One layer of several caches, whose rows are stacked along the batch.

    Args:
        members: this layer of each cache.
        rows: number of rows of each cache.
    """

    def __init__(self, members: Sequence[Member], rows: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # theirs
        self.members, self.rows = members, rows

    def split(self, x: Tensor | None) -> list[Any]:
        """Split a tensor [B or 1, ...] into the rows of each member."""
        return _split(x, self.rows)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: each member begins with its own rows."""

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.members[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask of the member that holds most."""
        return max(member.get_mask_sizes(query_length) for member in self.members)

    def get_max_length(self) -> int:
        """Maximal length."""
        return self.members[0].get_max_length()


class JoinedLayer(_Members[CompressedLayer]):
    """A layer of several compressed caches, each of which attends to what it holds itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new pairs [B, Hkv, q, D] of all rows, and return them. Evicts nothing: see `evict`."""
        for member, keys, values in zip(self.members, self.split(key_states), self.split(value_states), strict=True):
            member.update(keys, values)
        return key_states, value_states

    def evict(self, query: Tensor, options: Mapping[str, Any]) -> None:
        """Evict in each member, by the latest queries [B, H, q, D] of its rows."""
        for member, of_rows in zip(self.members, self.split(query), strict=True):
            member.evict(of_rows, options)

    @property
    def n_heads(self) -> int:
        """Number of kv heads."""
        return self.members[0].n_heads

    @property
    def first_real(self) -> Tensor | None:
        """Where the rows of a member begin that is padded; None if none is."""
        return next((member.first_real for member in self.members if member.first_real is not None), None)


class _Windows(_Members[DynamicSlidingWindowLayer]):
    """A sliding-window layer of several caches: all hold the same number of pairs."""

    is_sliding = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new pairs [B, Hkv, q, D] of all rows; return all that is held."""
        new = zip(self.members, self.split(key_states), self.split(value_states), strict=True)
        keys, values = zip(*(member.update(*pairs, *args, **kwargs) for member, *pairs in new), strict=True)
        return torch.cat(keys), torch.cat(values)


def can_run_together(config: PretrainedConfig) -> bool:
    """Tell whether caches of a model can: not where a layer has a running state. Raises as `CompressedCache`."""
    cache = CompressedCache(config, CompressionSpec(keep_ratio=1.0))
    return all(type(layer) in _JOINED or isinstance(layer, DummyLayer) for layer in cache.layers)


_JOINED: dict[type, type[_Members[Any]]] = {CompressedLayer: JoinedLayer, DynamicSlidingWindowLayer: _Windows}


def _joined(members: Sequence[Layer], rows: Sequence[int]) -> Layer:
    if isinstance(members[0], DummyLayer):
        return members[0]
    if type(members[0]) not in _JOINED:
        raise UnsupportedModelError("Caches with running states cannot run as one batch.")
    return _JOINED[type(members[0])](members, rows)


def _split(x: Tensor | None, rows: Sequence[int]) -> list[Any]:
    """Split a tensor [B, ...] by rows; give one that all rows share, [1, ...], or None, to each."""
    return [x] * len(rows) if x is None or len(x) < sum(rows) else list(x.split(list(rows)))
