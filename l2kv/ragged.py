"""Attention over a compressed layer, through the model's own attention: of all heads at once where they hold the same
number of pairs, else group by group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2kv.heads import of_query_heads, options_of_heads
from l2kv.layer import CompressedLayer, Group
from l2kv.seam import Attention, UnsupportedModelError


def attend(
    layer: CompressedLayer,
    inner: Attention,
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    options: dict[str, object],
) -> tuple[Tensor, Tensor | None]:
    """The attention of the latest queries [B, H, q, D] to all that the layer holds.

    Args:
        inner: the model's own attention, of the attention layer `module`.
        mask: of the longest layer [B or 1, 1, q, n], or None where it hides nothing but what causality does.
        options: of the attention call.
    """
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(
            "this model adds a bias to its attention scores that goes by the place in the cache"
        )
    if not layer.ragged:
        return _call(
            inner, module, query, layer.keys, layer.values, _mask(layer, layer.groups[0], query, mask), options
        )
    outputs = []
    for group in layer.groups:
        of_group = of_query_heads(query, group.heads, layer.n_heads)
        output, _ = _call(
            inner,
            _Heads(module, group.heads, layer.n_heads),
            of_group,
            group.keys,
            group.values,
            _mask(layer, group, of_group, mask),
            options_of_heads(options, group.heads, layer.n_heads),
        )
        outputs.append(output.unflatten(2, (len(group.heads), -1)))  # [B, q, h, G, D]
    output = torch.cat(outputs, dim=2)
    order = [head for group in layer.groups for head in group.heads]
    if order != sorted(order):
        output = output[:, :, sorted(range(len(order)), key=order.__getitem__)]
    return output.flatten(2, 3), None


def _call(
    inner: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention. To sdpa, a single token's heads that share keys are given as queries of one head.

    Nothing is hidden from any of them, so it is the same sum, and the keys are read once instead of once a query head.
    """
    group = query.shape[1] // key.shape[1]
    if query.shape[2] > 1 or group == 1 or mask is not None or inner is not ALL_ATTENTION_FUNCTIONS["sdpa"]:
        return inner(module, query, key, value, mask, **options)
    packed = query.squeeze(2).unflatten(1, (-1, group))  # [B, Hkv, G, D]
    output, _ = inner(_Ungrouped(module), packed, key, value, None, **(options | {"is_causal": False}))
    return output.transpose(1, 2).flatten(1, 2)[:, None], None  # [B, G, Hkv, D] -> [B, 1, H, D]


def _mask(layer: CompressedLayer, group: Group, query: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask for one group. All that was held before precedes all queries, so only the length differs..."""
    if layer.first_real is None:
        return mask if mask is None else mask[..., -group.held :]
    # ... but where rows are padded, each head hides the padding that it still holds.
    visible = layer.visible(group, query.shape[2])  # [B, h or 1, q, n]
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
    if mask is None or mask.dtype == torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)


class _Heads:
    """An attention layer as some of its heads see it: the sinks of gpt-oss are its own, one for each query head."""

    def __init__(self, module: nn.Module, heads: tuple[int, ...], kv_heads: int) -> None:
        self._module, self._heads, self._kv_heads = module, heads, kv_heads

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        return of_query_heads(value[None], self._heads, self._kv_heads)[0] if name == "sinks" else value


class _Ungrouped:
    """An attention layer as if each query head had keys of its own."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, name)
