"""The attention seam: every attention call of a transformers model, routed through a function of ours.

transformers lets anyone register an attention function under a name, and a mask function with it. `attention_seam`
does so under a name of its own, for as long as a `with` block lasts, and hands our function the model's own attention
to delegate to, so that nothing a model adds to attention (soft caps, sinks) is lost. Knows no cache and no statistics.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query [B, H, q, D], key [B, Hkv, kv, D], value, mask, **kwargs) -> (output [B, q, H, D], weights)."""

_numbers = itertools.count()
_PREFIX = "l2kv_"


class UnsupportedModelError(ValueError):
    """This model cannot be looked into, or compressed, the way it is built; the message says why."""


@contextmanager
def attention_seam(model: PreTrainedModel, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Within the block, `model` calls `attend(inner, module, query, key, value, mask, **kwargs)` for attention.

    `inner` is the attention that the model used before, called the same way without `inner`; `module.layer_idx` says
    which layer it is. Seams nest. Restored on exit, whatever happens.

    Raises:
        UnsupportedModelError: the model does not read its attention function from transformers' registry.
    """
    previous = model.config._attn_implementation
    # A flash-attention package is found by its name, which the seam replaces; sdpa has the same kernels.
    own = previous in ("eager", "sdpa") or previous.startswith(_PREFIX)
    base = previous if own else "sdpa" if model._supports_sdpa else "eager"

    def routed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
        return attend(_attention_of(module, base), module, query, key, value, mask, **kwargs)

    name = f"{_PREFIX}{next(_numbers)}"
    AttentionInterface.register(name, routed)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])  # without it: silently wrong lengths
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise UnsupportedModelError(
                f"{type(model).__name__} has an attention of its own that transformers cannot replace, "
                "so its keys and its attention cannot be reached. Try another architecture (Llama, Qwen, ...)."
            )
        yield
    finally:
        try:
            model.set_attn_implementation(previous)
        finally:
            # Registries have no public "unregister"; without it each use would leak a closure that holds the model.
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


def _attention_of(module: nn.Module, base: str) -> Attention:
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    return sys.modules[type(module).__module__].eager_attention_forward
