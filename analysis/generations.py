"""A generation recorded as it runs over a compressed cache, and measured again with chosen tokens pinned.

A sample is run as `evaluate` runs it: its context is read and compressed once, its question and its continuation run
over what is left, and the cache goes on evicting. Meanwhile each head's attention is added up, never kept query by
query: memory grows with heads times tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.errors import ModelError, SettingsError, TextError
from analysis.evaluation.batches import cells_of
from analysis.evaluation.prompts import prompt_tokens
from analysis.evaluation.run import measure
from analysis.evaluation.task import Sample
from analysis.models.digest import digest_of
from analysis.models.load import LoadedModel
from analysis.preview import end_tokens, prepared
from analysis.progress import Progress, unheard
from analysis.recorder import check_finite, check_length
from analysis.texts.tokens import Tokens, check_text, tokenize
from analysis.timelines import COMPRESSED, CONTEXT, LAST_QUERIES, MOST_ROWS, Timeline, WhatIf
from analysis.words import duration
from l2kv import CompressedCache, CompressionSpec
from l2kv.decoding import prefill
from l2kv.layer import CompressedLayer


def text_sample(
    loaded: LoadedModel,
    prompt: str,
    *,
    question: str = "",
    continuation: str = "",
    new_tokens: int = 48,
    chat: bool = False,
) -> Sample:
    """Make a sample of texts.

    Args:
        prompt: text whose tokens are the context, but for the last where there is no question.
        question: text that is read once the context is compressed.
        continuation: text to predict; where there is none the model writes up to `new_tokens`.
        chat: put the prompt as a user's question, by the chat template.

    Raises:
        TextError: a text is empty or invalid, or the tokenizer has no chat template.
        SettingsError: `new_tokens` is below 1, or a chat has a second question.
    """
    if new_tokens < 1:
        raise SettingsError(f"new_tokens must be 1 or more, got {new_tokens}")
    if chat and question:
        raise SettingsError("a chat is a question already, so nothing can be asked after it: leave one of them out")
    ids = prompt_tokens(loaded.tokenizer, prompt, chat=chat).ids
    asked = _further(loaded, question)
    context, asked = (ids, asked) if len(asked) else (ids[:-1], ids[-1:])
    return Sample("recorded", context, asked, _further(loaded, continuation), new_tokens=new_tokens)


def _further(loaded: LoadedModel, text: str) -> np.ndarray:
    """Tokens of a text that follows another, int64; none where it is empty. Raises TextError."""
    if not text:
        return np.zeros(0, np.int64)
    check_text(text)
    encoded = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(encoded, dtype=np.int64)


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
    tokens, nats, ends, started = list[int](), list[float](), end_tokens(loaded), time.perf_counter()
    with prepared(loaded):
        cache = CompressedCache(loaded.config, spec, special_ids=loaded.special_ids(spec))
        recorder = _Recorder(cache, n_prompt + written, steps=written + 3, progress=progress)
        prefill(loaded.model, context, cache)
        recorder.end_step()
        compressed = time.perf_counter()
        fed = question
        for i in range(written):
            logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[0, -1].float()
            check_finite(loaded, logits)
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
        context_seconds=compressed - started,
        seconds=time.perf_counter() - compressed,
        labels=_labels(loaded, ids),
        token_ids=ids,
        nats=np.array(nats, np.float32),
        **recorder.results(len(ids)),
    )


def what_if(
    loaded: LoadedModel, timeline: Timeline, choices: Sequence[Iterable[int]], *, progress: Progress = unheard
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
    most, chosen = len(timeline.labels) - 1, [sorted({int(position) for position in choice}) for choice in choices]
    for positions in chosen:
        if not positions or positions[0] < 0 or positions[-1] > most:
            raise SettingsError(f"choose one or more of the tokens 0 to {most} to pin, got {positions}")
    specs = [replace(timeline.spec, pinned=(*timeline.spec.pinned, *positions)) for positions in chosen]
    methods = {"without": timeline.spec} | {str(i): spec for i, spec in enumerate(specs)}
    batches = sum(len(of_pass) for of_pass in cells_of(loaded, [timeline.sample], tuple(methods.values())))
    done, total = 0, batches * len(timeline.nats) + len(methods)  # each token of each batch, then each answer

    def heard(*_: object) -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total, "steps")

    progress(0, 0, f"Reading the context, about {duration(timeline.context_seconds)} …")
    without, *rows = (
        tuple(nll for nll in row.nats if nll is not None)
        for row in measure(loaded, [timeline.sample], methods, progress=heard)
    )
    if any(len(nats) < len(timeline.nats) for nats in (without, *rows)):
        raise ModelError(f"{loaded.name} predicts the continuation with numbers that are undefined.")
    gone = timeline.evicted != 0
    return tuple(
        WhatIf(pinned=tuple(positions), with_them=nats, without=without, pairs=int(gone[:, positions].sum()))
        for positions, nats in zip(chosen, rows, strict=True)
    )


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
