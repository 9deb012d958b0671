"""A KV cache that evicts: `CompressedCache`, live, and `l2_compress`, once. Knows no text and no attention score."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from l2kv.layer import CompressedLayer
from l2kv.seam import UnsupportedModelError
from l2kv.spec import CompressionSpec

_KEEP_ALL = CompressionSpec(keep_ratio=1.0)


class CompressedCache(Cache):
    """A transformers cache that keeps a share of the tokens, in real memory, at every step.

    Use it inside `compressible(model)`, as `past_key_values` of a forward pass or of `generate()`. Sliding-window
    layers, which are bounded already, are left whole. Rows of a batch keep their own tokens; padding is refused, and so
    is taking tokens back (`crop`: assisted decoding). For inference: no gradient passes through it.

    Args:
        config: the model's config.
        spec: what to keep.

    Raises:
        UnsupportedModelError: the model has no keys to compress (encoders, recurrent models, latent attention).
        ValueError: `skip_layers` names a layer that the model does not have.
    """

    def __init__(self, config: PretrainedConfig, spec: CompressionSpec) -> None:
        super().__init__(layers=_layers_for(config.get_text_config(decoder=True), spec))
        self.spec = spec
        self.serving = False  # inside a forward pass of a model prepared with `compressible`

    @classmethod
    def _holding(cls, layers: list[CacheLayerMixin], spec: CompressionSpec) -> CompressedCache:
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=layers)
        cache.spec, cache.serving = spec, False
        return cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Append the pairs of one layer, as models do. Raises RuntimeError on a model that was not prepared."""
        if not self.serving:
            raise RuntimeError(
                "This cache evicts tokens layer by layer, which a stock model cannot follow. Prepare the model first:\n"
                "    with compressible(model):\n"
                "        model(input_ids, past_key_values=cache)"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes for the mask that all compressed layers share: that of the longest, cropped by the others."""
        if not isinstance(self.layers[layer_idx], CompressedLayer):
            return super().get_mask_sizes(query_length, layer_idx)
        return max(self.compressed_layers(), key=lambda layer: layer.held).get_mask_sizes(query_length)

    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that evict, or may."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def kept_positions(self, layer_idx: int) -> list[Tensor]:
        """Per kv head the true positions held, ascending: Hkv int64 tensors [B, held] (none before the first token)."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            raise ValueError(f"Layer {layer_idx} has a sliding window: it is left to transformers, and never evicts.")
        return list(layer.positions().sort(dim=-1).values.unbind(dim=1)) if layer.is_initialized else []

    @property
    def held(self) -> tuple[int, ...]:
        """Tokens held, per layer."""
        return tuple(_held(layer) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of key and value storage of all layers, slack included. (Ranks take 8 more per pair and kv head.)"""
        return cache_nbytes(self)


def cache_nbytes(cache: Cache) -> int:
    """Bytes of key and value storage of any transformers cache, counted from its tensors."""
    return sum(
        layer.nbytes
        if isinstance(layer, CompressedLayer)
        else sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values) if t is not None)
        for layer in cache.layers
    )


def l2_compress(
    past_key_values: Cache,
    *,
    keep_ratio: float = 0.5,
    prune_after: int = 0,
    skip_layers: Sequence[int] = (),
    policy: str = "low_norm",
    protect_first: int = 0,
    protect_last: int = 0,
    seed: int = 0,
) -> CompressedCache:
    """Compress a cache once, as in the paper's README: of the n pairs a head holds, `ceil(keep_ratio * n)` stay.

    The result evicts nothing more until it is compressed again. Feed it to a model prepared with `compressible`. The
    cache given is left as it was: drop it (and the model's outputs that hold it) to have its memory back.

    Args:
        past_key_values: a `DynamicCache` after a forward pass, or the result of an earlier `l2_compress`.

    Raises:
        TypeError: no cache, or one whose pairs cannot be read (quantised, static, offloaded).
        ValueError: as `CompressionSpec`.
    """
    spec = CompressionSpec(
        keep_ratio=keep_ratio,
        prune_after=prune_after,
        skip_layers=skip_layers,
        policy=policy,
        protect_first=protect_first,
        protect_last=protect_last,
        seed=seed,
    )
    if not isinstance(past_key_values, (DynamicCache, CompressedCache)):
        raise TypeError(
            "l2_compress needs the past_key_values of a model called with use_cache=True (a DynamicCache), "
            f"got {type(past_key_values).__name__}"
        )
    if past_key_values.offloading:
        raise TypeError("l2_compress cannot read an offloaded cache: make it with offloading=False")
    _check_skip_layers(spec, len(past_key_values.layers))
    layers = [_compressed_once(spec, i, layer) for i, layer in enumerate(past_key_values.layers)]
    return CompressedCache._holding(layers, _KEEP_ALL)


def _compressed_once(spec: CompressionSpec, layer_idx: int, source: CacheLayerMixin) -> CacheLayerMixin:
    if type(source) is DynamicSlidingWindowLayer:
        return copy.copy(source)  # it replaces its tensors, and never writes into them
    if not isinstance(source, (DynamicLayer, CompressedLayer)) or not source.is_initialized:
        raise TypeError(f"layer {layer_idx} of the cache holds no keys that can be read ({type(source).__name__})")
    layer = CompressedLayer(spec, layer_idx)
    compressed = isinstance(source, CompressedLayer)  # then its slots are in no order
    positions = source.positions() if compressed else torch.arange(source.keys.shape[-2], device=source.keys.device)
    layer.append(source.keys, source.values, positions)
    layer.seen = source.get_seq_length()
    if layer_idx not in spec.skip_layers:
        layer.evict_to(spec.kept(layer.held, seen=layer.held))
    layer.spec = _KEEP_ALL
    return layer


def _layers_for(config: PretrainedConfig, spec: CompressionSpec) -> list[CacheLayerMixin]:
    check_compressible(config)
    layers = DynamicCache(config=config).layers  # transformers knows which layer of which model caches how
    unknown = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if unknown or not layers:
        raise UnsupportedModelError(
            f"{config.model_type} has layers without a key/value cache ({', '.join(sorted(unknown)) or 'all of them'})."
        )
    _check_skip_layers(spec, len(layers))
    return [CompressedLayer(spec, i) if type(layer) is DynamicLayer else layer for i, layer in enumerate(layers)]


def check_compressible(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError, with the reason, unless the model is decoder-only and caches keys."""
    # `is_decoder` alone does not tell: GPT-NeoX says False. Encoders are those that fill in masks.
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is not decoder-only. Only decoder-only language models (Llama, Qwen, GPT, ...) have "
            "the key/value cache that is looked at here."
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{config.model_type} caches latents, not keys: there is no key norm to rank by.")


def _check_skip_layers(spec: CompressionSpec, n_layers: int) -> None:
    if spec.skip_layers and spec.skip_layers[-1] >= n_layers:
        raise ValueError(f"skip_layers names layer {spec.skip_layers[-1]}, but the layers are 0 to {n_layers - 1}")


def _held(layer: CacheLayerMixin) -> int:
    if isinstance(layer, CompressedLayer):
        return layer.held
    return layer.keys.shape[-2] if layer.is_initialized and layer.keys.numel() else 0
