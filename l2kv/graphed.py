"""Decoding over a compressed cache as one CUDA graph: a step that the host starts with a single call.

A step of a small or fast model takes less time than the host takes to start its hundreds of kernels one by one. Here
they are recorded once, and replayed for every token. That works where a step does the same work in the same memory each
time: so the cache is given room for all steps beforehand, and the numbers of pairs that each head will hold, which
follow from the spec alone, lie on the device as a table with a row for each step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from l2kv import kernels
from l2kv.attention import softmax_form
from l2kv.cache import CompressedCache
from l2kv.errors import UnsupportedModelError
from l2kv.hooks import Attention, TracedCache, attention_hook
from l2kv.layer import CompressedLayer

_WARM_UP = 2  # steps outside the graph: libraries choose and allocate at first use


class DecodingGraph:
    """Greedy decoding steps over a compressed cache, which evicts as it always does.

        with torch.inference_mode(), DecodingGraph(model, cache, steps=100) as graph:
            for _ in range(100):
                token = graph.step(token)

    The cache is the graph's own within the block; afterwards it holds what it would hold after as many steps of its own
    and can be used as before. In Triton's interpreter, for tests, each step is run as it is.

    Args:
        model: the model, which need not be prepared.
        cache: cache after a prompt; rows must not be padded.
        steps: highest number of steps.
        fuse: compile the parts of each layer between its products, which takes some seconds once.

    Raises:
        UnsupportedModelError: a layer is not compressed (a sliding window, a running state), or the attention is of a
            form that the kernel does not know.
        RuntimeError: there is no GPU, no triton, or the kernels are turned off.
        ValueError: the cache is empty, padded, of fewer bits, or its policy ranks pairs anew at each step.
    """

    def __init__(self, model: PreTrainedModel, cache: CompressedCache, *, steps: int, fuse: bool = False) -> None:
        self._model, self._cache, self._steps, self._fuse = model, cache, steps, fuse
        self._layers = _checked(cache)
        self._before, self._taken = cache.get_seq_length(), 0
        self._graph: torch.cuda.CUDAGraph | None = None
        rows, device = self._layers[0].rows, self._layers[0].device
        counts = [layer.reserve(steps) for layer in self._layers]  # of each layer, [steps + 1] rows of numbers by head
        self._counts = torch.tensor(list(zip(*counts, strict=True)), dtype=torch.int32, device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._held, self._kept = (torch.zeros_like(self._counts[0]) for _ in range(2))
        self._seen = torch.zeros(1, dtype=torch.long, device=device)
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._next = torch.zeros_like(self._token)
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # of four dimensions: no other is made
        for i, layer in enumerate(self._layers):
            layer.connect(self._held[i], self._kept[i], self._seen)
        self._inner = _GraphCache(self._layers)
        self._open = ExitStack()

    def __enter__(self) -> DecodingGraph:
        self._open.enter_context(attention_hook(self._model, self._attend))
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the cache back, with all pairs of the steps that were taken."""
        self._open.close()
        self._graph = None
        for layer in self._layers:
            layer.give_back(self._taken)
        self._layers = []

    def step(self, token: Tensor) -> Tensor:
        """Decode the greedy next token [B, 1] after `token` [B, 1], which is added to the cache.

        Raises:
            ValueError: all steps were taken.
        """
        if self._taken == self._steps:
            raise ValueError(f"This graph was made for {self._steps} steps, and all of them are taken.")
        self._token.copy_(token)
        if self._token.is_cuda and self._graph is None:
            self._record()
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        self._taken += 1
        return self._next.clone()

    def _record(self) -> None:
        # A step may be run any number of times before it counts: it writes a pair beyond those held, and then would
        # evict, so the numbers of a step that evicts nothing stand in the table's place meanwhile.
        with self._fused(), torch.cuda.device(self._token.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._run(evicting=False)
                    self._at.zero_().add_(self._taken)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
        self._graph = graph

    def _run(self, *, evicting: bool = True) -> None:
        """Take a step, on what lies on the device."""
        self._held.copy_(self._counts.index_select(0, self._at)[0])
        self._kept.copy_(self._counts.index_select(0, self._at + 1)[0] if evicting else self._held + 1)
        self._seen.copy_(self._at + self._before + 1)
        positions = (self._at + self._before)[None].expand(len(self._token), 1)
        output = self._model(
            self._token, past_key_values=self._inner, use_cache=True, position_ids=positions, attention_mask=self._mask
        )
        self._next.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self._at.add_(1)

    def _attend(
        self,
        inner: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        taken = self._inner.take(key, value)
        if taken is None:
            return inner(module, query, key, value, mask, **options)
        while isinstance(inner, partial):  # of a prepared model, whose hook knows nothing of these pairs
            inner = inner.args[0]
        form = softmax_form(inner, query, options)
        if form is None or taken.repeats.times > 1 or taken.layer_idx != taken.source:
            raise UnsupportedModelError(
                f"The attention of {type(self._model).__name__} is of a form that the kernel does not know. Decode "
                "without a graph."
            )
        return self._layers[taken.source].attend(query.squeeze(2), form)[:, None], None

    @contextmanager
    def _fused(self) -> Iterator[None]:
        """Compile norms, feed-forward parts and the rotary embedding, for as long as a step is recorded."""
        if not self._fuse:
            yield
            return
        with ExitStack() as stack:
            for part in _between_products(self._model):
                stack.callback(setattr, part, "_compiled_call_impl", part._compiled_call_impl)
                part.compile(dynamic=False)
            for home in {sys.modules[type(part).__module__] for part in self._model.modules()}:
                if rotary := getattr(home, "apply_rotary_pos_emb", None):  # other models compute the same by it
                    setattr(home, "apply_rotary_pos_emb", torch.compile(rotary, dynamic=False))  # noqa: B010
                    stack.callback(setattr, home, "apply_rotary_pos_emb", rotary)
            yield


def _between_products(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Norms and feed-forward parts of the decoder layers."""
    for layer in model.modules():
        children = dict(layer.named_children())
        if any(name.endswith("layernorm") for name in children):
            yield from (part for name, part in children.items() if name.endswith("layernorm") or name == "mlp")


class _GraphLayer(CacheLayerMixin):
    """One layer within a graph: its buffers stay where they are, and numbers come from the device."""

    is_sliding = False

    def __init__(self, layer: CompressedLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # theirs
        from l2kv.kernels import ragged  # late: it needs triton

        self._layer, self._ragged = layer, ragged
        self.rows, self.device, self.is_initialized = layer.table.keys.shape[0], layer.device, True

    def reserve(self, steps: int) -> list[tuple[int, ...]]:
        """Make room for all steps; return what each kv head holds before each step, and after the last."""
        counts = self._layer.reserve_steps(steps)
        self._evicts = any(after != tuple(n + 1 for n in before) for before, after in pairwise(counts))
        self._table = self._layer.table
        self._chunks = self._ragged.divide(self._table)
        return counts

    def connect(self, held: Tensor, kept: Tensor, seen: Tensor) -> None:
        """Take numbers from these tensors: of pairs held and kept, int32 [Hkv], and of tokens seen, int64 [1]."""
        self._held, self._kept, self._seen = held, kept, seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new pairs [B, Hkv, 1, D] behind those held."""
        ranked = self._table.ranks is not None
        scores = self._layer.score(key_states, value_states, self._seen - 1) if ranked else None
        self._ragged.append(self._table, self._held, self._chunks, key_states, value_states, scores, self._seen)
        return key_states, value_states

    def attend(self, query: Tensor, form: Mapping[str, Any]) -> Tensor:
        """Attend with one token's queries [B, H, D] to all pairs, the new one included, and evict: [B, H, D]."""
        output = self._ragged.attend(query, self._table, self._held, self._chunks, **form, extra=1)
        if self._evicts:
            spec = self._layer.spec
            ends = {"first": spec.protect_first, "last": spec.protect_last}
            self._ragged.evict(self._table, self._held, self._kept, self._chunks, self._seen, **ends, extra=1)
        return output

    def give_back(self, steps: int) -> None:
        """Have the layer know of the steps that were taken."""
        self._layer.note_steps(steps)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: it has begun."""

    def get_seq_length(self) -> int:
        """Number of tokens seen before the graph: positions are given."""
        return self._layer.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask that is not looked at."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Maximal length: -1, there is none."""
        return -1


class _GraphCache(TracedCache):
    """The layers of a graph as a transformers cache."""

    def __init__(self, layers: list[_GraphLayer]) -> None:
        super().__init__(layers=layers)


def _checked(cache: CompressedCache) -> list[_GraphLayer]:
    layers = []
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, CompressedLayer):
            raise UnsupportedModelError(
                f"Layer {i} does not compress ({type(layer).__name__}). Decode without a graph."
            )
        layer.check_steady()
        if not kernels.enabled(layer.device):
            raise RuntimeError(f"A DecodingGraph runs Triton kernels, which are off for the device {layer.device}.")
        layers.append(_GraphLayer(layer))
    return layers
