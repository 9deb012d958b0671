"""The one driver of tasks: every sample by every method, with one pass over a context for all methods.

The context is run once into a full cache, and compressed for each method from there; policies that look at attention
need a pass of their own. The question, and what is predicted or generated after it, runs over what is left, and the
cache goes on evicting. Rows are written as they come (`analysis.evaluation.log`), and those of a file not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from analysis.errors import SettingsError, TextError
from analysis.evaluation.log import Log, digest_of_samples
from analysis.evaluation.results import LIVE, ONCE, Methods, Results, Row, Run
from analysis.evaluation.task import Sample, Scoring, Task
from analysis.evaluation.tasks import TASKS
from analysis.models.digest import digest_of
from analysis.models.load import LoadedModel
from analysis.preview import end_tokens, prepared, whole_characters
from analysis.progress import Progress, unheard
from analysis.recorder import check_length
from analysis.texts.excerpts import Texts, excerpts_from
from analysis.texts.tokens import Tokens
from l2kv import CompressedCache, CompressionSpec
from l2kv.cache import cache_nbytes
from l2kv.decoding import decode_one_token, new_cache, prefill
from l2kv.policies import POLICIES


def evaluate(
    loaded: LoadedModel,
    task: str,
    methods: Methods,
    *,
    texts: Texts | None = None,
    settings: object = None,
    out: str | Path | None = None,
    progress: Progress = unheard,
) -> Results:
    """Score a model on a task with each method.

    Args:
        task: name in `TASKS`.
        methods: specs by name; None is the full cache.
        texts: texts to cut samples from, where the task needs them; None is the bundled texts.
        settings: instance of the task's own class, such as `LmSettings`; by default its defaults.
        out: file to write each row to as it is computed, for `records.load(Results, out)`. Rows that it has already are
            not computed again, so a stopped evaluation continues.
        progress: counts samples times distinct specs, and is called at every token.

    Raises:
        SettingsError, SpecError: the task is unknown, a setting is out of range, or a spec does not fit the model.
        TextError: texts are missing, empty, too short, or more than the model can take.
        RecordError: `out` belongs to another evaluation, or cannot be written.
        ModelError, OutOfMemoryError: as `stream`.
    """
    what = TASKS.find(task)
    samples, settings, notes = samples_of(loaded, task, texts=texts, settings=settings)
    about: dict[str, Any] = {
        "model": loaded.name,
        "weights": digest_of(loaded),
        "task": task,
        "settings": msgspec.json.decode(msgspec.json.encode(settings)),  # as in a file
        "methods": dict(methods),
        "run": _run(loaded, what, samples),
        "notes": notes,
    }
    log = Log(out, about)
    return Results(rows=measure(loaded, samples, methods, scoring=what.scoring, log=log, progress=progress), **about)


def samples_of(
    loaded: LoadedModel, task: str, *, texts: Texts | None = None, settings: object = None
) -> tuple[tuple[Sample, ...], object, tuple[str, ...]]:
    """Make the samples of a task; return them, the settings they were made with, and warnings. Raises as `evaluate`."""
    what = TASKS.find(task)
    settings = what.settings() if settings is None else settings
    if not isinstance(settings, what.settings):
        raise SettingsError(f"settings of the task {task} must be {what.settings.__name__}, got {settings!r:.60}")
    notes, asked = [], settings
    if texts is None and what.bundled:
        settings, given = what.bundled(loaded, settings)
        if settings != asked:
            notes.append(f"The bundled texts are short, so lengths were cut to {settings}.")
    else:
        given = excerpts_from(texts or ())
    if what.texts == "must" and not given:
        raise TextError(f"There are no texts, and the task {task} measures on texts. Give some.")
    if what.texts == "no" and given:
        raise TextError(f"The task {task} takes no texts, got {len(given)}.")
    samples = tuple(what.build(loaded, settings, given))
    if not samples:
        raise TextError(f"The task {task} has no samples: its settings leave none, {settings}.")
    return samples, settings, (*notes, *_checked(loaded, samples))


def _checked(loaded: LoadedModel, samples: Sequence[Sample]) -> tuple[str, ...]:
    """Distinct warnings about lengths. Raises SettingsError, TextError."""
    if len({sample.name for sample in samples}) < len(samples):
        raise SettingsError("two samples have the same name: give each text its own")
    warnings: dict[str, None] = {}
    for sample in samples:
        ids = np.concatenate([sample.context, sample.question, sample.target])
        tokens = Tokens(ids, np.zeros((len(ids), 2), np.int32), ())
        warnings |= dict.fromkeys(check_length(loaded, tokens, new_tokens=sample.new_tokens))
    return tuple(warnings)


def _run(loaded: LoadedModel, task: Task, samples: Sequence[Sample]) -> Run:
    return Run(
        samples=len(samples),
        digest=digest_of_samples(samples),
        task_version=task.version,
        tokens_at_once=_TOKENS_AT_ONCE,
        threads=torch.get_num_threads(),
        device=_name_of(loaded.device),
        dtype=loaded.dtype,
        packages={name: _version_of(name) for name in ("l2kv", "torch", "transformers")},
    )


def _name_of(device: torch.device) -> str:
    """Name of a device; of a CPU its instruction set, since rounding depends on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that was not installed
        return ""


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    methods: Methods,
    *,
    scoring: Scoring | None = None,
    log: Log | None = None,
    progress: Progress = unheard,
) -> tuple[Row, ...]:
    """Score samples with each method, and return the rows method by method; equal specs are run once.

    Args:
        scoring: how to score answers; samples with a target need none.
        log: rows that are known, and where to write others.

    Raises:
        As `evaluate`, and SettingsError if two samples have the same name.
    """
    _checked(loaded, samples)
    assert scoring or all(len(sample.target) for sample in samples), "answers need a scoring"
    specs = tuple(dict.fromkeys(methods.values()))
    cells: dict[tuple[str, CompressionSpec | None], Row] = {}
    total = len(samples) * len(specs)

    def keep(batch: Sequence[Sample], spec: CompressionSpec | None, rows: Sequence[Row]) -> None:
        if log:
            rows = log.add(batch, spec, rows)
        for sample, row in zip(batch, rows, strict=True):
            cells[sample.name, spec] = row
            progress(len(cells), total, "samples")

    with prepared(loaded):
        for batch in batches(samples):
            known = {spec: rows for spec in specs if log and (rows := log.find(batch, spec))}
            for spec in known:
                keep(batch, spec, known[spec])
            missing = [spec for spec in specs if spec not in known]
            for spec, cache in _caches_after(loaded, _rows(loaded, [sample.context for sample in batch]), missing):
                tick = partial(progress, len(cells), total, "samples")
                found = (
                    _answered(loaded, batch, cache, scoring, tick)
                    if scoring
                    else _predicted(loaded, batch, cache, tick)
                )
                del cache  # before the next is made
                when = "" if spec is None else ONCE if len(batch[0].context) else LIVE
                keep(batch, spec, [replace(row, compressed=when) for row in found])
    return tuple(replace(cells[sample.name, spec], method=name) for name, spec in methods.items() for sample in samples)


_TOKENS_AT_ONCE = 8192  # in the rows of a batch; of a model of 7 billion weights their full cache takes 4 GiB


def batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Neighbours of equal lengths, which are the rows of a batch."""
    for lengths, alike in groupby(samples, lambda one: (len(one.target), len(one.context), len(one.question))):
        group, rows = list(alike), max(1, _TOKENS_AT_ONCE // sum(lengths))
        yield from (group[start : start + rows] for start in range(0, len(group), rows))


def _rows(loaded: LoadedModel, ids: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(ids)).to(loaded.device)


def _caches_after(
    loaded: LoadedModel, context: Tensor, specs: Iterable[CompressionSpec | None]
) -> Iterator[tuple[CompressionSpec | None, Cache]]:
    """Each spec, and a cache that holds the context [B, C] by it. The full cache comes last, which saves a copy."""
    full = None
    for spec in sorted(specs, key=lambda spec: spec is None):
        if not context.shape[1]:
            yield spec, new_cache(loaded.config, spec, special_ids=loaded.special_ids(spec))
            continue
        if spec is not None and (spec.needs_queries or POLICIES[spec.policy].needs_filters):
            own = new_cache(loaded.config, spec, special_ids=loaded.special_ids(spec))
            yield spec, _filled(loaded, context, own)
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


def _predicted(loaded: LoadedModel, batch: Sequence[Sample], cache: Cache, tick: Callable[[], object]) -> list[Row]:
    """The NLL of each row's target, fed token by token; `tick` is called before each."""
    target = _rows(loaded, [sample.target for sample in batch])
    fed = _rows(loaded, [sample.question for sample in batch])
    nats = target.new_zeros(target.shape, dtype=torch.float64)
    hits = target.new_zeros(target.shape)
    for i, token in enumerate(target.unbind(dim=1)):
        tick()
        logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[:, -1]
        nats[:, i] = torch.nn.functional.cross_entropy(logits.float(), token, reduction="none")
        hits[:, i] = logits.argmax(-1) == token
        fed = token[:, None]
    nbytes = cache_nbytes(cache, slack=False) // len(batch)
    return [
        replace(
            _row(sample, nbytes, len(sample.target)),
            score=_finite(mean),
            nats=tuple(None if (one := _finite(nll)) is None else round(one, 5) for nll in of_tokens),
            hits=tuple(of_hits),
        )
        for sample, mean, of_tokens, of_hits in zip(
            batch, nats.mean(dim=1).tolist(), nats.tolist(), hits.tolist(), strict=True
        )
    ]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _row(sample: Sample, nbytes: int, said: int) -> Row:
    """Make the row of a sample with so many predicted or generated tokens; its method and score are set later."""
    return Row(
        "",
        sample.name,
        None,
        nbytes,
        document=sample.document,
        at=dict(sample.at),
        context=len(sample.context),
        decoded=len(sample.question) + said - 1,
    )


def _answered(
    loaded: LoadedModel, batch: Sequence[Sample], cache: Cache, scoring: Scoring, tick: Callable[[], object]
) -> list[Row]:
    """Score the greedy answer of each sample, which ends where the model ends it or its score is decided.

    Rows that have ended keep running with the others, and their further tokens are ignored.
    """
    token, ends = _rows(loaded, [sample.question for sample in batch]), end_tokens(loaded)
    said: list[list[int]] = [[] for _ in batch]
    rows: dict[int, Row] = {}
    nbytes = 0
    while len(rows) < len(batch):
        tick()
        token = decode_one_token(loaded.model, token, cache)
        nbytes = nbytes or cache_nbytes(cache, slack=False) // len(batch)  # after the question
        for i, (sample, latest) in enumerate(zip(batch, token[:, 0].tolist(), strict=True)):
            if i in rows:
                continue
            said[i].append(latest)
            shown = said[i][:-1] if latest in ends else said[i]
            text = whole_characters(str(loaded.tokenizer.decode(shown, skip_special_tokens=True)))
            if latest in ends or len(said[i]) >= sample.new_tokens or scoring.decided(sample, text):
                row = _row(sample, nbytes, len(said[i]))
                rows[i] = replace(row, score=scoring.score(sample, text), text=text)
    return [rows[i] for i in range(len(batch))]
