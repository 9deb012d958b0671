"""One model over 1..N texts: every metric of every head for each text, saved and resumed. Captures are not kept.

Memory holds one capture at a time; the table grows by 3 probes x 12 metrics x L x H numbers and 3 loss curves for each
kv head a text. It is written as texts are done, and however the study ends, to one file, atomically. What the table
says is worked out in `analysis.statistics` and `analysis.verdicts`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from analysis import records
from analysis.captures import Capture
from analysis.defaults import RECENT_WINDOW
from analysis.errors import RecordError, SettingsError, TextError
from analysis.measures import BINS, text_curves
from analysis.metrics import METRICS, PROBES, STATUSES, metrics
from analysis.models.digest import digest_of
from analysis.progress import Progress, unheard
from analysis.statistics import Interval, Means, means, median, nanmean
from analysis.texts.excerpts import Excerpt, Texts, excerpts_from
from analysis.words import counted

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel

MOST_TEXTS = 10_000  # in a study: intervals over more would take more memory than the study itself
AGAIN = "l2kv study TEXTS --out FILE"
"""The command that makes a study."""
_ARRAYS = ("n_tokens", "values", "status", "curves", "curve_status", "curve_gammas")  # a row for each text
_EACH, _PAUSE = 8, 5.0  # so many texts are each written at once; those after them at most every few seconds
_OLD_NAMES = {"gamma_without_sink": "gamma_skip_first", "alr_against_chance": "normalised_alr"}  # until version 3

OnText = Callable[["Study"], None]
"""Called after each text with the study so far: `len(study.names)` of `study.texts` are done. What it raises cancels
the study and passes through; what was done is in the file."""


def _upgrade(version: int, content: records.Content) -> records.Content:
    """Bring the content of version 2 or 3 to this one: metrics by their present names."""
    if version < 2:
        raise ValueError("studies of version 1 cannot be read")
    return content | {"metrics": [_OLD_NAMES.get(name, name) for name in content["metrics"]]}


@records.record("study", version=4, again=AGAIN, upgrade=_upgrade)
@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """M metrics by P probes of every head of a model, on N texts: all that were asked for, or the first of them.

    Its metrics are those registered when it was made, not those of today. Loss curves are those of
    `analysis.plans.curves`; files of version 3 and before have none.
    """

    model: str  # its name
    weights: str  # a digest of weights and vocabulary: which model this is
    layer_kinds: tuple[str, ...]  # L of "full" or "sliding"
    texts: int  # asked for
    names: tuple[str, ...]  # N, of the texts done
    digests: tuple[str, ...]  # N, sha256 of each text
    probes: tuple[str, ...]  # P
    metrics: tuple[str, ...]  # M

    n_tokens: Annotated[np.ndarray, "int64 N"]
    values: Annotated[np.ndarray, "float64 N P M L H"]  # NaN where the status is not "ok"
    status: Annotated[np.ndarray, "uint8 N P M L H"]  # index into `STATUSES`
    documents: tuple[str, ...] = ()  # N, names of what each text is an excerpt of; none in older files: not known
    curves: Annotated[np.ndarray, "float32 N 3 L Hkv B"] | None = None  # `TextCurves.lost` at `protect_last`
    curve_status: Annotated[np.ndarray, "uint8 N L Hkv"] | None = None
    curve_gammas: Annotated[np.ndarray, "float64 N L Hkv"] | None = None
    protect_last: int = RECENT_WINDOW

    def __post_init__(self) -> None:
        records.check_shapes(self)
        n = len(self.names)
        if not 1 <= n <= self.texts <= MOST_TEXTS or 0 in self.values.shape:
            raise ValueError(
                f"a study is of 1 to {MOST_TEXTS:,} texts, and of heads; got {n} of {self.texts} texts, and values of "
                f"shape {self.values.shape}"
            )
        expected = (n, len(self.probes), len(self.metrics), len(self.layer_kinds))
        if self.values.shape[:4] != expected:
            raise ValueError(f"values and status must be of shape {(*expected, 'H')}, got {self.values.shape}")
        if len(self.digests) != n or len(self.documents) not in (0, n):
            raise ValueError(f"digests or documents do not fit {n} texts")
        if len(set(self.probes)) != len(self.probes) or len(set(self.metrics)) != len(self.metrics):
            raise ValueError("no probe or metric may be there twice")
        if (self.status >= len(STATUSES)).any() or (np.isfinite(self.values) != (self.status == 0)).any():
            raise ValueError("values must be numbers where the status is ok, and nowhere else")
        of_curves = (self.curves, self.curve_status, self.curve_gammas)
        if len({part is None for part in of_curves}) > 1:
            raise ValueError("curves, curve_status and curve_gammas must be there together")
        if self.curves is not None and self.curve_status is not None:
            if self.curves.shape[-1] < 2 or self.protect_last < 0 or (self.curve_status >= len(STATUSES)).any():
                raise ValueError("curves or protect_last are none that a study can have")
            if not np.isfinite(self.curves).all() or (self.curves < 0).any():
                raise ValueError("curves hold values that no study can have")

    @property
    def complete(self) -> bool:
        """True when all texts that were asked for are done."""
        return len(self.names) == self.texts

    def of(self, metric: str, *, probe: str = "next token") -> np.ndarray:
        """Values of one metric by one probe, [N, L, H]. Raises SettingsError where the study does not have it."""
        return self.values[:, *self._place(metric, probe)]

    def status_of(self, metric: str, *, probe: str = "next token") -> np.ndarray:
        """Status of one metric, [N, L, H] of str: "ok", or why it is undefined there. Raises as `of`."""
        return np.array(STATUSES, dtype=object)[self.status[:, *self._place(metric, probe)]]

    def _place(self, metric: str, probe: str) -> tuple[int, int]:
        for name, known, what in ((probe, self.probes, "probe"), (metric, self.metrics, "metric")):
            if name not in known:
                raise SettingsError(
                    f"{what} must be one of {', '.join(known)} in this study, got {name!r:.60}. If it is a newer one, "
                    f"make the study again: {AGAIN}"
                )
        return self.probes.index(probe), self.metrics.index(metric)


def study_of(
    *captures: Capture,
    probes: Collection[str] = tuple(PROBES),
    names: Collection[str] | None = None,
    protect_last: int = RECENT_WINDOW,
    documents: Sequence[str] = (),
) -> Study:
    """Make a study of a run, or of several of one model: a text each, with its loss curves.

    Args:
        probes: which of `PROBES`; fewer are quicker.
        names: which of `METRICS`; all by default.
        protect_last: recent window of the loss curves.
        documents: names of what the texts are excerpts of, if that is known.

    Raises:
        SettingsError: there is no capture, captures are of several models, or a probe or metric is unknown.
    """
    if len({(c.model, c.layer_kinds, c.n_heads, c.n_kv_heads) for c in captures}) != 1:
        raise SettingsError("captures must be of one model, and there must be one at least")
    parts = [_of_text(capture, probes, names, protect_last, BINS) for capture in captures]
    if len(parts) > 1:
        parts = [replace(part, names=(f"text {i}",)) for i, part in enumerate(parts)]
    return replace(_joined(parts), documents=tuple(documents))


def _of_text(
    capture: Capture, probes: Collection[str], names: Collection[str] | None, protect_last: int, bins: int | None
) -> Study:
    """The study of one text; without loss curves where there are no bins."""
    found = [metrics(capture, probe, names=names) for probe in probes]
    one = Study(
        model=capture.model,
        weights="",
        layer_kinds=capture.layer_kinds,
        texts=1,
        names=("this text",),
        digests=(_digest(capture.text),),
        probes=tuple(probes),
        metrics=found[0].names,
        n_tokens=np.array([capture.n_tokens]),
        values=np.stack([one.values for one in found])[None],
        status=np.stack([one.status for one in found])[None],
        protect_last=protect_last,
    )
    if bins is None:
        return one
    curves = text_curves(capture, bins=bins, protect_last=protect_last)
    code = np.select([curves.status == name for name in STATUSES], np.arange(len(STATUSES))).astype(np.uint8)
    lost = curves.lost.astype(np.float32)
    return replace(one, curves=lost[None], curve_status=code[None], curve_gammas=curves.gammas[None])


def study(
    loaded: LoadedModel,
    texts: Texts,
    path: str | Path | None = None,
    *,
    on_text: OnText | None = None,
    progress: Progress = unheard,
) -> Study:
    """Capture each text, and keep its metrics and loss curves.

    Args:
        texts: (name, text) of each, or `excerpts`. The texts stay in memory, their captures do not.
        path: file for the table. One that exists is resumed: its texts must be the first of `texts`, in the same
            model, and the others are measured by its probes, metrics and recent window. Whatever ends the study, the
            texts done are in it; a process that is killed loses those of its last few seconds.
        on_text: called with the study so far.
        progress: counts texts, and is called within each, too.

    Raises:
        RecordError: the file is of another model, of other texts or of metrics that are registered no more, or cannot
            be read or written; says which.
        TextError: there are no texts, or more than `MOST_TEXTS`, or one of them cannot be run; says which, and those
            before it are in the file.
        OutOfMemoryError, ModelError: as `capture`.
    """
    from analysis.recorder import capture  # waits for torch, which reading a study need not

    given = excerpts_from(texts)
    if not given:
        raise TextError("There are no texts to study.")
    if len(given) > MOST_TEXTS:
        raise TextError(f"A study takes {MOST_TEXTS:,} texts at most, got {len(given):,}.")
    weights = digest_of(loaded)
    done = written = _resumed(path, loaded.name, weights, given)
    # A study is resumed as it was begun, whatever is registered or the default today.
    probes, names, window = tuple(PROBES), tuple(METRICS), RECENT_WINDOW
    bins: int | None = BINS
    if done is not None:
        probes, names, window = done.probes, done.metrics, done.protect_last
        bins = None if done.curves is None else done.curves.shape[-1] - 1
    due = 0.0
    try:
        first = len(done.names) if done else 0
        for i, (name, text, document) in enumerate(given[first:], first):
            try:
                run = capture(loaded, text, progress=lambda *_, i=i: progress(i, len(given), "texts"))
            except TextError as error:
                raise TextError(f"{name}: {error}") from error
            one = replace(
                _of_text(run, probes, names, window, bins),
                weights=weights,
                texts=len(given),
                names=(name,),
                documents=(document or name,),
            )
            done = one if done is None else _joined([done, one])
            del run  # before the next is made: two do not fit where one does
            # The file is the whole table: written at every text, its bytes would grow with the square of the texts.
            if path is not None and (len(done.names) <= _EACH or time.monotonic() >= due):
                save_study(done, path)
                written, due = done, time.monotonic() + _PAUSE
            if on_text is not None:
                on_text(done)
            progress(i + 1, len(given), "texts")
    finally:
        if path is not None and done is not None and done is not written:
            save_study(done, path)
    assert done is not None  # there is a text
    return done


def save_study(study: Study, path: str | Path) -> Path:
    """Write a study to a file, atomically. Raises RecordError if it cannot be written."""
    return records.save(study, path)


def load_study(path: str | Path) -> Study:
    """Read a study from an untrusted file. Raises RecordError if it is not one."""
    return records.load(Study, path)


def head_means(study: Study, metric: str = "gamma", *, probe: str = "next token", seed: int = 0) -> Means:
    """`means` of a metric for each head, [L, H]."""
    return means(study.of(metric, probe=probe), documents=study.documents, seed=seed)


def layer_means(study: Study, metric: str = "gamma", *, probe: str = "next token", seed: int = 0) -> Means:
    """`means` for each layer, [L], of the mean over its heads that are defined."""
    values = np.moveaxis(study.of(metric, probe=probe), 2, 0)  # [H, N, L]
    return means(nanmean(values), documents=study.documents, seed=seed)


def median_gamma(study: Study, *, probe: str = "next token", seed: int = 0) -> Interval:
    """Median over heads of the mean Γ over texts; its interval resamples texts, not heads."""
    return median(study.of("gamma", probe=probe), documents=study.documents, seed=seed)


def policy_alr(study: Study, policy: str = "low_norm", *, probe: str = "next token") -> np.ndarray:
    """ALR of each head by a policy, [N, L, H]: low and high order are one measurement, and random is the chance level.

    Raises:
        SettingsError: there is no ALR of the policy, or the study does not have it.
    """
    low, chance = study.of("alr", probe=probe), study.of("alr_chance", probe=probe)
    by_policy = {"low_norm": low, "high_norm": 2 * chance - low, "random": np.where(np.isnan(low), np.nan, chance)}
    if policy not in by_policy:
        raise SettingsError(f"policy must be one of {', '.join(by_policy)}: ALR speaks of these; got {policy!r}")
    return by_policy[policy]


def layer_alr(study: Study, policy: str = "low_norm", *, probe: str = "next token") -> np.ndarray:
    """ALR over the chance level of each layer on each text, [N, L]: 0 is the ideal order, 1 chance, 2 the reverse.

    That of all heads together, so that heads count by what there is to lose; not the mean of theirs. NaN where no head
    of the layer is defined. Raises as `policy_alr`.
    """
    loss, chance = policy_alr(study, policy, probe=probe), study.of("alr_chance", probe=probe)
    possible = np.nansum(chance, axis=2)
    return np.divide(np.nansum(loss, axis=2), possible, where=possible > 0, out=np.full(possible.shape, np.nan))


def _resumed(path: str | Path | None, model: str, weights: str, texts: tuple[Excerpt, ...]) -> Study | None:
    """The study that the file holds, if there is one and it is a beginning of the one asked for."""
    if path is None or not Path(path).exists():
        return None
    done, instead = load_study(path), "Choose another file, or delete this one."
    if done.weights != weights:
        raise RecordError(
            f"{path} holds a study of another model: {done.model}, whose weights, dtype or vocabulary are not those of "
            f"{model}. {instead}"
        )
    if gone := [*(set(done.probes) - set(PROBES)), *(set(done.metrics) - set(METRICS))]:
        raise RecordError(
            f"{path} holds {', '.join(sorted(gone))}, which cannot be measured now, so it cannot be resumed. {instead} "
            f"Then: {AGAIN}"
        )
    if len(done.names) > len(texts):
        raise RecordError(
            f"{path} holds {counted(len(done.names), 'text')} already, and {len(texts)} were given. {instead}"
        )
    for i, (before, digest, (name, text, _)) in enumerate(zip(done.names, done.digests, texts, strict=False)):
        if (before, digest) != (name, _digest(text)):
            what = f"it was {before!r}, and is now {name!r}" if before != name else f"{name!r} has changed"
            raise RecordError(f"{path} holds a study of other texts: of text {i}, {what}. {instead}")
    known = tuple(document or name for name, _, document in texts[: len(done.names)])
    return replace(done, texts=len(texts), documents=known)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _joined(parts: Sequence[Study]) -> Study:
    """The texts of several studies of one model, that were measured alike."""
    assert len({(one.probes, one.metrics, one.protect_last, one.curves is None) for one in parts}) == 1
    texts = sum(len(one.names) for one in parts)
    of_texts: dict[str, Any] = {
        name: sum((getattr(one, name) for one in parts), ()) for name in ("names", "digests", "documents")
    }
    arrays = {name: [getattr(one, name) for one in parts] for name in _ARRAYS}
    of_texts |= {name: np.concatenate(of) for name, of in arrays.items() if of[0] is not None}
    return replace(parts[-1], texts=max(texts, parts[-1].texts), **of_texts)
