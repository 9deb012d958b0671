"""The single-layer ablation: the NLL change when only this layer is compressed, and the layer's ALR beside it.

ALR is read off attention; the NLL change is measured by predicting text. Where the two order layers alike, ALR can
choose the layers to skip: the paper chooses by ALR itself, `analysis.plans.skip` by normalised ALR, and both are held
against the NLL change. A view of results of the task `lm`, and a record on disk. Reading one waits for no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.defaults import RECENT_WINDOW
from analysis.errors import ModelError
from analysis.evaluation.lm import LmSettings, prompt_of
from analysis.evaluation.results import FULL, Results
from analysis.lab import studies_by_policy
from analysis.measures import slim
from analysis.plans.curves import loss_curves
from analysis.plans.skip import Criterion, SkipSuggestion, choose
from analysis.plans.strategies import STRATEGIES, plan
from analysis.progress import Progress, part_of, unheard
from analysis.records import record
from analysis.statistics import MIN_TEXTS, Interval, few_documents_warning, means, nanmean, resamples, spearman
from analysis.studies import layer_alr
from analysis.texts.excerpts import Excerpt, Texts, excerpts_from
from analysis.words import counted
from l2kv.config import CacheShape
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.plans.curves import LossCurves

COSTS_AT = 0.2  # the ratio at which each head is compressed alone: small, so that a cost stands out
POLICIES = ("low_norm", "high_norm")  # whose ALR a study tells, other than chance
Rows = tuple[tuple[float | None, ...], ...]
"""A number for each of K layers and N texts; None is undefined."""


@record(
    "ablation",
    version=2,
    title="a single-layer ablation",
    again="l2kv ablation",
    formerly="causal",
)
@dataclass(frozen=True)
class Ablation:
    """NLL change when one layer alone is compressed, and the layer's ALR, for K layers and N texts."""

    spec: CompressionSpec
    """Compression of the one layer."""
    layers: tuple[int, ...]
    """The K layers, those that can be compressed."""
    results: Results
    """Results of the task `lm`, with a method for each layer."""
    normalised_alr_rows: Rows
    """ALR over the chance level of each layer on each prompt, by the policy of the spec."""
    alr_rows: Rows | None = None
    """The paper's ALR; None of files older than this field."""

    def __post_init__(self) -> None:
        shape = len(self.layers), len(self.results.samples)
        for rows in (self.normalised_alr_rows, self.alr_rows or self.normalised_alr_rows):
            if len(rows) != shape[0] or {len(row) for row in rows} != {shape[1]} or not shape[1]:
                raise ValueError(f"ALR must be of a row for each of {shape[0]} layers and a number for each text")
        if unknown := {_method(layer) for layer in self.layers} - set(self.results.methods):
            raise ValueError(f"its results lack {', '.join(sorted(unknown))}")
        _ = self.results.full

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.results.model

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents that the N texts are excerpts of."""
        return self.results.documents

    @cached_property
    def nll_change(self) -> np.ndarray:
        """NLL change when each layer alone is compressed, nats/token against the full cache, [K, N]."""
        return np.array([self.results.change(_method(layer)) for layer in self.layers])

    @cached_property
    def normalised_alr(self) -> np.ndarray:
        """Normalised ALR, [K, N]; NaN is undefined."""
        return np.array(self.normalised_alr_rows, dtype=np.float64)

    @cached_property
    def alr(self) -> np.ndarray | None:
        """The paper's ALR, [K, N]; None in files that do not hold it."""
        return None if self.alr_rows is None else np.array(self.alr_rows, dtype=np.float64)

    @cached_property
    def agreement(self) -> Interval:
        """Spearman's ρ over layers of NLL change and normalised ALR, means over texts."""
        return agreement(self.nll_change, self.normalised_alr, documents=self.documents)

    @cached_property
    def alr_agreement(self) -> Interval | None:
        """Spearman's ρ of NLL change and the paper's ALR; None in files that do not hold ALR."""
        return None if self.alr is None else agreement(self.nll_change, self.alr, documents=self.documents)

    def table(self) -> list[dict[str, Any]]:
        """A row for each layer: means over texts, the NLL change with its interval; `alr` if the file keeps it."""
        values = {"normalised_alr": self.normalised_alr} | ({} if self.alr is None else {"alr": self.alr})
        columns = {name: means(rows.T).mean.tolist() for name, rows in values.items()}
        columns |= {"nll_change": [self.results.interval(change) for change in self.nll_change]}
        return [
            {"layer": self.layers[i]} | {name: of[i] for name, of in columns.items()} for i in range(len(self.layers))
        ]

    def __str__(self) -> str:
        n = self.normalised_alr.shape[1]
        by_alr = "" if self.alr is None else f"; of the paper's ALR and that change: {self.alr_agreement}"
        return (
            f"Spearman of normalised ALR and of the NLL change when only this layer is compressed, over "
            f"{counted(len(self.layers), 'layer')} and {counted(n, 'text')}: {self.agreement}{by_alr}. "
            f"{few_documents_warning(self.documents)}"
        ).strip()


def _method(layer: int) -> str:
    return f"layer {layer}"


def _alone(spec: CompressionSpec, layer: int, n_layers: int) -> CompressionSpec:
    return replace(spec, skip_layers=tuple(k for k in range(n_layers) if k != layer))


def ablate_layers(
    loaded: LoadedModel,
    texts: Texts,
    spec: CompressionSpec,
    *,
    settings: LmSettings | None = None,
    out: str | Path | None = None,
    progress: Progress = unheard,
) -> Ablation:
    """Compress each layer alone by `spec`, skip all others, and measure the NLL change.

    Takes N captures of the prompts, and N * (K + 1) continuations.

    Args:
        spec: the compression; its `skip_layers` are not compared. Its policy looks at keys and values alone, and ALR
            is that of its order.
        out: file to write each continuation to, so that a stopped ablation continues, as for `evaluate`.
        progress: counts captures and continuations ("passes").

    Raises:
        TextError: there are no texts, or one is empty or too short.
        ModelError: the spec compresses no layer, or as `capture`.
        SettingsError: the policy needs more than keys and values, or as `evaluate`.
    """
    settings, given = settings or LmSettings(), excerpts_from(texts)
    shape = CacheShape.of(loaded.config, loaded.model.dtype.itemsize)
    layers = tuple(layer for layer in shape.layers if layer not in spec.skip_layers)
    if not layers:
        raise ModelError(f"{loaded.name} has no layer that the spec compresses. Skip fewer layers.")
    measured, total = [], len(given) * (2 + len(layers))
    for i, text in enumerate(given):
        prompt = prompt_of(loaded.tokenizer, text.text, settings.prompt_tokens)
        of_order = studies_by_policy(
            loaded, [(text.name, prompt)], [spec.policy], progress=lambda *_, i=i: progress(i, total, "passes")
        )
        measured.append(of_order[spec.policy])
        progress(i + 1, total, "passes")
    alone = {_method(layer): _alone(spec, layer, loaded.config.num_hidden_layers) for layer in layers}
    results = _lm(loaded, given, alone, settings, part_of(progress, len(given), total, "passes"), out)
    return Ablation(
        spec,
        layers,
        results.of_samples(),
        _rows(np.stack([layer_alr(one)[0] for one in measured], axis=1)[list(layers)]),
        _rows(np.stack([nanmean(one.of("alr")[0].T) for one in measured], axis=1)[list(layers)]),
    )


def _rows(values: np.ndarray) -> Rows:
    return tuple(tuple(value if np.isfinite(value) else None for value in row) for row in values.tolist())


def _lm(
    loaded: LoadedModel,
    texts: Sequence[Excerpt],
    methods: Mapping[str, CompressionSpec],
    settings: LmSettings,
    progress: Progress,
    out: str | Path | None = None,
) -> Results:
    from analysis.evaluation.run import evaluate

    return evaluate(loaded, "lm", {FULL: None, **methods}, texts=texts, settings=settings, out=out, progress=progress)


COSTLY = 0.01  # nats/token: a layer that changes the NLL by this or more, alone, raises the perplexity by one percent


def suggest_by_ablation(
    ablation: Ablation, *, rule: str = "threshold", threshold: float = COSTLY, count: int = 2
) -> SkipSuggestion:
    """Suggest layers to skip by measurement: those of largest mean NLL change when compressed alone.

    Every layer takes the same bytes, so the order of the nats saved is that of the nats saved for a byte.

    Args:
        rule: one of `skip.RULES`, applied to the NLL change instead of the normalised ALR.
        threshold: for the rule "threshold", nats/token. Layers whose interval holds 0 are not suggested.
        count: for the rule "count".

    Raises:
        SettingsError: the rule is unknown, or `count` out of range.
    """
    change, n = means(ablation.nll_change.T, documents=ablation.documents), ablation.nll_change.shape[1]
    known = np.flatnonzero(np.isfinite(change.mean))
    picked, words = choose(
        change.mean[known],
        Criterion(
            f"that costs {threshold:g} nats/token or more when it is compressed alone",
            "those that cost most when each is compressed alone",
            "in what each costs when it is compressed alone",
            "nats/token",
        ),
        rule=rule,
        threshold=threshold,
        count=count,
        sure=~(change.low[known] <= 0),
    )
    chosen = known[picked]
    if len(chosen):
        told = ", ".join(f"layer {ablation.layers[i]} {change.mean[i]:+.3f}" for i in chosen[:6])
        words += f" In nats/token, {told}{', …' * (len(chosen) > 6)}."
    words += f" Measured by prediction, {_told(ablation.spec)}, on {counted(n, 'excerpt')}."
    if n < MIN_TEXTS:
        words += " So few only give a hint."
    return SkipSuggestion(tuple(sorted(ablation.layers[i] for i in chosen)), words)


def _told(spec: CompressionSpec) -> str:
    kept = f"{100 * spec.keep_ratio:.3g} %" if spec.budget is None else counted(spec.budget, "token")
    return f"{kept} kept by {spec.policy.replace('_', ' ')} with the last {spec.protect_last} protected"


def head_costs(
    loaded: LoadedModel,
    texts: Texts,
    spec: CompressionSpec,
    *,
    settings: LmSettings | None = None,
    out: str | Path | None = None,
    progress: Progress = unheard,
) -> np.ndarray:
    """Measure the NLL change of compressing each kv head alone by `spec`: [N, L, Hkv] nats/token.

    NaN in layers that are never compressed. Takes N continuations for each kv head; `out` and what is raised are as for
    `evaluate`.
    """
    shape = CacheShape.of(loaded.config, loaded.model.dtype.itemsize)
    heads = {f"{layer}.{head}": (layer, head) for layer in shape.layers for head in range(shape.n_kv_heads)}
    others_kept = replace(spec, keep_ratio=1.0, budget=None, layer_ratios=None, skip_layers=())
    alone = {
        name: replace(others_kept, head_ratios=((head, spec.target_of(*head).ratio),)) for name, head in heads.items()
    }
    results = _lm(loaded, given := excerpts_from(texts), alone, settings or LmSettings(), progress, out)
    costs = np.full((len(given), loaded.config.num_hidden_layers, shape.n_kv_heads), np.nan)
    for name, (layer, head) in heads.items():
        costs[:, layer, head] = results.change(name)
    return costs


def measured_curves(
    loaded: LoadedModel,
    texts: Sequence[Excerpt],
    strategy: str = "by_head",
    *,
    protect_last: int = RECENT_WINDOW,
    settings: LmSettings | None = None,
    progress: Progress = unheard,
) -> LossCurves:
    """Measure the loss curves that a strategy plans by, on texts; where it needs costs, on their prompts.

    Args:
        settings: lengths of the prompts, and of what is predicted after them to tell costs.
        progress: counts texts, then what `head_costs` does.

    Raises:
        SettingsError: there is no such strategy.
        TextError, ModelError, OutOfMemoryError: as `capture`, and as `evaluate` where costs are needed.
    """
    from analysis.recorder import capture  # waits for torch

    costs, settings = STRATEGIES.find(strategy).needs_costs, settings or LmSettings()
    runs = []
    for i, excerpt in enumerate(texts):
        text = prompt_of(loaded.tokenizer, excerpt.text, settings.prompt_tokens) if costs else excerpt.text
        runs.append(slim(capture(loaded, text, last_queries=0)))
        progress(i + 1, len(texts), "texts")
    curves = loss_curves(*runs, protect_last=protect_last, documents=[excerpt.document for excerpt in texts])
    return with_head_costs(curves, loaded, texts, settings=settings, progress=progress) if costs else curves


def with_head_costs(
    curves: LossCurves,
    loaded: LoadedModel,
    texts: Texts,
    *,
    settings: LmSettings | None = None,
    out: str | Path | None = None,
    progress: Progress = unheard,
) -> LossCurves:
    """Weight the curves by `head_costs`, measured at `COSTS_AT` or the least ratio there is.

    `out` and what is raised are as for `evaluate`.
    """
    keep_ratio = max(COSTS_AT, curves.least_bin / curves.bins)
    spec = plan(curves, keep_ratio, "uniform_signed").to_spec()
    costs = head_costs(loaded, texts, spec, settings=settings, out=out, progress=progress)
    return curves.weighted_by(costs.mean(axis=0), keep_ratio)


def agreement(nll_change: np.ndarray, loss: np.ndarray, *, documents: Sequence[str] = (), seed: int = 0) -> Interval:
    """Spearman's ρ over layers of two means over texts, [K, N] each; the interval resamples the texts of both at once.

    Layers that are undefined on a text do not count; with fewer than 3 layers, or all equal, ρ is undefined. There
    is no interval with fewer than `MIN_TEXTS` texts.
    """
    defined = (np.isfinite(nll_change) & np.isfinite(loss)).all(axis=1)
    nll_change, loss = nll_change[defined], loss[defined]
    n = loss.shape[1]
    value = float(spearman(nll_change.mean(axis=1), loss.mean(axis=1)))
    if n < MIN_TEXTS or np.isnan(value):
        return Interval(value, np.nan, np.nan)
    counts = resamples(n, documents=documents, seed=seed)
    shares = counts / counts.sum(axis=1, keepdims=True)
    drawn = spearman(shares @ nll_change.T, shares @ loss.T)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))
