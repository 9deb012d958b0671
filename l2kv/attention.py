"""Attention over a compressed layer. Knows no policies.

It goes through the model's own attention: for all heads at once where they hold the same number of pairs, else head by
head. A single token, the usual case, attends to what all heads hold at once: by a kernel on a GPU, else by pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2kv import kernels
from l2kv.errors import UnsupportedModelError
from l2kv.heads import numbers_on, of_query_heads, options_of_heads
from l2kv.hooks import Attention
from l2kv.layer import CompressedLayer
from l2kv.parts import CodedPart, Part
from l2kv.probabilities import QUERIES, attention_scale, hide_unseen, normalised
from l2kv.storage.paged import Pages
from l2kv.together import JoinedLayer

_OF_KERNELS = (torch.float32, torch.float16, torch.bfloat16)


def attend(
    layer: CompressedLayer | JoinedLayer,
    inner: Attention,
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    *,
    times: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of the latest queries [B, H, q, D] to all that the layer holds: ([B, q, H, D], None).

    Args:
        layer: the layer to attend to.
        inner: the model's own attention.
        module: the model's attention layer.
        query: queries after the rotary embedding.
        mask: mask of the longest layer, [B or 1, 1, q, n], or None where it hides the future alone.
        options: options of the attention call.
        times: number of repeats of each kv head that the model's own attention expects.

    Raises:
        UnsupportedModelError: the model has a position bias or a window, which go by the place in the cache.
    """
    if isinstance(layer, JoinedLayer):
        of_rows = zip(layer.members, layer.split(query), layer.split(mask), strict=True)
        outputs = [attend(one, inner, module, its, shown, options, times=times)[0] for one, its, shown in of_rows]
        return torch.cat(outputs), None
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(
            "This model adds a bias to its attention scores that goes by the place in the cache."
        )
    if options.get("sliding_window") is not None:
        raise UnsupportedModelError("This model looks through a window at a layer whose cache holds all tokens.")
    if layer.coded:
        return _of_coded(layer, query, mask, options), None
    hides_nothing = mask is None and layer.first_real is None
    if query.shape[2] == 1 and hides_nothing:
        if (form := softmax_form(inner, query, options)) is not None and _by_kernel(layer, query):
            return _of_table(layer, query, form), None
        if inner is ALL_ATTENTION_FUNCTIONS["sdpa"]:
            return _of_one_token(layer, query, options), None
    outputs = []
    for part, of_part in zip(layer.parts(), _masks(layer, query, mask), strict=True):
        output, _ = inner(
            _Heads(module, part.heads, layer.n_heads),
            of_query_heads(query, part.heads, layer.n_heads),
            part.keys if times == 1 else part.keys.repeat_interleave(times, dim=1),
            part.values if times == 1 else part.values.repeat_interleave(times, dim=1),
            of_part,
            **options_of_heads(options, part.heads, layer.n_heads),
        )
        outputs.append(output)  # [B, q, h * G, D]
    return torch.cat(outputs, dim=2), None


@torch.no_grad()
def _of_coded(layer: CompressedLayer, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Attention to pairs of fewer bits or channels, which the model's own cannot read: [B, H, q, D] -> [B, q, H, D].

    Pairs are decoded a block at a time, and keys stay as narrow as they are stored.
    """
    outputs = []
    for part, shown in zip(layer.parts(), _masks(layer, query, mask), strict=True):
        assert isinstance(part, CodedPart)
        of_part = of_query_heads(query, part.heads, layer.n_heads)
        of_heads = options_of_heads(options, part.heads, layer.n_heads)
        of_blocks = []
        for start in range(0, query.shape[2], QUERIES):
            some = slice(start, start + QUERIES)
            hide = partial(
                _hide, shown=shown if shown is None else shown[..., some, :], first=part.held - query.shape[2] + start
            )
            scores = part.scores(of_part[:, :, some], attention_scale(query, options))
            of_blocks.append(part.mixed(normalised(scores, hide, of_heads)))
        outputs.append(torch.cat(of_blocks, dim=2))
    return torch.cat(outputs, dim=1).transpose(1, 2).to(query.dtype).contiguous()


def _hide(scores: Tensor, *, shown: Tensor | None, first: int) -> None:
    """Hide what a mask hides, or the future alone where there is none; the first query is in slot `first`."""
    if shown is None:
        hide_unseen(scores, first)
    elif shown.dtype == torch.bool:
        scores.masked_fill_(~shown, -torch.inf)
    else:
        scores.add_(shown)


def softmax_form(inner: Attention, query: Tensor, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a kernel needs to know of an attention call: its scale, softcap and sinks; None where that is not all."""
    if options.get("dropout"):
        return None
    scale = attention_scale(query, options)
    if inner is ALL_ATTENTION_FUNCTIONS["sdpa"]:  # which takes no notice of the others
        return {"scale": scale}
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if softcap is None and sinks is None:  # a model's own attention, which may be of any form
        return None
    return {"scale": scale, "softcap": softcap, "sinks": sinks}


def _by_kernel(layer: CompressedLayer, query: Tensor) -> bool:
    keys, values, *_ = layer.table
    return (
        kernels.enabled(query.device)
        and query.dtype in _OF_KERNELS
        and query.dtype == keys.dtype == values.dtype
        and keys.stride(-1) == values.stride(-1) == 1
        and not torch.is_autocast_enabled(query.device.type)
    )


def _of_table(layer: CompressedLayer, query: Tensor, form: Mapping[str, Any]) -> Tensor:
    """Attention of one token's queries [B, H, 1, D] to all slots of a layer, by a kernel: [B, 1, H, D]."""
    from l2kv.kernels import ragged

    table = layer.table
    held = numbers_on(query.device, layer.held_by_head)
    return ragged.attend(query.squeeze(2), table, held, ragged.divide(table), **form)[:, None]


def _of_one_token(layer: CompressedLayer, query: Tensor, options: dict[str, Any]) -> Tensor:
    """sdpa for a single token that sees everything: [B, H, 1, D] -> [B, 1, H, D].

    The query heads that share keys are given as queries of one head: the same sum, but the keys are read once, instead
    of once a query head.
    """
    packed = query.squeeze(2).unflatten(1, (layer.n_heads, -1))  # [B, Hkv, G, D]
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    if layer.keys is not None and layer.values is not None:  # all heads hold the same number of pairs
        output = scaled_dot_product_attention(packed, layer.keys, layer.values, dropout_p=dropout, scale=scale)
    elif not dropout and _in_one_call(packed, layer.pages):
        output = _of_pages(packed, layer.pages, scale)
    else:
        output = _head_by_head(packed, layer.parts(), scale, dropout)
    return output.flatten(1, 2)[:, None]


def _in_one_call(query: Tensor, pages: Pages) -> bool:
    """Whether torch has a kernel for `_of_pages` that returns its log-sum-exp: so far only on a CPU."""
    return (
        query.device.type == "cpu"
        and query.dtype == pages.keys.dtype == pages.values.dtype
        and pages.keys.shape[-1] == pages.values.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


def _of_pages(query: Tensor, pages: Pages, scale: float | None) -> Tensor:
    """Attention of one token's queries [B, Hkv, G, D] to the pages of their heads, in one call: the same shape.

    The parts of a softmax over a head's pages, put together by their log-sum-exp, as flash attention does (Dao et al.,
    arXiv 2205.14135, section 3.1).
    """
    of_pages, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.index_select(1, pages.heads), pages.keys, pages.values, attn_mask=pages.slot_mask, scale=scale
    )  # [B, P, G, D], [B, P, G]
    shares = (log_sums.transpose(1, 2)[:, :, None] + pages.head_mask).softmax(dim=-1)  # [B, G, Hkv, P]
    output: Tensor = shares @ of_pages.transpose(1, 2).to(shares.dtype)
    return output.transpose(1, 2).to(query.dtype)


def _head_by_head(query: Tensor, parts: Sequence[Part | CodedPart], scale: float | None, dropout: float) -> Tensor:
    """The same, in one call per head."""
    outputs = [
        scaled_dot_product_attention(of_head, part.keys, part.values, dropout_p=dropout, scale=scale)
        for of_head, part in zip(query.split(1, dim=1), parts, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def check_mask(layer: CompressedLayer | JoinedLayer, queries: int, mask: Tensor) -> None:
    """Raise UnsupportedModelError unless a mask [B or 1, 1, q, n] hides nothing but the future and padding.

    Any other mask goes by places in the cache, and these change where tokens are evicted.
    """
    past = _shown(mask).tril(mask.shape[-1] - queries)
    expected = torch.ones_like(past).tril(mask.shape[-1] - queries)
    if mask.shape[1] > 1 or (layer.first_real is None and not torch.equal(past, expected)):
        raise UnsupportedModelError(
            "This model's attention mask hides more than the future and the padding, or not the same in every head: a "
            "window, a bias or a choice that goes by the place in the cache."
        )


def _shown(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _masks(layer: CompressedLayer, query: Tensor, mask: Tensor | None) -> Iterator[Tensor | None]:
    """Masks, one for each part. All that was held before precedes all queries, so only the length differs..."""
    if layer.first_real is None:
        for part in layer.parts():
            yield mask if mask is None else mask[..., -part.held :]
        return
    # ... but where rows are padded, each head hides the padding that it still holds.
    queries, group = query.shape[2], query.shape[1] // layer.n_heads
    for visible in layer.visible(queries):  # [B, h or 1, q, n]
        if (
            mask is not None
        ):  # among the new tokens it may show more than the past: the parts of an image see each other
            visible[..., -queries:] |= _shown(mask[..., -queries:])
        if visible.shape[1] > 1:
            visible = visible.repeat_interleave(group, dim=1)
        if mask is None or mask.dtype == torch.bool:
            yield visible
        else:
            yield torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)


class _Heads:
    """An attention layer as some of its heads see it: gpt-oss has its sinks there, one for each query head."""

    def __init__(self, module: nn.Module, heads: tuple[int, ...], kv_heads: int) -> None:
        self._module, self._heads, self._kv_heads = module, heads, kv_heads

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name != "sinks" or value is None:
            return value
        return of_query_heads(value[None], self._heads, self._kv_heads)[0]
