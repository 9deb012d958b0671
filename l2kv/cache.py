"""KV caches that evict: `CompressedCache` as it goes, `l2_compress` once. Knows no text and no attention score."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from l2kv.compat import DummyLayer
from l2kv.config import check_compressible, kv_heads_by_layer
from l2kv.errors import SpecError, UnsupportedModelError
from l2kv.hooks import TracedCache
from l2kv.layer import CompressedHybridLayer, CompressedLayer
from l2kv.padding import check_padding, first_real
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

Layer: TypeAlias = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer
"""A layer of a transformers cache."""
AnyLayer = TypeVar("AnyLayer", bound=Layer)


class CompressedCache(TracedCache):
    """A transformers cache that evicts pairs after every step and frees their memory.

    Use it inside `compressible(model)`, as `past_key_values` of a forward pass or of `generate()`. Sliding-window
    layers and running states, which are bounded already, evict nothing. Each row of a batch keeps its own tokens, the
    same number in each; rows may be padded on the left, with the attention_mask of all tokens at every pass. Padding is
    evicted first, but counts as seen. `crop`, and so assisted decoding, is refused. For inference: no gradient passes.

    Args:
        config: the model's config.
        spec: what to keep.
        filters: directions [L, Hkv, D] for the policy `q_filters`, from the function `l2kv.q_filters`.
        special_ids: tokens that the policy `fastgen` keeps, from the function `l2kv.special_ids`.

    Raises:
        UnsupportedModelError: the model has no keys to compress (encoders, recurrent models, latent attention).
        SpecError: the spec names a layer or a head that the model does not have, or the policy needs filters or ids.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        spec: CompressionSpec,
        *,
        filters: Tensor | None = None,
        special_ids: Iterable[int] | None = None,
    ) -> None:
        super().__init__(layers=_layers_for(config.get_text_config(decoder=True), spec, filters))
        if POLICIES[spec.policy].needs_token_ids and special_ids is None:
            raise SpecError(
                f"The policy {spec.policy} goes by token ids, and needs to know which are special: "
                "CompressedCache(config, spec, special_ids=special_ids(tokenizer))."
            )
        self.spec = spec
        self._special_ids = tuple(special_ids or ())
        self.serving = False  # inside a forward pass of a model prepared with `compressible`

    @classmethod
    def recording(cls, config: PretrainedConfig, specs: Iterable[CompressionSpec]) -> CompressedCache:
        """Make an empty cache that keeps all pairs, and the attention that `specs` go by, for `from_full`.

        Raises:
            UnsupportedModelError: as the constructor.
        """
        cache, specs = cls(config, CompressionSpec(keep_ratio=1.0)), tuple(specs)
        if any(spec.needs_queries for spec in specs):
            received = any(POLICIES[spec.policy].needs_received for spec in specs)
            rows = max(spec.needs_rows for spec in specs)
            for layer in cache.compressed_layers():
                layer.recorded = replace(POLICIES["accumulated"], needs_received=received, needs_rows=rows)
        return cache

    @classmethod
    def from_full(
        cls,
        full: Cache,
        config: PretrainedConfig,
        spec: CompressionSpec,
        *,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        special_ids: Iterable[int] | None = None,
    ) -> CompressedCache:
        """Compress a full cache as if its tokens had been run into a compressed one, which continues to evict.

        So one forward pass over a prompt serves many specs. The full cache is not changed, and shares no memory.

        Args:
            full: the cache after a forward pass over the prompt: for a policy that goes by attention, one made by
                `recording`.
            config: the model's config.
            spec: what to keep.
            attention_mask: [B, tokens seen], as the model was given it: needed where rows are padded.
            input_ids: [B, tokens seen], needed where the policy goes by token ids, as are the next.
            special_ids: as for the constructor.

        Raises:
            SpecError: the policy needs filters, or it or the channels go by queries that were not recorded; or as the
                constructor.
            ValueError: the mask hides anything but padding on the left.
        """
        if not _is_recorded(spec, full):
            _check_keys_alone(spec, "run the prompt into a CompressedCache, or into CompressedCache.recording")
        cache = cls(config, spec, special_ids=special_ids)
        cache.note_tokens(input_ids)
        for i, (layer, source) in enumerate(zip(cache.layers, full.layers, strict=True)):
            if isinstance(layer, CompressedLayer):
                assert isinstance(source, CacheLayerMixin)
                _fill(_with_states_of(source, layer), source, attention_mask)
                if layer.special is not None and layer.special.shape != _shape(layer):
                    raise SpecError(
                        f"input_ids must be of shape {list(_shape(layer))}, got {list(layer.special.shape)}"
                    )
                layer.evict_now()
            else:
                cache.layers[i] = _copied(source)
        return cache

    @classmethod
    def _holding(cls, layers: list[Layer], spec: CompressionSpec) -> CompressedCache:
        cache = cls.__new__(cls)
        TracedCache.__init__(cache, layers=layers)
        cache.spec, cache.serving, cache._special_ids = spec, False, ()
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the pairs of one layer, as models do. Raises RuntimeError on a model that was not prepared."""
        check_prepared(self.serving)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def note_padding(self, begins: Tensor | None) -> None:
        """Tell where rows padded on the left begin, [B]. Raises ValueError where that contradicts an earlier pass."""
        layers = self.compressed_layers()
        for layer in layers[:1]:  # what holds for one holds for all
            check_padding(layer.first_real, begins, layer.seen)
        for layer in layers:
            layer.first_real = begins

    def note_tokens(self, input_ids: Tensor | None) -> None:
        """Tell a policy that goes by token ids which tokens [B, q] come next. Raises SpecError where there are none."""
        if not POLICIES[self.spec.policy].needs_token_ids:
            return
        if input_ids is None:
            raise SpecError(f"The policy {self.spec.policy} goes by token ids: give input_ids, not embeddings.")
        special = torch.isin(input_ids, torch.tensor(self._special_ids, dtype=torch.long, device=input_ids.device))
        layers = self.compressed_layers()
        for layer in layers[:1]:  # what holds for one holds for all
            if layer.special is not None:
                special = torch.cat([layer.special[:, : layer.seen].to(special.device), special], dim=1)
        for layer in layers:
            layer.special = special

    def check_even(self) -> None:
        """Raise RuntimeError if the last forward pass stopped before its end."""
        half = any(layer.unattended for layer in self.compressed_layers())
        if half or len({n for layer in self.layers if (n := _seen(layer)) is not None}) > 1:
            raise RuntimeError(
                "The last forward pass over this cache stopped half way, so its layers have seen different tokens. "
                "Call cache.reset() and start again."
            )

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of the mask that all compressed layers share: that of the longest layer, which the others crop."""
        if not isinstance(self.layers[layer_idx], CacheLayerMixin):  # it has none: that of the others is meant
            layer_idx = next(i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin))
        if not isinstance(self.layers[layer_idx], CompressedLayer):
            return super().get_mask_sizes(query_length, layer_idx)
        return max(self.compressed_layers(), key=lambda layer: layer.held).get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to crop, before any layer is changed. Raises ValueError."""
        for layer in sorted(self.layers, key=lambda layer: not isinstance(layer, CompressedLayer)):
            layer.crop(tokens_to_remove)  # type: ignore[union-attr]  # all of them have it

    def compressed_layers(self) -> list[CompressedLayer]:
        """Numbers of the layers that may evict."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def kept_positions(self, layer_idx: int) -> list[Tensor]:
        """Positions in the text that each kv head of a layer holds, ascending: Hkv int64 tensors [B, held].

        There are none before the first token.

        Raises:
            ValueError: the layer never evicts (a sliding window, a running state).
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            what = NEVER_EVICTING.get(type(layer), "something else")
            raise ValueError(f"Layer {layer_idx} has {what}, and never evicts.")
        return layer.kept_positions()

    @property
    def lender(self) -> int | None:
        """Layer whose keys others borrow (Gemma 3n): the last to evict before the first without a cache."""
        kinds = [type(layer) for layer in self.layers]
        before = kinds.index(DummyLayer) if DummyLayer in kinds else 0
        return max((i for i in range(before) if isinstance(self.layers[i], CompressedLayer)), default=None)

    @property
    def held(self) -> tuple[int, ...]:
        """Number of tokens that each layer holds, in the kv head that holds most."""
        return tuple(max(heads, default=0) for heads in self.held_by_head)

    @property
    def held_by_head(self) -> tuple[tuple[int, ...], ...]:
        """Number of tokens that each kv head of each layer holds."""
        return tuple(_held_by_head(layer) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Number of bytes of key and value storage in all layers, slack included.

        Of keys and values in fewer bits or channels this includes what it takes to read them, and the latest pairs as
        they came. Ranks take 8 more per pair and kv head, and the attention sums of `accumulated` 4; `window` holds 32
        queries per layer.
        """
        return cache_nbytes(self)


def check_prepared(serving: bool) -> None:
    """Raise RuntimeError unless a cache is inside a forward pass of a prepared model."""
    if not serving:
        raise RuntimeError(
            "This cache evicts tokens layer by layer, which a stock model cannot follow. Prepare the model first:\n"
            "    with compressible(model):\n"
            "        model(input_ids, past_key_values=cache)"
        )


def cache_nbytes(cache: Cache, *, slack: bool = True) -> int:
    """Count the bytes of keys and values in any transformers cache, from its tensors.

    Args:
        slack: include storage that is reserved for more tokens.
    """
    return sum(_layer_nbytes(layer, slack) for layer in cache.layers)


def _layer_nbytes(layer: Layer, slack: bool) -> int:
    if isinstance(layer, CompressedLayer):
        return layer.nbytes if slack else layer.used_nbytes
    held: list[Tensor] = [t for name in ("keys", "values") if (t := getattr(layer, name, None)) is not None]
    return sum(t.untyped_storage().nbytes() if slack else t.nbytes for t in held)


def l2_compress(
    past_key_values: Cache,
    *,
    attention_mask: Tensor | None = None,
    keep_ratio: float = 0.5,
    prune_after: int = 0,
    skip_layers: Iterable[int] = (),
    policy: str = "low_norm",
    protect_first: int = 0,
    protect_last: int = 0,
    seed: int = 0,
) -> CompressedCache:
    """Compress a cache once, as in the paper's README: each head keeps `ceil(keep_ratio * n)` of its n pairs.

    The result evicts nothing more until it is compressed again. Give it to a model prepared with `compressible`. The
    old cache is not changed: drop it, and the model outputs that hold it, to free its memory.

    Args:
        past_key_values: a `DynamicCache` after a forward pass, or a compressed cache.
        attention_mask: [B, tokens seen], as the model was given it: needed where rows are padded, on the left. Padding
            is evicted first, but counts. A later forward pass whose mask hides what this did not is refused.
        keep_ratio, prune_after, skip_layers, policy, protect_first, protect_last, seed: as in `CompressionSpec`.

    Raises:
        TypeError: this is no cache, or one whose pairs cannot be read (of fewer bits or channels, static, offloaded).
        SpecError: as `CompressionSpec`, the policy needs more than a cache, or the mask has the wrong shape.
        ValueError: the mask hides anything but padding on the left, or contradicts an earlier one.
    """
    spec = CompressionSpec(
        keep_ratio=keep_ratio,
        prune_after=prune_after,
        skip_layers=skip_layers,
        policy=policy,
        protect_first=protect_first,
        protect_last=protect_last,
        seed=seed,
        schedule="reference",  # of what is held
    )
    _check_keys_alone(spec, "use a CompressedCache from the start")
    if POLICIES[spec.policy].needs_token_ids:
        raise SpecError(
            f"The policy {spec.policy} needs token ids: use a CompressedCache, or CompressedCache.from_full."
        )
    if not isinstance(past_key_values, (DynamicCache, CompressedCache)):
        raise TypeError(
            "l2_compress needs the past_key_values of a model called with use_cache=True (a DynamicCache), "
            f"got {type(past_key_values).__name__}"
        )
    if past_key_values.offloading:
        raise TypeError("l2_compress cannot read an offloaded cache: make it with offloading=False")
    _check_layers(spec, len(past_key_values.layers))
    layers = [_compressed_once(spec, i, layer, attention_mask) for i, layer in enumerate(past_key_values.layers)]
    return CompressedCache._holding(layers, CompressionSpec(keep_ratio=1.0))


def _is_recorded(spec: CompressionSpec, cache: Cache) -> bool:
    """Whether a cache holds the attention that a spec goes by."""
    layers = cache.compressed_layers() if isinstance(cache, CompressedCache) else []
    recorded = [layer.recorded for layer in layers if layer.recorded]
    received = POLICIES[spec.policy].needs_received
    return spec.needs_queries and any(
        known.needs_received >= received and known.needs_rows >= spec.needs_rows for known in recorded
    )


def _check_keys_alone(spec: CompressionSpec, instead: str) -> None:
    """Raise SpecError if the policy or the channels need what a full cache does not hold."""
    if spec.needs_queries or POLICIES[spec.policy].needs_filters:
        what = f"key_channels of {spec.key_channels}" if spec.key_channels < 1 else f"The policy {spec.policy}"
        raise SpecError(f"{what} needs more than a cache: {instead}.")


def _compressed_once(spec: CompressionSpec, layer_idx: int, source: Layer, attention_mask: Tensor | None) -> Layer:
    if type(source) in NEVER_EVICTING:
        return _copied(source)
    known = type(source) in (*_EVICTING, *_EVICTING.values())  # subclasses hold more
    if not known or not isinstance(source, DynamicLayer | CompressedLayer) or not source.is_initialized:
        raise TypeError(f"layer {layer_idx} of the cache holds no keys that can be read ({type(source).__name__})")
    kind = type(source) if isinstance(source, CompressedLayer) else _EVICTING[type(source)]
    layer = _with_states_of(source, kind(spec, layer_idx))
    _fill(layer, source, attention_mask)
    layer.evict_now()
    layer.evict_no_more()
    return layer


def _fill(layer: CompressedLayer, source: CacheLayerMixin, attention_mask: Tensor | None) -> None:
    """Fill an empty layer from another; the mask of all tokens seen tells where rows begin."""
    if isinstance(source, CompressedLayer):
        layer.load(source)
    else:
        assert source.keys is not None and source.values is not None
        layer.append(source.keys, source.values)
        layer.seen = source.get_seq_length()
    if attention_mask is None:
        return
    shape = _shape(layer)
    if getattr(attention_mask, "shape", None) != shape:
        raise SpecError(
            f"attention_mask must be of shape {list(shape)}, of all tokens that the cache has seen, evicted or not; "
            f"got {list(getattr(attention_mask, 'shape', ())) or type(attention_mask).__name__}"
        )
    begins = first_real(attention_mask)
    if isinstance(source, CompressedLayer):
        check_padding(source.first_real, begins, layer.seen)
    layer.first_real = begins


def _shape(layer: CompressedLayer) -> tuple[int, int]:
    """Number of rows, and of tokens seen."""
    return layer.parts()[0].keys.shape[0], layer.seen


def _copied(source: AnyLayer) -> AnyLayer:
    """A copy of a layer that never evicts: such a layer replaces its keys, and never writes into them."""
    return _with_states_of(source, copy.copy(source))


def _with_states_of(source: Layer, layer: AnyLayer) -> AnyLayer:
    """A layer with a copy of another's running states, which are written into."""
    if isinstance(source, LinearAttentionLayer):
        states = {name: value for name, value in vars(source).items() if isinstance(value, dict)}
        vars(layer).update(copy.deepcopy(states), number_of_states=source.number_of_states)
    return layer


NEVER_EVICTING: dict[type, str] = {
    DynamicSlidingWindowLayer: "a sliding window",
    LinearAttentionLayer: "a running state",
    LinearAttentionAndSlidingWindowAttentionLayer: "a running state and a sliding window",
    DummyLayer: "no cache of its own",
}
"""Layers that are transformers' own, and what they have instead of keys of all tokens."""
_EVICTING: dict[type, type[CompressedLayer]] = {
    DynamicLayer: CompressedLayer,
    LinearAttentionAndFullAttentionLayer: CompressedHybridLayer,
}


def _layers_for(config: PretrainedConfig, spec: CompressionSpec, filters: Tensor | None) -> list[Layer]:
    check_compressible(config)
    try:
        layers = DynamicCache(config=config).layers  # transformers knows which layer of which model caches how
    except (AttributeError, KeyError, ValueError) as error:  # models with a cache class of their own
        raise UnsupportedModelError(f"{config.model_type} has no cache of plain layers: {error}") from error
    others = Counter(type(layer).__name__ for layer in layers if type(layer) not in (*NEVER_EVICTING, *_EVICTING))
    if others:
        which = ", ".join(f"{n} are a {kind}" for kind, n in others.items())
        raise UnsupportedModelError(f"{config.model_type} has layers that cache more than keys and values: {which}.")
    if not any(isinstance(layer, DynamicLayer) for layer in layers):
        raise UnsupportedModelError(f"{config.model_type} has no key/value cache: no layer holds keys to rank.")
    _check_layers(spec, len(layers))
    _check_heads(spec, filters, kv_heads_by_layer(config, len(layers)))
    return [_evicting(layer, spec, i, None if filters is None else filters[i]) for i, layer in enumerate(layers)]


def _evicting(layer: Layer, spec: CompressionSpec, layer_idx: int, filters: Tensor | None) -> Layer:
    """Replace an empty layer of transformers' by one of ours, unless it never evicts."""
    if type(layer) not in _EVICTING:
        return layer
    states = {"number_of_states": layer.number_of_states} if isinstance(layer, LinearAttentionLayer) else {}
    return _EVICTING[type(layer)](spec, layer_idx, filters, **states)


def _check_layers(spec: CompressionSpec, n_layers: int) -> None:
    for name, layers in (
        ("skip_layers", spec.skip_layers),
        ("layer_ratios", [layer for layer, _ in spec.layer_ratios or ()]),
        ("head_ratios", [layer for (layer, _), _ in spec.head_ratios or ()]),
    ):
        if layers and max(layers) >= n_layers:
            raise SpecError(f"{name} names layer {max(layers)}, but the layers are 0 to {n_layers - 1}")


def _check_heads(spec: CompressionSpec, filters: Tensor | None, kv_heads: list[int]) -> None:
    """`kv_heads`: of each layer."""
    for (layer, head), _ in spec.head_ratios or ():
        if head >= kv_heads[layer]:
            raise SpecError(
                f"head_ratios names kv head {head} of layer {layer}, but its kv heads are 0 to {kv_heads[layer] - 1}"
            )
    n_layers, alike = len(kv_heads), len(set(kv_heads)) == 1
    if spec.directions is not None and [len(row) for row in spec.directions] != kv_heads:
        heads = kv_heads[0] if alike else kv_heads
        raise SpecError(f"directions must be {n_layers} rows (layers) of {heads} (kv heads)")
    policy = POLICIES[spec.policy]
    for layer, n in enumerate(kv_heads):
        if policy.ranks_whole_layer and len({spec.target_of(layer, head) for head in range(n)}) > 1:
            raise SpecError(
                f"The policy {spec.policy} ranks all heads of a layer together, so they cannot keep different numbers "
                f"of tokens; head_ratios does so in layer {layer}."
            )
    if policy.needs_filters and (filters is None or filters.shape[:-1] != (n_layers, max(kv_heads))):
        got = "none" if filters is None else f"some of shape {list(filters.shape)}"
        raise SpecError(
            f"The policy {spec.policy} needs filters of shape [{n_layers}, {max(kv_heads)}, head_dim], got {got}: "
            "CompressedCache(config, spec, filters=q_filters(model, input_ids))."
        )


def _held_by_head(layer: Layer) -> tuple[int, ...]:
    if isinstance(layer, CompressedLayer):
        return layer.held_by_head
    keys = getattr(layer, "keys", None)
    return (keys.shape[-2],) * keys.shape[1] if keys is not None and keys.numel() else ()


def _seen(layer: Layer) -> int | None:
    """Tokens seen by a layer that counts them."""
    return layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else None
