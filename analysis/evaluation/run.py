"""The one driver of tasks: every sample by every method, with one pass over a context for all methods.

The context is run once into a full cache, which records the attention that policies need, and is compressed for each
method from there. The question, and what is predicted or generated after it, runs over what is left, for all methods as
one batch, and the caches go on evicting. Rows are written as they come (`analysis.evaluation.log`), and those of a file
not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from analysis.errors import SettingsError, TextError
from analysis.evaluation import batches
from analysis.evaluation.batches import Cells, cells_of
from analysis.evaluation.log import Log, digest_of_samples
from analysis.evaluation.results import LIVE, ONCE, Methods, Results, Row, Run
from analysis.evaluation.settings import check_settings
from analysis.evaluation.task import Sample, Scoring, Task
from analysis.evaluation.tasks import TASKS
from analysis.models.digest import digest_of
from analysis.models.load import LoadedModel
from analysis.preview import end_tokens, prepared, watched, whole_characters
from analysis.progress import Progress, unheard
from analysis.recorder import check_length, check_positions
from analysis.texts.excerpts import Texts, excerpts_from
from analysis.texts.tokens import Tokens
from l2kv import CompressedCache, CompressionSpec
from l2kv.cache import cache_nbytes
from l2kv.decoding import decode_one_token, prefill
from l2kv.together import CachesTogether, can_run_together


def evaluate(
    loaded: LoadedModel,
    task: str,
    methods: Methods,
    *,
    texts: Texts | None = None,
    settings: object = None,
    out: str | Path | None = None,
    workers: Workers | None = None,
    notes: Sequence[str] = (),
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
        workers: what runs the model, such as those of `ray_workers`; by default this process. With others, `loaded` may
            be without weights (`models.load.outline`).
        notes: what is to be known of the methods, kept with the results.
        progress: counts samples times distinct specs ("scores"), and is called at every layer of each pass.

    Raises:
        SettingsError, SpecError: the task is unknown, a setting is out of range, or a spec does not fit the model.
        TextError: texts are missing, empty, too short, or more than the model can take.
        RecordError: `out` belongs to another evaluation, or cannot be written.
        ModelError, OutOfMemoryError: as `stream`.
    """
    what, workers = TASKS.find(task), workers or Here(loaded)
    machine = workers.machine
    samples, settings, warnings = samples_of(loaded, task, texts=texts, settings=settings)
    about: dict[str, Any] = {
        "model": loaded.name,
        "weights": machine.weights,
        "task": task,
        "settings": msgspec.json.decode(msgspec.json.encode(settings)),  # as in a file
        "methods": dict(methods),
        "run": _run(machine, what, samples, methods),
        "notes": (*notes, *warnings),
    }
    log = Log(out, about)
    rows = measure(loaded, samples, methods, scoring=what.scoring, log=log, workers=workers, progress=progress)
    return Results(rows=rows, **{**about, "run": log.run})


def samples_of(
    loaded: LoadedModel, task: str, *, texts: Texts | None = None, settings: object = None
) -> tuple[tuple[Sample, ...], object, tuple[str, ...]]:
    """Make the samples of a task; return them, the settings they were made with, and warnings. Raises as `evaluate`."""
    what = TASKS.find(task)
    settings = what.settings() if settings is None else settings
    if not isinstance(settings, what.settings):
        raise SettingsError(f"settings of the task {task} must be {what.settings.__name__}, got {settings!r:.60}")
    check_settings(settings)
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


def check_request(loaded: LoadedModel, task: str, *, texts: Texts | None = None, settings: Any) -> tuple[str, ...]:
    """Check settings as `evaluate` would, by a few short samples and the greatest length, and return warnings.

    Args:
        loaded: may be without weights.

    Raises:
        As `evaluate`.
    """
    check_settings(settings)
    notes = check_positions(loaded, max(getattr(settings, "lengths", ()), default=1), new_tokens=1)
    few = TASKS.find(task).sketch(settings, loaded.positions)
    warnings = samples_of(loaded, task, texts=texts, settings=few)[2]
    return tuple(notes) or warnings


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


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs a model, as far as scores depend on it."""

    weights: str
    """Digest of the model (`analysis.models.digest`)."""
    threads: int
    device: str
    dtype: str
    packages: Mapping[str, str]
    """Versions of l2kv, torch and transformers."""

    @classmethod
    def of(cls, loaded: LoadedModel) -> Machine:
        """This process, with a model."""
        packages = {name: _version_of(name) for name in ("l2kv", "torch", "transformers")}
        return cls(digest_of(loaded), torch.get_num_threads(), _name_of(loaded.device), loaded.dtype, packages)


class Workers(Protocol):
    """What runs batches, here or elsewhere."""

    @property
    def machine(self) -> Machine:
        """What each of them computes with."""

    def run(
        self, passes: Sequence[Sequence[Cells]], scoring: Scoring | None, tick: Callable[[], object]
    ) -> Generator[tuple[Cells, Sequence[Row]], None, None]:
        """Run batches, and yield each with its rows, whose methods are not set; `tick` is called meanwhile.

        Args:
            passes: batches whose contexts are read in one pass, for each pass.
            scoring: as for `measure`.
        """


@dataclass(frozen=True, slots=True)
class Here:
    """This process as the only worker."""

    loaded: LoadedModel

    @property
    def machine(self) -> Machine:
        """This process, with the model."""
        return Machine.of(self.loaded)

    @torch.inference_mode()  # as a decorator it is on only while this runs, not between its steps
    def run(
        self, passes: Sequence[Sequence[Cells]], scoring: Scoring | None, tick: Callable[[], object]
    ) -> Generator[tuple[Cells, Sequence[Row]], None, None]:
        """As `Workers.run`, on a prepared model."""
        for of_pass in passes:
            yield from run_cells(self.loaded, of_pass, scoring, tick)


def _run(machine: Machine, task: Task, samples: Sequence[Sample], methods: Methods) -> Run:
    return Run(
        samples=len(samples),
        digest=digest_of_samples(samples),
        task_version=task.version,
        tokens_at_once=batches.TOKENS_AT_ONCE,
        together=(tuple(methods),),
        threads=machine.threads,
        device=machine.device,
        dtype=machine.dtype,
        packages=machine.packages,
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


def measure(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    methods: Methods,
    *,
    scoring: Scoring | None = None,
    log: Log | None = None,
    workers: Workers | None = None,
    progress: Progress = unheard,
) -> tuple[Row, ...]:
    """Score samples with each method, and return the rows method by method; equal specs are run once.

    Args:
        scoring: how to score answers; samples with a target need none.
        log: rows that are known, and where to write others.
        workers: as for `evaluate`.

    Raises:
        As `evaluate`, and SettingsError if two samples have the same name.
    """
    _checked(loaded, samples)
    assert scoring or all(len(sample.target) for sample in samples), "answers need a scoring"
    wanted = tuple(dict.fromkeys(methods.values()))
    found: dict[tuple[str, CompressionSpec | None], Row] = {}
    total = len(samples) * len(wanted)

    def keep(cells: Cells, rows: Sequence[Row]) -> None:
        of_cells = zip(cells.rows(), rows, strict=True)
        found.update({(sample.name, spec): row for (spec, sample), row in of_cells if spec in wanted})
        tick()

    def tick() -> None:
        progress(len(found), total, "scores")

    workers = workers or Here(loaded)
    with prepared(loaded):
        todo: list[list[Cells]] = []
        for specs in log.together if log else [wanted]:
            for of_pass in cells_of(loaded, samples, specs):
                todo.append([])
                for cells in of_pass:
                    if log and (known := log.find(cells)):
                        keep(cells, log.add(cells, known))  # a method may be new whose spec is known
                    elif set(cells.specs) & set(wanted):
                        todo[-1].append(cells)
        left = [of_pass for of_pass in todo if of_pass]
        with closing(workers.run(left, scoring, tick)) as runs:
            for cells, rows in runs:
                keep(cells, log.add(cells, rows) if log else rows)
    return tuple(replace(found[sample.name, spec], method=name) for name, spec in methods.items() for sample in samples)


def run_cells(
    loaded: LoadedModel, of_pass: Sequence[Cells], scoring: Scoring | None, tick: Callable[[], object] = lambda: None
) -> Iterator[tuple[Cells, list[Row]]]:
    """Run batches of the same samples, on a prepared model; `tick` is called at every layer of every pass.

    Yields each batch with its rows, whose methods are not set.
    """
    with watched(loaded, 1, lambda *_: tick()):
        compressed = prefilled(loaded, of_pass) if of_pass else None
        for i, cells in enumerate(of_pass):
            assert compressed is not None
            caches = []
            for spec in cells.specs:
                tick()
                caches.append(compressed(spec))
            if i == len(of_pass) - 1:
                compressed = None  # and with it the full cache
            yield cells, _answered(loaded, cells, caches, scoring) if scoring else _predicted(loaded, cells, caches)


def prefilled(loaded: LoadedModel, of_pass: Sequence[Cells]) -> Callable[[CompressionSpec | None], CompressedCache]:
    """Run the contexts of samples in one pass, and return what makes a cache that holds them by a spec."""
    context = _ids(loaded, [sample.context for sample in of_pass[0].samples])
    full = CompressedCache.recording(loaded.config, [spec for cells in of_pass for spec in cells.specs if spec])
    if context.shape[1]:
        prefill(loaded.model, context, full)

    def compressed(spec: CompressionSpec | None) -> CompressedCache:
        whole, special_ids = spec or CompressionSpec(keep_ratio=1.0), loaded.special_ids(spec)
        if not context.shape[1]:
            return CompressedCache(loaded.config, whole, special_ids=special_ids)
        return CompressedCache.from_full(full, loaded.config, whole, input_ids=context, special_ids=special_ids)

    return compressed


def _ids(loaded: LoadedModel, ids: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(ids)).to(loaded.device)


def joined(loaded: LoadedModel, cells: Cells, caches: Sequence[CompressedCache]) -> Cache:
    """Join caches into one; a cache whose rows cannot be handed out is alone."""
    if not can_run_together(loaded.config):
        (cache,) = caches
        return cache
    return CachesTogether(caches, [len(cells.samples)] * len(caches))


def _sizes(cells: Cells, caches: Sequence[CompressedCache]) -> list[tuple[int, int]]:
    """Bytes that each row holds, and that are allocated for it."""
    rows = len(cells.samples)
    of_specs = [(cache_nbytes(cache, slack=False) // rows, cache_nbytes(cache) // rows) for cache in caches]
    return [sizes for sizes in of_specs for _ in cells.samples]


def _predicted(loaded: LoadedModel, cells: Cells, caches: Sequence[CompressedCache]) -> list[Row]:
    """The NLL of each row's target, fed token by token."""
    times, once = len(cells.specs), len(cells.samples[0].context) > 0
    target = _ids(loaded, [sample.target for sample in cells.samples]).repeat(times, 1)
    fed = _ids(loaded, [sample.question for sample in cells.samples]).repeat(times, 1)
    nats = target.new_zeros(target.shape, dtype=torch.float64)
    hits = target.new_zeros(target.shape)
    cache, sizes = joined(loaded, cells, caches), None
    for i, token in enumerate(target.unbind(dim=1)):
        logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[:, -1]
        sizes = sizes if sizes and once else _sizes(cells, caches)  # after the prompt; after all tokens without one
        nats[:, i] = torch.nn.functional.cross_entropy(logits.float(), token, reduction="none")
        hits[:, i] = logits.argmax(-1) == token
        fed = token[:, None]
    assert sizes is not None, "a target has tokens"
    columns = zip(cells.rows(), sizes, nats.mean(dim=1).tolist(), nats.tolist(), hits.tolist(), strict=True)
    return [
        replace(
            _row(sample, spec, its_sizes, len(sample.target)),
            score=_finite(mean),
            nats=tuple(None if (one := _finite(nll)) is None else round(one, 5) for nll in of_tokens),
            hits=tuple(of_hits),
        )
        for (spec, sample), its_sizes, mean, of_tokens, of_hits in columns
    ]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _row(sample: Sample, spec: CompressionSpec | None, sizes: tuple[int, int], said: int) -> Row:
    """Make the row of a sample with so many predicted or generated tokens; its method and score are set later."""
    return Row(
        "",
        sample.name,
        None,
        *sizes,
        document=sample.document,
        at=dict(sample.at),
        compressed="" if spec is None else ONCE if len(sample.context) else LIVE,
        context=len(sample.context),
        decoded=len(sample.question) + said - 1,
    )


def _answered(loaded: LoadedModel, cells: Cells, caches: Sequence[CompressedCache], scoring: Scoring) -> list[Row]:
    """Score greedy answers; a row ends, and leaves the batch, where the model ends it or its score is decided."""
    token = _ids(loaded, [sample.question for sample in cells.samples]).repeat(len(cells.specs), 1)
    cache, ends, asked = joined(loaded, cells, caches), end_tokens(loaded), list(cells.rows())
    sizes: list[tuple[int, int]] = []
    said: list[list[int]] = [[] for _ in asked]
    rows: dict[int, Row] = {}
    going = list(range(len(asked)))  # of the batch
    while len(rows) < len(asked):
        token = decode_one_token(loaded.model, token, cache)
        sizes = sizes or _sizes(cells, caches)  # after the prompt
        for i, latest in zip(going, token[:, 0].tolist(), strict=True):
            if i in rows:
                continue
            spec, sample = asked[i]
            said[i].append(latest)
            shown = said[i][:-1] if latest in ends else said[i]
            text = whole_characters(str(loaded.tokenizer.decode(shown, skip_special_tokens=True)))
            if latest in ends or len(said[i]) >= sample.new_tokens or scoring.decided(sample, text):
                rows[i] = replace(
                    _row(sample, spec, sizes[i], len(said[i])), score=scoring.score(sample, text), text=text
                )
        left = [place for place, i in enumerate(going) if i not in rows]
        if isinstance(cache, CachesTogether) and 0 < len(left) < len(going):
            cache, token, going = cache.only(left), token[left], [going[place] for place in left]
    return [rows[i] for i in range(len(asked))]
