"""What policies must know of a model or its tokenizer: where queries point, and which tokens are special."""

from __future__ import annotations

import unicodedata

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from l2kv.errors import UnsupportedModelError
from l2kv.hooks import Look, WatchedCache, watching
from l2kv.padding import row_inputs


@torch.no_grad()
def q_filters(model: PreTrainedModel, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
    """Find the common direction of the queries of each kv head's group, float32 [L, Hkv, D].

    For each query head it is the first right singular vector of its queries, with the sign that makes their mean
    projection positive; then the mean over the heads of the group. Source: Godey et al., "Q-Filters", arXiv 2503.02812.

    Args:
        model: a decoder-only model.
        input_ids: texts to calibrate on, [B, T], other than those to be compressed.
        attention_mask: [B, T], 0 for padding, whose queries do not count.

    Raises:
        ValueError: the mask has the wrong shape, or hides everything.
        UnsupportedModelError: the model's attention cannot be reached.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape or not (mask == 1).any():
        raise ValueError(
            f"attention_mask must be of the shape of input_ids, {list(input_ids.shape)}, and show some of them, "
            f"got {list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    of_text = mask.flatten().bool()
    filters: dict[int, Tensor] = {}

    def look(at: Look) -> None:
        queries = at.query.transpose(0, 1).flatten(1, 2)[:, of_text].float()  # [H, tokens, D]
        directions = torch.linalg.svd(queries, full_matrices=False).Vh[:, 0]  # [H, D]
        sign = (queries.mean(dim=1) * directions).sum(dim=-1).sign()
        grouped = (directions * sign[:, None]).unflatten(0, (at.key.shape[1], -1))
        filters[at.layer_idx] = grouped.mean(dim=1).cpu()

    cache = WatchedCache(config=model.config)
    with watching(model, cache, look):
        model.base_model(input_ids, past_key_values=cache, use_cache=True, **row_inputs(model, mask, mask.shape[1]))
    if not filters:
        raise UnsupportedModelError(f"{type(model).__name__} shows no attention: it bypasses transformers' registry.")
    none = torch.zeros_like(next(iter(filters.values())))  # of layers that carry a state, not keys
    return torch.stack([filters.get(layer, none) for layer in range(len(cache.layers))])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that the policy `fastgen` keeps: special tokens, and those that are punctuation alone.

    Source: Ge et al., "Model Tells You What to Discard", arXiv 2310.01801, section 3.2.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    added = {token for token, about in tokenizer.added_tokens_decoder.items() if about.special}
    return tuple(token for token, text in enumerate(texts) if token in added or _is_punctuation(text.strip()))


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(character).startswith("P") for character in text)
