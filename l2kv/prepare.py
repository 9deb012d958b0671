"""`compressible(model)`: prepare a stock transformers model for a `CompressedCache`.

A stock model builds one mask for all layers, sized by the first; layers of different lengths break it. Here each layer
crops that mask to what it holds (every retained pair precedes every new token, so only the length differs), and evicts
as soon as its attention is done, which also keeps the peak of a long prompt down to one layer's full keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from transformers import PreTrainedModel

from l2kv.attention import attend, check_mask
from l2kv.cache import CompressedCache
from l2kv.config import check_compressible
from l2kv.errors import UnsupportedModelError
from l2kv.heads import in_groups, in_model_order
from l2kv.hooks import Attention, attention_hook
from l2kv.layer import CompressedLayer
from l2kv.padding import first_real
from l2kv.together import CachesTogether, JoinedLayer


class compressible:
    """Prepare `model` for compressed caches at once, and restore it at the end of the `with` block or by `restore()`.

        with compressible(model):
            model.generate(**inputs, past_key_values=CompressedCache(model.config, CompressionSpec(keep_ratio=0.5)))

    Other caches still work as before. A model that is prepared several times is restored by the last `restore()`.
    Run one forward pass of a model at a time.

    Raises:
        UnsupportedModelError: the model caches no keys, or its attention cannot be reached.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        known = _preparations.get(model)
        self._preparation: _Preparation | None = known() if known is not None else None
        if self._preparation is None:
            self._preparation = _Preparation(model)
            _preparations[model] = ref(self._preparation)
        self._preparation.users += 1

    def restore(self) -> None:
        """Give the model its own attention back. Calling it again does nothing."""
        preparation, self._preparation = self._preparation, None
        if preparation is None:
            return
        preparation.users -= 1
        if not preparation.users:
            del _preparations[self._model]
            preparation.undo()

    def __enter__(self) -> PreTrainedModel:
        return self._model

    def __exit__(self, *exc: object) -> None:
        self.restore()


class _Preparation:
    """The hooks on one model, and the compressed cache of the forward pass that is under way."""

    _hooked: Callable[[], bool] | None = None
    _cache: CompressedCache | CachesTogether | None = None
    _outermost: nn.Module | None = None  # the part of the model that was called with the cache
    _mask: Tensor | None = None  # that was found to be as it must
    _evict_later: Callable[[], None] | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        check_compressible(model.config.get_text_config(decoder=True))
        if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
            raise UnsupportedModelError(f"{type(model).__name__} takes no cache but its own.")
        self.users = 0
        self._model_name = type(model).__name__
        with ExitStack() as stack:
            self._hooked = stack.enter_context(attention_hook(model, self._attend))
            # Which of its parts a model calls, and which a user, differs: the outermost that is given a cache counts.
            for part in model.modules():
                if isinstance(part, PreTrainedModel):
                    before = part.register_forward_pre_hook(self._before_forward, with_kwargs=True)
                    after = part.register_forward_hook(self._after_forward, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            stack.callback(self._let_go)  # an interrupt (no Exception) in a forward pass comes past the hooks
            self.undo = stack.pop_all().close

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (_Preparation,)  # in a copy of the model, which is not prepared, the hooks do nothing

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((a for a in (*kwargs.values(), *args) if isinstance(a, CompressedCache | CachesTogether)), None)
        if cache is None or self._hooked is None:
            return
        if module is self._outermost:  # an interrupt came past its end
            self._let_go()
        cache.check_even()
        if cache.serving:
            return
        if not self._hooked():
            raise RuntimeError(
                f"Another attention was chosen for {self._model_name} after it was prepared. Choose it first, and call "
                "compressible(model) then."
            )
        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise RuntimeError(
                f"{self._model_name} is in training mode with gradient checkpointing, which bypasses caches. "
                "Call model.eval() first."
            )
        mask = _argument("attention_mask", module, args, kwargs)
        if mask is not None:
            _check_columns(mask, cache.get_seq_length(), _new_tokens(module, args, kwargs))
        cache.note_padding(first_real(mask))
        cache.note_tokens(_argument("input_ids", module, args, kwargs))
        self._let_go()  # of another cache, where an interrupt came past the end of its pass
        self._outermost, self._cache, self._seen_before = module, cache, cache.get_seq_length()
        self._lender = cache.lender
        cache.serving = True

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if module is not self._outermost or self._cache is None:
            return
        cache, before, evict = self._cache, self._seen_before, self._evict_later
        self._let_go()
        if output is None:  # an exception is under way
            return
        if evict is not None:
            evict()
        layers = cache.compressed_layers()
        if any(layer.unattended for layer in layers):
            raise UnsupportedModelError(
                f"{self._model_name} computes its attention past transformers' registry, so its cache cannot be "
                "compressed. Try another architecture (Llama, Qwen, ...)."
            )
        if any(layer.seen == before for layer in layers):
            raise UnsupportedModelError(f"{self._model_name} does not give the keys of all its layers to the cache.")

    def _let_go(self) -> None:
        if self._cache is not None:
            self._cache.serving = False
            self._cache.forget_given()
        self._cache = self._outermost = self._mask = self._evict_later = None

    def _attend(
        self,
        inner: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = self._cache
        taken = cache.take(key, value) if cache is not None else None
        layer = cache.layers[taken.source] if cache is not None and taken is not None else None
        if taken is None or not isinstance(
            layer, CompressedLayer | JoinedLayer
        ):  # a tower's, say, or one with a window
            return inner(module, query, key, value, mask, **kwargs)
        if mask is not None and mask is not self._mask:
            check_mask(layer, query.shape[2], mask)
            self._mask = mask  # the same for all layers
        query = in_groups(query, taken.repeats, layer.n_heads)
        output, probabilities = attend(layer, inner, module, query, mask, kwargs, times=taken.repeats.times)
        if taken.source == self._lender:  # others have yet to look at what it holds
            if taken.layer_idx == taken.source:
                self._evict_later = partial(layer.evict, query, kwargs)
        elif taken.layer_idx == taken.source:
            layer.evict(query, kwargs)
        else:
            raise UnsupportedModelError(f"{self._model_name} borrows the keys of layer {taken.source}, too early.")
        return in_model_order(output, taken.repeats, layer.n_heads), probabilities


def _argument(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Argument of a forward pass of `module`, by name or by place; None where it is not given."""
    if name in kwargs or not args:
        return kwargs.get(name)
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)).get(name)


def _new_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Number of tokens that a forward pass is given; None where it is given none."""
    given = (_argument(name, module, args, kwargs) for name in ("input_ids", "inputs_embeds"))
    return next((tokens.shape[1] for tokens in given if tokens is not None), None)


def _check_columns(mask: object, seen: int, new: int | None) -> None:
    """Raise ValueError unless a mask covers all tokens: a shorter one would be padded with zeros, which hide tokens."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and new is not None and mask.shape[1] != seen + new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but the cache has seen {seen} tokens and {new} are new: "
            f"it needs {seen + new} columns, for all tokens from the first on, evicted or not."
        )


_preparations: WeakKeyDictionary[PreTrainedModel, ref[_Preparation]] = WeakKeyDictionary()
"""Each is held by the hooks on its model alone, so a model that is dropped while it is prepared is freed with them."""
