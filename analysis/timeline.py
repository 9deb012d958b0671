"""Timeline of a generation: when each kv head evicted each token, what the token had received, and what it cost.

A sample is run as `evaluate` runs it: its context is read and compressed once, its question and its continuation run
over what is left, and the cache goes on evicting. Meanwhile each head's attention is added up, never kept query by
query: memory grows with heads times tokens. `what_if` measures the same continuation with chosen tokens pinned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import exp
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from analysis import records
from analysis.errors import ModelError, SettingsError, TextError
from analysis.evaluation.prompts import prompt_tokens
from analysis.evaluation.run import measure
from analysis.evaluation.task import Sample
from analysis.models.digest import digest_of
from analysis.models.load import LoadedModel
from analysis.preview import end_tokens, prepared
from analysis.progress import Progress, unheard
from analysis.recorder import check_length
from analysis.texts.tokens import Tokens, check_text, tokenize
from l2kv import CompressedCache, CompressionSpec
from l2kv.decoding import prefill
from l2kv.layer import CompressedLayer

LAST_QUERIES = 32
"""Queries at the end of the context whose attention counts."""
MOST_ROWS = 64
"""Rows of `Timeline.attention`: neighbouring steps of a longer generation share one."""
CONTEXT, COMPRESSED, QUESTION = range(3)
"""The first steps: the context is read, then compressed, then the question is read. Each further one reads a token."""


@records.record("timeline", version=1, title="a recorded generation")
@dataclass(frozen=True, eq=False)
class Timeline:
    """A generation over a compressed cache. K kv heads, T tokens (N of them predicted), S steps, R rows of steps.

    The tokens are those of the context, of the question and of the continuation; heads are those of layers that may
    evict. A step is what happens between two evictions: see `CONTEXT`.
    """

    model: str  # its name
    weights: str  # digest of weights and vocabulary
    device: str
    dtype: str  # that it was computed and cached in
    spec: CompressionSpec
    n_context: int
    n_question: int
    given: bool  # the continuation was given; else it is what the model wrote
    labels: tuple[str, ...]  # T, what to call each token
    layers: tuple[int, ...]  # K, the layer of each head
    heads: tuple[int, ...]  # K, its number there
    steps_per_row: int  # steps that share a row of `attention`, whose first begins with the step `COMPRESSED`
    token_ids: Annotated[np.ndarray, "int64 T"]
    seen: Annotated[np.ndarray, "int32 S"]  # number of tokens read, at each step
    evicted: Annotated[np.ndarray, "int32 K T"]  # step from which on the head does not hold it; 0: never evicted
    received: Annotated[
        np.ndarray, "float32 K T"
    ]  # attention by step, added up while it was held; see `mean_attention`
    attention: Annotated[np.ndarray, "float32 R T"]  # the same by step, mean over all heads, pooled over steps
    nats: Annotated[np.ndarray, "float32 N"]  # NLL of each token of the continuation

    def __post_init__(self) -> None:
        records.check_shapes(self)
        kinds, length, steps = self.evicted.shape[0], len(self.token_ids), len(self.seen)
        continued = length - self.n_context - self.n_question
        if min(self.n_context, self.n_question, continued, kinds) < 1 or len(self.nats) != continued:
            raise ValueError(f"there is no generation of {length} tokens after {self.n_context} + {self.n_question}")
        if len(self.labels) != length or {len(self.layers), len(self.heads)} != {kinds}:
            raise ValueError(f"labels, layers or heads do not fit {length} tokens in {kinds} heads")
        read = [self.n_context] * 2 + [self.n_context + self.n_question + i for i in range(continued + 1)]
        if self.seen.tolist() != read or len(self.attention) != -(-(steps - 1) // max(self.steps_per_row, 1)):
            raise ValueError("its steps are not those of such a generation")
        if ((self.evicted != 0) & ((self.evicted < np.maximum(self.arrived, 1)) | (self.evicted >= steps))).any():
            raise ValueError("a token cannot be evicted before it is read, or after the end")
        if not (all(np.isfinite(a).all() and (a >= 0).all() for a in (self.received, self.attention))):
            raise ValueError("attention must be finite and not negative")

    @property
    def n_heads(self) -> int:
        """Number of kv heads that may evict, K."""
        return len(self.heads)

    @cached_property
    def arrived(self) -> np.ndarray:
        """Step at which each token is read, int64 [T]: 0 in the context."""
        arrived = np.searchsorted(self.seen, np.arange(len(self.labels)), side="right")
        return np.where(np.arange(len(self.labels)) < self.n_context, CONTEXT, arrived)

    def held(self, step: int) -> np.ndarray:
        """Number of heads that hold each token at a step, int64 [T]; 0 for what is not read yet."""
        holding = ((self.evicted == 0) | (self.evicted > step)).sum(axis=0)
        return np.where(self.arrived <= step, holding, 0)

    @cached_property
    def evictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All evictions, by step: (step, token, number of heads that evict it there), int64 each."""
        _, token = np.nonzero(self.evicted)
        both = np.stack([self.evicted[self.evicted != 0], token])
        (step, token), heads = np.unique(both, axis=1, return_counts=True)
        return step, token, heads

    @cached_property
    def mean_attention(self) -> np.ndarray:
        """Mean attention that each head paid to each token per step while it held it, float64 [K, T].

        A step's attention is the mean over its queries (of the context: the last `LAST_QUERIES`) and over the query
        heads that share the kv head, without a token's attention to itself.
        """
        last = np.where(self.evicted == 0, len(self.seen) - 1, self.evicted)  # it is attended to, and then evicted
        steps = last - np.maximum(self.arrived, COMPRESSED) + 1
        return self.received / np.maximum(steps, 1)

    def missed(self, most: int = 10) -> np.ndarray:
        """Positions of evicted tokens that had received most attention in the heads that evicted them, int64 [<= most].

        A cheap shortlist of the tokens that may have mattered: what evicting them cost is not measured here.
        """
        lost = np.where(self.evicted != 0, self.mean_attention, 0.0).sum(axis=0)
        order = np.argsort(-lost, kind="stable")[:most]
        return order[lost[order] > 0]

    @property
    def sample(self) -> Sample:
        """The sample as `evaluate` takes it, with the continuation as its target."""
        context, question, target = np.split(self.token_ids, [self.n_context, self.n_context + self.n_question])
        return Sample("recorded", context, question, target)


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The continuation's NLL with tokens pinned, and without, in nats."""

    pinned: tuple[int, ...]
    with_them: tuple[float, ...]
    without: tuple[float, ...]
    pairs: int
    """Number of pairs more that are held in the end: the heads that had evicted them."""

    @property
    def change(self) -> float:
        """Change of the mean NLL, in nats/token; below 0 the continuation is likelier with them."""
        return float(np.mean(self.with_them) - np.mean(self.without))

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity with them, over that without."""
        return exp(self.change)


def text_sample(
    loaded: LoadedModel, prompt: str, *, continuation: str = "", new_tokens: int = 48, chat: bool = False
) -> Sample:
    """Make a sample of a prompt, all but whose last token is the context.

    Args:
        continuation: text to predict; where there is none the model writes up to `new_tokens`.
        chat: put the prompt as a user's question, by the chat template.

    Raises:
        TextError: a text is empty or invalid, or the tokenizer has no chat template.
        SettingsError: `new_tokens` is below 1.
    """
    if new_tokens < 1:
        raise SettingsError(f"new_tokens must be 1 or more, got {new_tokens}")
    ids, target = prompt_tokens(loaded.tokenizer, prompt, chat=chat).ids, np.zeros(0, np.int64)
    if continuation:
        check_text(continuation)
        encoded = loaded.tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        target = np.asarray(encoded, dtype=np.int64)
    return Sample("recorded", ids[:-1], ids[-1:], target, new_tokens=new_tokens)


@torch.inference_mode()
def record_timeline(
    loaded: LoadedModel, sample: Sample, spec: CompressionSpec, *, progress: Progress = unheard
) -> Timeline:
    """Run a sample over a compressed cache and record what its heads evict.

    Args:
        sample: as from `text_sample`, or of a task. Where it has no target, the model writes up to `new_tokens`.
        spec: what to keep.
        progress: counts layers while the context is read, then tokens.

    Raises:
        TextError, OutOfMemoryError, ModelError: as `analysis.preview.stream`.
        SpecError: the spec does not fit the model.
    """
    if not len(sample.context):
        raise TextError("A generation is recorded from a context on that is compressed. Give a longer prompt.")
    given = np.concatenate([sample.context, sample.question, sample.target])
    n_prompt, written = len(sample.context) + len(sample.question), len(sample.target) or sample.new_tokens
    check_length(
        loaded, Tokens(given, np.zeros((len(given), 2), np.int32), ()), new_tokens=n_prompt + written - len(given)
    )
    context, question = (torch.from_numpy(ids)[None].to(loaded.device) for ids in (sample.context, sample.question))
    tokens, nats, ends = list[int](), list[float](), end_tokens(loaded)
    with prepared(loaded):
        cache = CompressedCache(loaded.config, spec, special_ids=loaded.special_ids(spec))
        recorder = _Recorder(cache, n_prompt + written, steps=written + 3, progress=progress)
        prefill(loaded.model, context, cache)
        recorder.end_step()
        fed = question
        for i in range(written):
            logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[0, -1].float()
            recorder.end_step()
            progress(i, written, "tokens")
            tokens.append(int(sample.target[i]) if len(sample.target) else int(logits.argmax()))
            nats.append(
                float(torch.nn.functional.cross_entropy(logits, logits.new_tensor(tokens[-1], dtype=torch.long)))
            )
            fed = fed.new_tensor([[tokens[-1]]])
            if not len(sample.target) and tokens[-1] in ends:
                break
        loaded.model.base_model(fed, past_key_values=cache, use_cache=True)
        recorder.end_step()
    progress(written, written, "tokens")
    ids = np.concatenate([sample.context, sample.question, np.array(tokens, np.int64)])
    return Timeline(
        model=loaded.name,
        weights=digest_of(loaded),
        device=str(loaded.device),
        dtype=loaded.dtype,
        spec=spec,
        n_context=len(sample.context),
        n_question=len(sample.question),
        given=len(sample.target) > 0,
        labels=_labels(loaded, ids),
        token_ids=ids,
        nats=np.array(nats, np.float32),
        **recorder.results(len(ids)),
    )


def what_if(
    loaded: LoadedModel, timeline: Timeline, choices: Sequence[Collection[int]], *, progress: Progress = unheard
) -> tuple[WhatIf, ...]:
    """Measure the recorded continuation with tokens pinned: for each choice of positions, against none of them.

    The context is read once for all of them. It is `evaluate` with specs that differ in `CompressionSpec.pinned`.

    Raises:
        ModelError: the generation was recorded with other weights.
        SettingsError: a choice is empty, or names what is no token of the context or of the continuation.
    """
    if digest_of(loaded) != timeline.weights:
        raise ModelError(
            f"{loaded.name} is not the model with which this was recorded, {timeline.model}. Load that one."
        )
    most = len(timeline.labels) - 1
    for positions in choices:
        if not positions or not all(0 <= position <= most for position in positions):
            raise SettingsError(f"choose one or more of the tokens 0 to {most} to pin, got {sorted(positions)}")
    specs = [replace(timeline.spec, pinned=(*timeline.spec.pinned, *positions)) for positions in choices]
    methods = {"without": timeline.spec} | {str(i): spec for i, spec in enumerate(specs)}
    without, *rows = measure(loaded, [timeline.sample], methods, progress=progress)
    gone = timeline.evicted != 0
    return tuple(
        WhatIf(
            pinned=tuple(sorted(positions)),
            with_them=_known(row.nats),
            without=_known(without.nats),
            pairs=int(gone[:, sorted(set(positions))].sum()),
        )
        for positions, row in zip(choices, rows, strict=True)
    )


def _known(nats: Sequence[float | None]) -> tuple[float, ...]:
    """NLLs, NaN where they are undefined."""
    return tuple(float("nan") if one is None else one for one in nats)


def _labels(loaded: LoadedModel, ids: np.ndarray) -> tuple[str, ...]:
    """Labels as those of a text's tokens, if the text of these tokens is tokenized so; else of each token alone."""
    again = tokenize(loaded.tokenizer, str(loaded.tokenizer.decode(ids)))
    if np.array_equal(again.ids, ids):
        return again.labels
    return tuple(str(loaded.tokenizer.decode([one])) for one in ids.tolist())


class _Recorder:
    """Recorder of evictions and attention, step by step, while a model runs over a compressed cache."""

    def __init__(self, cache: CompressedCache, n_tokens: int, *, steps: int, progress: Progress) -> None:
        self._cache, self._n_tokens, self._progress = cache, n_tokens, progress
        self._layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)}
        self._seen, self._looked = [0], 0
        self.steps_per_row = -(-(steps - 1) // MOST_ROWS)
        self._received, self._last_held = dict[int, Tensor](), dict[int, Tensor]()  # by layer, [Hkv, T]
        self._attention: list[Tensor] = []  # by row, [T]: summed over heads and steps
        for i, layer in self._layers.items():
            layer.observer = partial(self._look, i, layer)

    def _look(self, i: int, layer: CompressedLayer, query: Tensor, options: Mapping[str, Any]) -> None:
        """Add the attention of the latest queries [1, H, q, D] to what each pair received."""
        step = len(self._seen)  # the one under way
        if i not in self._received:
            self._received[i] = query.new_zeros(layer.n_heads, self._n_tokens, dtype=torch.float32)
            self._last_held[i] = torch.zeros_like(self._received[i], dtype=torch.int32)
        row = (step - COMPRESSED) // self.steps_per_row
        if row == len(self._attention):
            self._attention.append(query.new_zeros(self._n_tokens, dtype=torch.float32))
        query = query[:, :, -LAST_QUERIES:] if step == COMPRESSED else query
        own = torch.arange(layer.seen - query.shape[2], layer.seen, device=query.device)[:, None]
        for part, of_part in zip(layer.parts(), layer.positions(), strict=True):
            paid = layer.attention(part, query, 0, of_part, options)[0].mean(dim=1)  # [h, q, held]
            positions = of_part[0]
            paid = paid.masked_fill(positions[:, None] == own, 0.0).mean(dim=1)
            self._received[i][list(part.heads)] += torch.zeros_like(self._received[i][list(part.heads)]).scatter_(
                1, positions, paid
            )
            self._attention[row].scatter_add_(0, positions.flatten(), paid.flatten().to(self._attention[row].device))
        self._looked += 1
        if step == COMPRESSED:
            self._progress(self._looked, len(self._layers), "layers")

    def end_step(self) -> None:
        """Take down what is held after a forward pass."""
        for i, last in self._last_held.items():
            for head, positions in zip(last, self._cache.kept_positions(i), strict=True):
                head[positions[0]] = len(self._seen)
        self._seen.append(next(iter(self._layers.values())).seen)

    def results(self, n_tokens: int) -> dict[str, Any]:
        """Arrays of a `Timeline` of `n_tokens`, and which heads and steps their rows are."""
        steps = len(self._seen)
        seen = np.array(self._seen, np.int32)
        seen[CONTEXT] = seen[COMPRESSED]
        last = np.concatenate([of_layer.cpu().numpy() for of_layer in self._last_held.values()])[:, :n_tokens]
        received = np.concatenate([of_layer.cpu().numpy() for of_layer in self._received.values()])[:, :n_tokens]
        arrived = np.searchsorted(seen, np.arange(n_tokens), side="right")  # of the context 0
        gone = np.maximum(last + 1, np.maximum(arrived, COMPRESSED))
        in_row = np.bincount(np.arange(steps - 1) // self.steps_per_row)
        attention = torch.stack(self._attention).cpu().numpy()[:, :n_tokens] / (in_row[:, None] * len(last))
        return {
            "seen": seen,
            "steps_per_row": self.steps_per_row,
            "layers": tuple(i for i, of_layer in self._last_held.items() for _ in of_layer),
            "heads": tuple(head for of_layer in self._last_held.values() for head in range(len(of_layer))),
            "evicted": np.where(last == steps - 1, 0, gone).astype(np.int32),
            "received": received,
            "attention": attention.astype(np.float32),
        }
