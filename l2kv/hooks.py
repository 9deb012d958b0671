"""The attention hook: every attention call of a model's language part, routed through a function of ours.

transformers lets anyone register an attention function under a name, and a mask function with it. `attention_hook`
puts such a name into the configs that the model's attention reads, for as long as a `with` block lasts, and hands our
function the model's own attention to delegate to, so that nothing a model adds to attention (soft caps, sinks) is lost.
`TracedCache` tells whose pairs such a call is about, and `watching` shows them. Knows no statistics.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2kv.compat import DummyLayer
from l2kv.errors import UnsupportedModelError

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query [B, H, q, D], key [B, Hkv, kv, D], value, mask, **kwargs) -> (output [B, q, H, D], probabilities)."""

_PREFIX = "l2kv_"


@contextmanager
def attention_hook(
    model: PreTrainedModel, attend: Callable[..., tuple[Tensor, Tensor | None]]
) -> Iterator[Callable[[], bool]]:
    """Have `model` call `attend(inner, module, query, key, value, mask, **kwargs)` for attention, within the block.

    `inner` is the attention that the model used before, called the same way without `inner`. Towers for images and
    sounds keep their own. Blocks nest, and end in any order; other models of the same config object are not touched.
    Restored on exit, whatever happens. A copy of the model that is made meanwhile has the model's own attention.

    Yields a function that tells whether the hook is still in place: another attention may be chosen for the model.

    Raises:
        UnsupportedModelError: the model does not read its attention function from transformers' registry.
    """
    hooked = _language_configs(model)
    modules = list(model.modules())
    for config, supports_sdpa in hooked:
        _put_name(config, supports_sdpa)
    passing = _weakly(attend)
    for module in modules:
        _passing.setdefault(module, []).append(passing)
    names = [(config, config._attn_implementation) for config, _ in hooked]
    try:
        yield lambda: all(config._attn_implementation == name for config, name in names)
    finally:
        for module in modules:
            if left := _passing.get(module):  # none, where the model goes and this with it
                left.remove(passing)
                if not left:
                    del _passing[module]
        for config, name in names:
            name.give_back(config)


class _Name(str):
    """Name of a hook, put in place of a config's own attention, which it remembers; counts the hooks that use it."""

    own: str | None
    users: int

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (self.own,)) if self.own is not None else (_none, ())  # no copy of a model is hooked

    def give_back(self, config: PretrainedConfig) -> None:
        self.users -= 1
        if not self.users:
            config._attn_implementation_internal = self.own  # not the setter, which sets all configs within, too
            _unregister(self)


def _none() -> None:
    return None


def _put_name(config: PretrainedConfig, supports_sdpa: bool) -> None:
    own = config._attn_implementation
    if not isinstance(own, _Name):
        own = own and own.removeprefix(_PREFIX)  # a model built of a hooked config writes the bare name there
        base = own or "eager"
        if base not in ("eager", "sdpa"):
            # A flash-attention package is found by its name, which ours replaces; sdpa has the same kernels.
            base = "sdpa" if supports_sdpa else "eager"
        name = _Name(_PREFIX + base)
        name.own, name.users = own, 0
        _register(name, base)
        config._attn_implementation_internal = name
    config._attn_implementation.users += 1


_registered: Counter[str] = Counter()


def _register(name: str, base: str) -> None:
    def routed(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        inner = _attention_of(module, base)
        for passing in _passing.get(module, ()):
            attend = passing()
            assert attend is not None, "its attention_hook holds it"
            inner = partial(attend, inner)
        return inner(module, query, key, value, attention_mask, **options)

    if not _registered[name]:
        AttentionInterface.register(str(name), routed)
        AttentionMaskInterface.register(str(name), ALL_MASK_ATTENTION_FUNCTIONS[base])  # else: silently wrong lengths
    _registered[name] += 1


def _unregister(name: str) -> None:
    _registered[name] -= 1
    if not _registered[name]:  # registries have no public way
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _attention_of(module: nn.Module, base: str) -> Attention:
    if base != "eager":
        attention: Attention = ALL_ATTENTION_FUNCTIONS[base]
        return attention
    home = sys.modules[type(module).__module__]
    if not hasattr(home, "eager_attention_forward"):
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention that could be called.")
    eager: Attention = home.eager_attention_forward
    return eager


def _language_configs(model: PreTrainedModel) -> list[tuple[PretrainedConfig, bool]]:
    """Config objects that a model's language part reads, and those around it, by which masks may be made.

    With each, whether its model can do with sdpa. Towers are left out: their eager attention may be another function.
    """
    text = type(model.config.get_text_config(decoder=True))
    found: dict[int, tuple[PretrainedConfig, bool]] = {}
    replaceable = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if not isinstance(config, PretrainedConfig):
            continue
        if not (isinstance(config, text) or isinstance(config.get_text_config(decoder=True), text)):
            continue
        if isinstance(module, PreTrainedModel):
            found[id(config)] = (config, module._supports_sdpa)
            if isinstance(config, text):
                replaceable.append(module._can_set_attn_implementation())
        else:
            found.setdefault(id(config), (config, False))
    if not any(replaceable):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an attention of its own that transformers cannot replace, "
            "so its keys and its attention cannot be reached. Try another architecture (Llama, Qwen, ...)."
        )
    return list(found.values())


_passing: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Attention]]] = weakref.WeakKeyDictionary()
"""Functions that the attention calls of each module of a hooked model pass through, the innermost first. Its
`attention_hook` alone holds each: a reference from here would keep a model alive that nobody else holds."""


def _weakly(attend: Attention) -> weakref.ref[Attention]:
    return weakref.WeakMethod(attend) if isinstance(attend, MethodType) else weakref.ref(attend)


class Repeats(NamedTuple):
    """Repetition of the cache's kv heads by a model for its attention, which may repeat them again."""

    times: int = 1
    in_turn: bool = False
    """k0 k1 k0 k1 (JetMoE), not k0 k0 k1 k1."""


class Taken(NamedTuple):
    """The pairs of a cache that an attention call is given."""

    layer_idx: int
    source: int
    """The layer that caches them: another one where layers borrow (Gemma 3n)."""
    keys: Tensor  # [B, Hkv, n, D], as the cache gave them out
    values: Tensor
    repeats: Repeats


class TracedCache(Cache):
    """A cache that remembers which layer's pairs it gave out last, and so whose attention a call is.

    A model's modules need not say which layer they are, nor be one layer only; and a call that is given none of the
    cache's pairs (of a tower, say) is told from one that is given what the cache does not hold.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forget_given()

    def forget_given(self) -> None:
        """Forget what was given out: a forward pass begins, or is over."""
        self._given: tuple[int, Tensor, Tensor] | None = None
        self._lent: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}
        self._latest = -1  # layer whose attention came by

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the pairs of one layer, as models do."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._given = layer_idx, keys, values
        return keys, values

    def take(self, key: Tensor, value: Tensor) -> Taken | None:
        """Find the layer whose pairs an attention call is given; None where they are not from this cache.

        Raises:
            UnsupportedModelError: it is given others than the cache holds, so that norms of cached keys say nothing.
        """
        if self._given is None:
            return self._borrowed(key, value)
        (layer_idx, keys, values), self._given = self._given, None
        repeats = _repeats(key, keys, value, values)
        if repeats is None:
            raise UnsupportedModelError(
                "This model gives its attention other keys or values than its cache holds, so a rule for what the "
                "cache holds says nothing about its attention."
            )
        self._lent[layer_idx] = weakref.ref(keys), weakref.ref(values)
        self._latest = layer_idx
        return Taken(layer_idx, layer_idx, keys, values, repeats)

    def _borrowed(self, key: Tensor, value: Tensor) -> Taken | None:
        source = next((i for i, (keys, values) in self._lent.items() if keys() is key and values() is value), None)
        if source is None:
            return None
        self._latest += 1
        if self._latest >= len(self.layers) or not isinstance(self.layers[self._latest], DummyLayer):
            raise UnsupportedModelError("This model attends several times to the keys of one layer.")
        return Taken(self._latest, source, key, value, Repeats())


def _repeats(key: Tensor, keys: Tensor, value: Tensor, values: Tensor) -> Repeats | None:
    """How the key and value of a call repeat the heads of those given out; None if they are something else."""
    if key is keys and value is values:
        return Repeats()
    times = key.shape[1] // keys.shape[1]
    for way in (Repeats(times), Repeats(times, in_turn=True)):
        if _is_repeated(key, keys, way) and _is_repeated(value, values, way):
            return way
    return None


def _is_repeated(used: Tensor, held: Tensor, way: Repeats) -> bool:
    again = held.repeat(1, way.times, 1, 1) if way.in_turn else held.repeat_interleave(way.times, dim=1)
    return used.shape == again.shape and torch.equal(used, again.to(used.dtype))


class WatchedCache(TracedCache, DynamicCache):
    """A full cache, for `watching`."""


class Look(NamedTuple):
    """One attention call over a layer of a cache. Query heads h*G to h*G + G - 1 share kv head h."""

    layer_idx: int
    source: int
    """The layer that caches the keys: another one where layers borrow (Gemma 3n)."""
    query: Tensor  # [B, H, q, D]
    key: Tensor  # [B, Hkv, n, D]: as cached, after rotary embedding and any q/k norm
    value: Tensor  # [B, Hkv, n, D]
    mask: Tensor | None
    """[B or 1, H or 1, q, n] bool (True is shown) or to be added to the scores; None hides the future alone."""
    options: Mapping[str, Any]
    """Options of the call: scaling, softcap, s_aux, ..."""


@contextmanager
def watching(model: PreTrainedModel, cache: WatchedCache, look: Callable[[Look], object]) -> Iterator[None]:
    """Call `look` before each attention of a forward pass over `cache`, within the block.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or is of a kind that cannot be worked out again.
    """
    cache.forget_given()

    def attend(
        inner: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        taken = cache.take(key, value)
        if taken is not None:
            if taken.repeats.in_turn:
                raise UnsupportedModelError(
                    "In this model the query heads that share keys are not neighbours, which is not supported yet."
                )
            if options.get("position_bias") is not None:
                raise UnsupportedModelError("This model adds a bias to its attention scores that is not supported yet.")
            look(Look(taken.layer_idx, taken.source, query, taken.keys, taken.values, mask, options))
        return inner(module, query, key, value, mask, **options)

    with attention_hook(model, attend):
        yield
