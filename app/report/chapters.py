"""Sections of a report beyond one run: many texts, the Pareto front, the single-layer ablation, two compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from analysis import statistics
from analysis.comparing import Comparison
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front, FrontPoint
from analysis.plans.strategies import STRATEGIES, title_of
from analysis.studies import Study, head_means, layer_alr
from analysis.verdicts import answer, meanings, verdict_counts, verdicts
from analysis.words import counted, span
from app import figures
from app.report.writing import Drawing, Section, Table

_MIB = 2**20


def of_study(study: Study, name: str) -> Section:
    """What the heads do over many texts, with intervals."""
    gamma, verdict = head_means(study), verdicts(study)
    loss = statistics.means(layer_alr(study), documents=study.documents)
    stability = statistics.stability(layer_alr(study))
    layer, head = np.indices(gamma.mean.shape).reshape(2, -1)
    n = len(study.names)
    unfinished = "" if study.complete else f" {study.texts - n} texts asked for are not done."
    drawings = [
        Drawing(
            figures.head_map(gamma.mean, title="Γ", diverging=True, status=verdict),
            alt="Map of the mean Γ over texts by layer and head",
            title="Γ, mean over texts",
            caption="Purple: low norms get the attention, as the paper says; orange: high norms do.",
            table={
                "layer": layer,
                "head": head,
                "mean Γ": gamma.mean.ravel(),
                "from": gamma.low.ravel(),
                "to": gamma.high.ravel(),
                "texts that define it": gamma.defined.ravel(),
                "verdict": verdict.ravel(),
            },
        ),
        Drawing(
            figures.means_by_layer(loss.mean, loss.low, loss.high),
            alt="Normalised ALR of each layer, with intervals over texts",
            title="Normalised ALR of each layer",
            caption="0 is the ideal order, 1 a random one, 2 the reverse. Bars: 95 % intervals, by resampling texts.",
            table={"layer": range(len(loss.mean)), "Normalised ALR": loss.mean, "from": loss.low, "to": loss.high},
        ),
    ]
    if stability.by_texts:
        columns = [np.array([getattr(each, name) for each in stability.by_texts]) for name in _AGREEMENT]
        drawings.append(
            Drawing(
                figures.order_agreement(*columns, stable=statistics.STABLE),
                alt="How well two halves of the texts agree on the order of the layers, by texts in each half",
                title="From how many texts on?",
                caption="Texts are split in two at random, again and again; agreement of the two orders of layers.",
                table=dict(zip(("texts in each half", "Spearman", "Kendall"), columns, strict=True)),
            )
        )
    return Section(
        f"Over many texts: {name}",
        (answer(study), f"{counted(n, 'text')} of {span(study.n_tokens.tolist())} tokens.{unfinished} {stability}"),
        tuple(drawings),
        columns=2,
        table=verdict_table({name: verdict_counts(verdict)}, meanings(n)),
    )


_AGREEMENT = ("texts", "spearman", "kendall")


def of_front(front: Front) -> Section:
    """What each allocation strategy costs in prediction."""
    n = len(front.measured_on)
    points = [point for line in front.lines.values() for point in line]
    intervals = [front.interval(point) for point in points]
    too_small = "; ".join(each.split(":")[0] for each in front.left_out)
    left_out = (f"Left out, since the budget is too small for them: {too_small}.",) if too_small else ()
    drawing = Drawing(
        front_figure(front),
        alt="Bytes of the cache against the change of the negative log likelihood, a line for each strategy",
        caption=f"The mean over {counted(n, 'text')}; {INTERVALS}. Lower left is better. Bytes "
        f"are counted in the caches after a prompt of {front.lengths[0]} tokens and {front.lengths[1]} more. Plans "
        f"were made from {counted(len(front.planned_on), 'other text')}.",
        table={
            "strategy": [title_of(point.strategy) for point in points],
            "keep ratio": [point.keep_ratio for point in points],
            "MiB": [point.nbytes / _MIB for point in points],
            "NLL change": [interval.value for interval in intervals],
            "from": [interval.low for interval in intervals],
            "to": [interval.high for interval in intervals],
        },
    )
    return Section(f"What each allocation strategy costs: {front.model}", (front.answer(), *left_out), (drawing,))


INTERVALS = "95 % intervals are those of the plan and of the uniform strategy that are best at a keep ratio"


def front_figure(front: Front) -> go.Figure:
    """Draw a front, a line for each strategy in the order of `Front.lines`, with `INTERVALS`."""
    lines = {title_of(name): _line(front, name, points) for name, points in front.lines.items()}
    best = {title_of(point.strategy) for kind in ("plan", "uniform") for point in front.best(kind).values()}
    return figures.front(lines, full_mib=front.full_nbytes / _MIB, intervals=best or None)


def of_ablation(check: Ablation) -> Section:
    """Each layer compressed alone, beside its ALR."""
    change, loss = (
        statistics.means(of.T, documents=check.documents) for of in (check.nll_change, check.normalised_alr)
    )
    drawing = Drawing(
        figures.layer_costs(check.layers, loss.mean, (loss.low, loss.high), change.mean, (change.low, change.high)),
        alt="What compressing one layer alone costs against its ALR, a point for each layer",
        caption="A numbered point a layer, with 95 % intervals over texts. If ALR can tell, points rise to the right.",
        table=ablation_table(check),
    )
    spec = check.spec
    kept = counted(spec.budget, "token") if spec.budget is not None else f"{spec.keep_ratio:.0%}"
    return Section(
        f"Each layer compressed alone: {check.model}",
        (
            str(check),
            f"One layer keeps {kept} by {spec.policy.replace('_', ' ')}, with the last "
            f"{counted(spec.protect_last, 'token')} protected, and all others keep everything. ALR is read off "
            "attention; the cost is measured by predicting text, in nats/token against the full cache.",
        ),
        (drawing,),
    )


def ablation_table(check: Ablation) -> Table:
    """The numbers of an ablation, a row for each layer; the paper's ALR where the file keeps it."""
    change = statistics.means(check.nll_change.T, documents=check.documents)
    paper = {} if check.alr is None else {"the paper's ALR": statistics.means(check.alr.T).mean}
    return (
        {"layer": check.layers, "Normalised ALR": statistics.means(check.normalised_alr.T).mean}
        | paper
        | {"NLL change, nats/token": change.mean, "from": change.low, "to": change.high}
    )


def of_comparison(comparison: Comparison, *, dark: bool = False) -> Section:
    """Two runs or two studies head by head, or as distributions where the shapes differ; dark: whether the page is."""
    names, difference, runs = comparison.names, comparison.difference, comparison.texts == (1, 1)
    counts = dict(zip(names, comparison.verdicts, strict=True))
    first, second = (means.mean for means in comparison.means)
    mean, told = "" if runs else "mean ", meanings(max(comparison.texts))
    bars = Drawing(
        figures.verdict_bars({name: {verdict: of[verdict] for verdict in told} for name, of in counts.items()}),
        alt="Share of the heads with each verdict, in both",
        title="Verdicts",
        caption="Shares, since the two may have different numbers of heads.",
    )
    if difference is None:
        spread = Drawing(
            figures.gamma_spread(dict(zip(names, (first, second), strict=True))),
            alt="Γ of all heads of both",
            title="Γ of all heads",
            caption="Every head a point, beside a box of the quartiles.",
        )
        drawings: tuple[Drawing, ...] = (spread, bars)
    else:
        layer, head = np.indices(difference.mean.shape).reshape(2, -1)
        ends = {} if runs else {"from": difference.low.ravel(), "to": difference.high.ravel()}
        intervals = "" if runs else " The table has the 95 % intervals, by resampling texts."
        drawings = (
            Drawing(
                figures.head_map(difference.mean, title="ΔΓ", diverging=True, dark=dark),
                alt=f"Map of the difference of the {mean}Γ by layer and head",
                title=f"The {mean}Γ in {names[1]} less that in {names[0]}",
                caption=f"Purple: low norms get more of the attention in {names[1]}. Colours end at ±1, numbers do "
                f"not.{intervals}",
                table={
                    "layer": layer,
                    "head": head,
                    f"Γ, {names[0]}": first.ravel(),
                    f"Γ, {names[1]}": second.ravel(),
                    "difference": difference.mean.ravel(),
                }
                | ends,
            ),
            Drawing(
                figures.gamma_against(first, second, names=names),
                alt=f"The {mean}Γ of every head in {names[1]} against {names[0]}",
                title="Head by head",
                caption="On the line nothing changed. Colour is the layer.",
                rows=2,
            ),
            bars,
        )
    return Section(
        "Compared" if runs else "Compared over many texts",
        (f"{names[0]} against {names[1]}. {comparison}",),
        drawings,
        columns=2,
        table=verdict_table(counts, told),
    )


def verdict_table(counts: Mapping[str, Mapping[str, int]], told: Mapping[str, str]) -> Table:
    """Verdicts, heads with each, and what they mean."""
    of_each = {name if len(counts) > 1 else "heads": [of[verdict] for verdict in told] for name, of in counts.items()}
    return {"verdict": list(told)} | of_each | {"meaning": list(told.values())}


def _line(front: Front, name: str, points: Sequence[FrontPoint]) -> figures.Line:
    intervals = [front.interval(point) for point in points]
    return figures.Line(
        mib=np.array([point.nbytes / _MIB for point in points]),
        change=np.array([interval.value for interval in intervals]),
        low=np.array([interval.low for interval in intervals]),
        high=np.array([interval.high for interval in intervals]),
        keep_ratio=np.array([point.keep_ratio for point in points]),
        kind=STRATEGIES[name].kind if name in STRATEGIES else "plan",
    )
