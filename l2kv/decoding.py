"""The two steps of greedy decoding over any transformers cache: the prompt, and a token. Knows no text."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from l2kv.cache import CompressedCache
from l2kv.padding import row_inputs
from l2kv.spec import CompressionSpec


def new_cache(
    config: PretrainedConfig, spec: CompressionSpec | None, *, special_ids: Iterable[int] | None = None
) -> Cache:
    """Make an empty cache: one that compresses by `spec`, or a full one where there is none.

    Args:
        special_ids: as for `CompressedCache`.

    Raises:
        SpecError, UnsupportedModelError: as `CompressedCache`.
    """
    return DynamicCache(config=config) if spec is None else CompressedCache(config, spec, special_ids=special_ids)


def prefill(model: PreTrainedModel, input_ids: Tensor, cache: Cache, *, attention_mask: Tensor | None = None) -> None:
    """Run a prompt [B, T] into an empty cache; a compressed one is compressed by it.

    No logits are computed. Run all but the prompt's last token here, and the last with `decode_one_token`: then even
    the first new token comes from the compressed cache.

    Args:
        attention_mask: [B, T], 0 for padding on the left; every later pass needs that of all tokens.
    """
    padded = row_inputs(model, attention_mask, input_ids.shape[1])
    model.base_model(input_ids, past_key_values=cache, use_cache=True, **padded)


def decode_one_token(model: PreTrainedModel, token: Tensor, cache: Cache) -> Tensor:
    """Decode the greedy next token [B, 1] after `token` [B, 1], which is added to the cache."""
    logits: Tensor = model(token, past_key_values=cache, use_cache=True).logits
    return logits[:, -1].argmax(-1, keepdim=True)
