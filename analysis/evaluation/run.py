"""The one driver of tasks: every sample by every method, with one pass over a context for all methods.

The context is run once into a full cache, and compressed for each method from there; policies that look at attention
need a pass of their own. The question, and what is predicted or generated after it, runs over what is left, and the
cache goes on evicting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from analysis.errors import SettingsError, TextError
from analysis.evaluation.results import Methods, Results, Row
from analysis.evaluation.task import Sample, Scoring
from analysis.evaluation.tasks import TASKS
from analysis.models.digest import digest_of
from analysis.models.load import LoadedModel
from analysis.preview import end_tokens, prepared, whole_characters
from analysis.progress import Progress, unheard
from analysis.recorder import check_length
from analysis.texts.excerpts import Excerpt
from analysis.texts.tokens import Tokens
from l2kv import CompressedCache, CompressionSpec
from l2kv.cache import cache_nbytes
from l2kv.decoding import decode_one_token, new_cache, prefill
from l2kv.policies import POLICIES

Texts = Sequence[Excerpt | tuple[str, str]] | Mapping[str, str]
"""Excerpts, (name, text) pairs, or texts by name."""


def evaluate(
    loaded: LoadedModel,
    task: str,
    methods: Methods,
    *,
    texts: Texts = (),
    settings: object = None,
    progress: Progress = unheard,
) -> Results:
    """Score a model on a task with each method.

    Args:
        task: name in `TASKS`.
        methods: specs by name; None is the full cache.
        texts: texts to cut samples from, where the task needs them.
        settings: instance of the task's own class, such as `LmSettings`; by default its defaults.
        progress: counts samples times distinct specs, and is called at every token.

    Raises:
        SettingsError, SpecError: the task is unknown, a setting is out of range, or a spec does not fit the model.
        TextError: texts are missing, empty, too short, or more than the model can take.
        ModelError, OutOfMemoryError: as `stream`.
    """
    what = TASKS.find(task)
    settings = what.settings() if settings is None else settings
    if not isinstance(settings, what.settings):
        raise SettingsError(f"settings of the task {task} must be {what.settings.__name__}, got {settings!r:.60}")
    given = [Excerpt(*text) for text in (texts.items() if isinstance(texts, Mapping) else texts)]
    if what.needs_texts and not given:
        raise TextError(f"There are no texts, and the task {task} measures on texts. Give some.")
    samples = what.build(loaded, settings, given)
    rows = measure(loaded, samples, methods, scoring=what.scoring, progress=progress)
    as_in_a_file = msgspec.json.decode(msgspec.json.encode(settings))
    return Results(loaded.name, digest_of(loaded), task, as_in_a_file, dict(methods), rows)


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    methods: Methods,
    *,
    scoring: Scoring | None = None,
    progress: Progress = unheard,
) -> tuple[Row, ...]:
    """Score samples with each method, and return the rows method by method; equal specs are run once.

    Args:
        scoring: how to score answers; samples with a target need none.

    Raises:
        As `evaluate`, and SettingsError if two samples have the same name.
    """
    if len({sample.name for sample in samples}) < len(samples):
        raise SettingsError("two samples have the same name: give each text its own")
    for sample in samples:
        ids = np.concatenate([sample.context, sample.question, sample.target])
        check_length(loaded, Tokens(ids, np.zeros((len(ids), 2), np.int32), ()), new_tokens=sample.new_tokens)
    assert scoring or all(len(sample.target) for sample in samples), "answers need a scoring"
    specs = tuple(dict.fromkeys(methods.values()))
    cells: dict[tuple[str, CompressionSpec | None], Cell] = {}
    total = len(samples) * len(specs)
    with prepared(loaded):
        for batch in _batches(samples):
            for spec, cache in _caches_after(loaded, _rows(loaded, [sample.context for sample in batch]), specs):
                tick = partial(progress, len(cells), total, "samples")
                found = (
                    [_answered(loaded, batch[0], cache, scoring, tick)]
                    if scoring
                    else _predicted(loaded, batch, cache, tick)
                )
                del cache  # before the next is made
                for sample, cell in zip(batch, found, strict=True):
                    cells[sample.name, spec] = cell
                    progress(len(cells), total, "samples")
    return tuple(
        Row(name, sample.name, *cells[sample.name, spec], document=sample.document, at=dict(sample.at))
        for name, spec in methods.items()
        for sample in samples
    )


_TOKENS_AT_ONCE = 8192  # in the rows of a batch; of a model of 7 billion weights their full cache takes 4 GiB


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Neighbours of equal lengths are the rows of a batch; a sample without a target is alone."""
    for lengths, alike in groupby(samples, lambda one: (len(one.target), len(one.context), len(one.question))):
        group, rows = list(alike), max(1, _TOKENS_AT_ONCE // sum(lengths)) if lengths[0] else 1
        yield from (group[start : start + rows] for start in range(0, len(group), rows))


def _rows(loaded: LoadedModel, ids: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(ids)).to(loaded.device)


def _caches_after(
    loaded: LoadedModel, context: Tensor, specs: Iterable[CompressionSpec | None]
) -> Iterator[tuple[CompressionSpec | None, Cache]]:
    """Each spec, and a cache that holds the context [B, C] by it. The full cache comes last, which saves a copy."""
    full = None
    for spec in sorted(specs, key=lambda spec: spec is None):
        if spec is not None and (POLICIES[spec.policy].needs_attention or POLICIES[spec.policy].needs_filters):
            yield spec, _filled(loaded, context, new_cache(loaded.config, spec))
            continue
        if full is None:
            full = _filled(loaded, context, DynamicCache(config=loaded.config))
        if spec is None:
            yield spec, full
        else:
            special_ids = loaded.special_ids(spec)
            yield spec, CompressedCache.from_full(full, loaded.config, spec, input_ids=context, special_ids=special_ids)


Filled = TypeVar("Filled", bound=Cache)


def _filled(loaded: LoadedModel, context: Tensor, cache: Filled) -> Filled:
    prefill(loaded.model, context, cache)
    return cache


Cell = tuple[float | None, int, str]
"""Score, bytes and generated text of a sample by a spec."""


def _predicted(loaded: LoadedModel, batch: Sequence[Sample], cache: Cache, tick: Callable[[], object]) -> list[Cell]:
    """The mean NLL of each row's target, fed token by token; `tick` is called before each."""
    target = _rows(loaded, [sample.target for sample in batch])
    fed = _rows(loaded, [sample.question for sample in batch])
    nats = target.new_zeros(len(batch), dtype=torch.float64)
    for token in target.unbind(dim=1):
        tick()
        logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[:, -1]
        nats += torch.nn.functional.cross_entropy(logits.float(), token, reduction="none")
        fed = token[:, None]
    nbytes = cache_nbytes(cache, slack=False) // len(batch)
    return [(nll if np.isfinite(nll) else None, nbytes, "") for nll in (nats / target.shape[1]).tolist()]


def _answered(loaded: LoadedModel, sample: Sample, cache: Cache, scoring: Scoring, tick: Callable[[], object]) -> Cell:
    """The score of a greedy answer, which ends where the model ends it or its score is decided."""
    tick()
    token, ends = decode_one_token(loaded.model, _rows(loaded, [sample.question]), cache), end_tokens(loaded)
    nbytes, said = cache_nbytes(cache, slack=False), [int(token)]
    while True:
        ended = said[-1] in ends
        text = whole_characters(str(loaded.tokenizer.decode(said[:-1] if ended else said, skip_special_tokens=True)))
        if ended or len(said) >= sample.new_tokens or scoring.decided(sample, text):
            return scoring.score(sample, text), nbytes, text
        tick()
        token = decode_one_token(loaded.model, token, cache)
        said.append(int(token))
