"""Facts about a model's cache from its config: the kind of each layer, bytes per token, whether it is supported.

Reads configs; knows no tensors, and needs no torch to be imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2kv.errors import UnsupportedModelError
from l2kv.spec import CompressionSpec, share

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Shape of a key/value cache, in the layers that keep every token (no sliding window)."""

    layers: tuple[int, ...]
    """Layers that keep every token."""
    n_heads: int
    """Number of query heads."""
    n_kv_heads: int
    """Number of kv heads."""
    head_dim: int
    """Numbers in a key, and in a value."""
    itemsize: int
    """Bytes per number."""

    @classmethod
    def of(cls, config: PretrainedConfig, itemsize: int) -> CacheShape:
        """Read the shape from the config of a decoder (of the language part, where a model has several)."""
        borrow = [mode == "reuse" for mode in getattr(config, "kv_sharing_modes", None) or ()]  # Gemma 3n
        keep_all = [kind in ("full_attention", "hybrid") for kind in layer_kinds(config)]
        layers = tuple(i for i, keeps in enumerate(keep_all) if keeps and not any(borrow[i : i + 1]))
        if getattr(config, "is_heterogeneous", False):  # Gemma 4: its full layers have heads of another size
            config = config.per_layer_config[layers[0] if layers else 0]
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(layers, heads, kv_heads, head_dim, itemsize)

    def nbytes(self, n_tokens: int, spec: CompressionSpec | None = None) -> int:
        """Number of bytes of keys and values after `n_tokens`: all of them, or those that `spec` keeps."""
        return sum(self._layer_nbytes(layer, n_tokens, spec) for layer in self.layers)

    def _layer_nbytes(self, layer: int, n_tokens: int, spec: CompressionSpec | None) -> int:
        if spec is None:
            return self.n_kv_heads * n_tokens * self.pair_nbytes()
        heads = range(self.n_kv_heads)
        pairs = sum(spec.kept(n_tokens, n_tokens, spec.target_of(layer, head)) for head in heads)
        if not spec.codes_in(layer):
            return pairs * self.pair_nbytes()
        return pairs * self.pair_nbytes(spec) + self.n_kv_heads * self.head_nbytes(n_tokens, spec)

    def pair_nbytes(self, spec: CompressionSpec | None = None) -> int:
        """Number of bytes of a pair as it is stored."""
        if spec is None:
            return 2 * self.head_dim * self.itemsize
        channels = share(spec.key_channels, self.head_dim)
        return self._row_nbytes(channels, spec.key_bits) + self._row_nbytes(self.head_dim, spec.value_bits)

    def head_nbytes(self, n_tokens: int, spec: CompressionSpec) -> int:
        """Number of bytes beside the coded pairs of a kv head: the latest as they came, and what all its keys share."""
        channels = share(spec.key_channels, self.head_dim)
        indices = 8 * channels if channels < self.head_dim else 0
        ranges = 2 * 4 * channels if spec.key_bits is not None else 0
        return min(n_tokens, spec.protect_last) * self.pair_nbytes() + indices + ranges

    def _row_nbytes(self, channels: int, bits: int | None) -> int:
        if bits is None:
            return channels * self.itemsize
        return -(-channels * bits // 8) + 2 * self.itemsize  # with the lowest number and the step


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """Name the kind of each layer's cache as `DynamicCache` reads it, by transformers' names ("full_attention", ...).

    A config may name them, or give no more than a window that all layers share (Mistral 7B v0.1, Phi-3 mini).
    """
    if named := getattr(config, "layer_types", None):
        return tuple(map(str, named))
    if getattr(config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    else:
        kind = "full_attention"
    return (kind,) * int(config.num_hidden_layers)


def check_compressible(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError unless the model is decoder-only and caches keys."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # imports torch

    # `is_decoder` alone does not tell: GPT-NeoX says False. Encoders are those that fill in masks.
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is not decoder-only. Only decoder-only language models (Llama, Qwen, GPT, ...) have "
            "the key/value cache that is looked at here."
        )
    if any(getattr(layer, "kv_lora_rank", None) for layer in _as_layers_see_it(config)):
        raise UnsupportedModelError(f"{config.model_type} caches latents, not keys: there is no key norm to rank by.")


def kv_heads_by_layer(config: PretrainedConfig, n_layers: int) -> list[int]:
    """Number of kv heads of each layer: in some models (Gemma 4) they differ.

    Raises:
        UnsupportedModelError: a layer has none.
    """
    heads = [
        getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", None) or 0
        for layer in _as_layers_see_it(config)
    ]
    if not all(heads):
        raise UnsupportedModelError(f"{config.model_type} has no attention heads, and so no keys to rank.")
    return heads if len(heads) == n_layers else heads[:1] * n_layers


def _as_layers_see_it(config: PretrainedConfig) -> Sequence[PretrainedConfig]:
    """The config of each layer, or the one that all share."""
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
