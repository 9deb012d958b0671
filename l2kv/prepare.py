"""`compressible(model)`: makes a stock transformers model accept a `CompressedCache`.

A stock model builds one mask for all layers, sized by the first; layers of different lengths break it. Here each layer
crops that mask to what it holds (every retained pair precedes every new token, so only the length differs), and evicts
as soon as its attention is done, which also keeps the peak of a long prompt down to one layer's full keys.
"""

from __future__ import annotations

from contextlib import ExitStack
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from l2kv.cache import CompressedCache
from l2kv.layer import CompressedLayer
from l2kv.seam import Attention, UnsupportedModelError, attention_seam

_prepared: WeakSet[PreTrainedModel] = WeakSet()


class compressible:
    """Prepare `model` for compressed caches, at once; restore it at the end of the `with` block, or with `restore()`.

        with compressible(model):
            model.generate(**inputs, past_key_values=CompressedCache(model.config, CompressionSpec(keep_ratio=0.5)))

    Other caches work as before meanwhile. On a model that is prepared already it does nothing, at its end neither.
    One forward pass of a model at a time.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: CompressedCache | None = None  # of the forward pass that is under way
        self._undo = ExitStack()
        if model in _prepared:
            return
        with ExitStack() as stack:
            _prepared.add(model)
            stack.callback(_prepared.discard, model)
            stack.enter_context(attention_seam(model, self._attend))
            base = model.base_model  # called by the whole model and by those who want no logits
            for hook in (
                base.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                base.register_forward_hook(self._after_forward, always_call=True),
            ):
                stack.callback(hook.remove)
            self._undo = stack.pop_all()

    def restore(self) -> None:
        """Give the model its own attention back. Calling it again does nothing."""
        self._undo.close()

    def __enter__(self) -> PreTrainedModel:
        return self._model

    def __exit__(self, *exc: object) -> None:
        self.restore()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = next((a for a in (*kwargs.values(), *args) if isinstance(a, CompressedCache)), None)
        if cache is None:
            return
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and (mask.dim() != 2 or not mask.all()):
            raise ValueError(
                "A compressed cache takes rows of equal length without padding: run texts of different length one by "
                "one, and pass no attention_mask of your own."
            )
        self._cache, cache.serving = cache, True

    def _after_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        cache, self._cache = self._cache, None
        if cache is None:
            return
        cache.serving = False
        if output is not None and any(layer.unattended for layer in cache.compressed_layers()):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} computes its attention past transformers' registry, so its cache "
                "cannot be compressed. Try another architecture (Llama, Qwen, ...)."
            )

    def _attend(
        self,
        inner: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        layer = self._cache.layers[module.layer_idx] if self._cache is not None else None
        if not isinstance(layer, CompressedLayer):
            return inner(module, query, key, value, mask, **kwargs)
        if isinstance(mask, torch.Tensor):
            mask = mask[..., -key.shape[-2] :]
        result = inner(module, query, key, value, mask, **kwargs)
        layer.evict()
        return result
