"""The report: one page about a run, two compared, or evaluations, for readers with nothing installed. Runs no model.

Puts together what `analysis` says and `app.figures` draws; `app.report.chapters` has the sections that not every report
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from analysis.captures import Capture
from analysis.comparing import compare
from analysis.defaults import KEEP_RATIO, RECENT_WINDOW
from analysis.evaluation.results import Results
from analysis.measures import attention_loss
from analysis.metrics import METRICS
from analysis.models.load import BUNDLED_MODELS
from analysis.models.memory import DTYPES
from analysis.models.sizes import checkpoint_dtype
from analysis.plans.ablation import Ablation
from analysis.plans.export import LENGTHS, kvpress_code, library_code
from analysis.plans.front import Front
from analysis.plans.skip import suggest_skip_layers
from analysis.records import json_line
from analysis.statistics import nanmean
from analysis.studies import Study, layer_alr, policy_alr, study_of
from analysis.verdicts import answer, meanings, verdict_counts, verdicts
from analysis.words import counted, human_bytes, layers_listed, signed
from app import figures
from app.report import chapters, evaluation
from app.report.writing import Drawing, Section, Table, document
from l2kv.spec import CompressionSpec

VERSION = 2
_MOST_TOLD = 101  # points of a curve in its table: a page of a thousand tokens stays below 1 MB

_READING = {
    "Γ": "Gini correlation of the norms' ranks with the attention of the next token: −1 low norms get it all (the "
    "paper's claim), 0 chance, +1 high norms do. It weighs tokens by their attention.",
    "ALR": "The paper's Eq. 5-7: the attention lost by evicting high norms first, less that of the ideal order, summed "
    "over how much is evicted. It is (1 + Γ) times the ALR of a random order, and grows with the text.",
    "ALR / n": "ALR by the number of tokens, from 0 to 1: what two texts may be compared by.",
    "Spearman": "Rank correlation of key norm and the attention of the next token. It counts every token alike, so it "
    "does not notice a sink.",
    "sink": "A token, mostly the first, that draws attention whatever the text says. Figures are given with and "
    "without the first token, since it can carry all of an effect.",
}
_MAPS = {
    "gamma": "Purple: low norms get the attention, as the paper says. Orange: high norms do.",
    "spearman": "Of norm and attention. It counts every token alike.",
    "alr": "The paper's figure, of lost attention: weak colour is good. It grows with the text.",
    "alr_per_token": "The same by the token: what two texts may be compared by.",
}
_LIMITS = (
    "One text is an anecdote. Γ and ALR of a run are of one query, the next token, and its verdicts are signs without "
    "an interval. Only a study of many texts has intervals.",
    "The rule may not hold in another model, and that it holds here does not say that compressing costs nothing: the "
    "change of prediction does, where it was measured.",
    "Recent tokens matter more than any rule: protect the last ones.",
    "Bytes are arithmetic, for one sequence. Layers with a sliding window are bounded anyway, and are left out.",
)


def report(
    runs: Sequence[Capture],
    *,
    studies: Sequence[Study] = (),
    front: Front | None = None,
    ablation: Ablation | None = None,
    results: Sequence[Results] = (),
) -> str:
    """The HTML of a report.

    Args:
        runs: one, or two that are compared; none where there are results.
        studies: of many texts; two are compared.
        front, ablation, results: shown where they are given; whichever models they are of are named.

    Raises:
        ValueError: there are neither runs nor results, or more than two runs or studies.
        SettingsError: results are of a task that is not registered.
    """
    if not (runs or results) or len(runs) > 2 or len(studies) > 2:
        raise ValueError(f"a report is of up to 2 runs and 2 studies, or of results, got {len(runs)}, {len(studies)}")
    names, measured = _names(runs, "run"), [study_of(run, probes=("next token",)) for run in runs]
    advice = [_Advice.of(study, studies) for study in measured]
    sections: list[Section] = []
    if len(runs) == 2:
        compared = chapters.of_comparison(compare(*measured, names=_pair(names)))
        of = " ".join(f"{name}: {_about(run)}." for name, run in zip(names, runs, strict=True))
        sections.append(replace(compared, words=(*compared.words, of)))
    for name, run, study, advised in zip(names, runs, measured, advice, strict=True):
        after = f": {name}" if len(runs) > 1 else ""
        sections += [section(run, study, after) for section in (_heads, _extremes)]
        sections += [_layers(run, study, advised, after), _savings(run, advised, after)]
    study_names = _names(studies, "study")
    sections += [chapters.of_study(study, name) for study, name in zip(studies, study_names, strict=True)]
    if len(studies) == 2:
        sections.append(chapters.of_comparison(compare(*studies, names=_pair(study_names))))
    if front is not None:
        sections.append(chapters.of_front(front))
    if ablation is not None:
        sections.append(chapters.of_ablation(ablation))
    sections += [evaluation.section(each) for each in results]
    data = _data(runs, names, measured, advice, results)
    if not runs:
        return document(f"What compression costs in {_models(results)}", "", sections, data=data)
    table = {"figure": list(_READING), "meaning": list(_READING.values())}
    sections += [
        Section("How to read it", ("Layers and heads count from 0.",), table=table),
        Section("What it does not say", _LIMITS),
    ]
    lead = (
        answer(measured[0])
        if len(runs) == 1
        else "\n".join(f"{name}: {answer(study)}" for name, study in zip(names, measured, strict=True))
    )
    return document(f"Does low norm predict attention in {_models(runs)}?", lead, sections, data=data)


def _models(of: Sequence[Capture] | Sequence[Results]) -> str:
    return " and in ".join(dict.fromkeys(each.model for each in of))


def _names(of: Sequence[Capture] | Sequence[Study], what: str) -> tuple[str, ...]:
    """What tells runs or studies apart: their models, or numbers where those are the same."""
    models = [each.model for each in of]
    if len(set(models)) == len(models):
        return tuple(models)
    return tuple(f"{model}, {what} {i}" for i, model in enumerate(models, 1))


def _pair(names: Sequence[str]) -> tuple[str, str]:
    first, second = names
    return first, second


def _about(run: Capture) -> str:
    beginning = " ".join(run.text[:80].split()) + (" …" if len(run.text) > 80 else "")
    return f"{run.n_tokens} tokens of “{beginning}”"


def _heads(run: Capture, study: Study, after: str) -> Section:
    verdict = verdicts(study)
    layer, head = np.indices(verdict.shape).reshape(2, -1)
    maps = [
        Drawing(
            figures.head_map(
                study.of(name)[0], title=METRICS[name].title, diverging=METRICS[name].diverging,
                status=study.status_of(name)[0],
            ),
            alt=f"Map of {METRICS[name].title} by layer and head",
            title=METRICS[name].title,
            caption=caption,
        )
        for name, caption in _MAPS.items()
    ]  # fmt: skip
    quadrant = Drawing(
        figures.head_quadrant(
            study.of("gamma")[0], study.of("gamma_skip_first")[0], study.of("sink_share")[0], status=verdict
        ),
        alt="All heads by Γ with the first token and without it",
        title="With and without the first token",
        rows=2,
        caption="Size is the first token's share of the attention. Lower left follows the paper.",
        table={"layer": layer, "head": head, "kv head": head * run.n_kv_heads // run.n_heads}
        | {METRICS[name].title: study.of(name)[0].ravel() for name in study.metrics}
        | {"verdict": verdict.ravel()},
    )
    about = (
        f"{_about(run)} in {run.architecture}: {counted(run.n_layers, 'layer')}, "
        f"{counted(run.n_heads, 'query head')} on {counted(run.n_kv_heads, 'kv head')} of {run.head_dim}, {run.dtype}. "
        "Numbers of a head are of one query, the next token."
    )
    table = chapters.verdict_table({run.model: verdict_counts(verdict)}, meanings(1))
    return Section(f"Where it holds{after}", (about, *run.warnings), (maps[0], quadrant, *maps[1:]), 2, table)


def _extremes(run: Capture, study: Study, after: str) -> Section:
    heading = f"The best and the worst head{after}"
    gamma = study.of("gamma")[0]
    if not np.isfinite(gamma).any():
        return Section(heading, ("No head has a defined Γ.",))
    drawings = []
    for pick, which in ((np.nanargmin, "Best"), (np.nanargmax, "Worst")):
        layer, head = map(int, np.unravel_index(pick(gamma), gamma.shape))
        loss = attention_loss(run, layer, head)
        dropped = np.linspace(0, 1, len(loss.ideal))
        told = np.linspace(0, len(dropped) - 1, min(len(dropped), _MOST_TOLD)).round().astype(int)
        curves = {
            "keep low norm": loss.low_norm,
            "keep high norm": loss.high_norm,
            "ideal order": loss.ideal,
            "random order": loss.chance,
        }
        drawings.append(
            Drawing(
                figures.loss_curves(dropped, curves, keep_ratio=KEEP_RATIO),
                alt=f"Attention lost by share of tokens evicted, layer {layer}, head {head}",
                title=f"{which}: layer {layer}, head {head}, Γ {signed(gamma[layer, head])}, "
                f"ALR {study.of('alr')[0, layer, head]:.1f}",
                caption="The area between keep low norm and ideal order is the ALR. Above random order is worse than "
                "chance.",
                table={"evicted": dropped[told]} | {f"lost, {name}": lost[told] for name, lost in curves.items()},
            )
        )
    words = (
        "The share of the next token's attention that is lost as tokens are evicted, nothing protected. Best and worst "
        "are the heads of lowest and of highest Γ, which is ALR against chance: what there is to lose differs by head."
    )
    return Section(heading, (words,), tuple(drawings), columns=2)


def _layers(run: Capture, study: Study, advice: _Advice, after: str) -> Section:
    kept = advice.policy.replace("_", " ")
    by_head, by_layer = policy_alr(study, advice.policy)[0], layer_alr(study, advice.policy)[0]
    words = [f"Suggestion, keeping by {kept}: {layers_listed(advice.skipped)}. {advice.rule}"]
    if advice.policy == "high_norm":
        words.insert(
            0,
            "Here the mirror of the paper's rule, keeping HIGH norms, beats chance in more layers than the rule.",
        )
    drawing = Drawing(
        figures.layer_alr(by_head / study.of("alr_chance")[0], by_layer, threshold=None, skipped=advice.skipped),
        alt="Normalised ALR by layer",
        caption=f"What keeping by {kept} loses beyond the ideal order, as a share of what a random order loses, on the "
        "text of this run: points are heads, diamonds layers. Suggested layers are shaded.",
        table={
            "layer": range(run.n_layers),
            "Normalised ALR": by_layer,
            "ALR, mean over heads": nanmean(by_head.T),
            "skipped": [layer in advice.skipped for layer in range(run.n_layers)],
        },
    )
    return Section(f"Layers to skip{after}", tuple(words), (drawing,))


def _savings(run: Capture, advice: _Advice, after: str) -> Section:
    heading, spec = f"What it saves, and the code{after}", advice.spec
    dtype = checkpoint_dtype(run.model) if run.model in BUNDLED_MODELS else None  # of others only the run is here
    shape = replace(run.cache_shape, itemsize=DTYPES[dtype]) if dtype in DTYPES else run.cache_shape
    if set(spec.skip_layers) >= set(shape.layers):
        return Section(heading, ("No layer of this run is worth compressing by norm: the suggestion skips them all.",))
    whole, uniform, plan = (
        [shape.nbytes(n, each) for n in LENGTHS] for each in (None, replace(spec, skip_layers=()), spec)
    )
    table: Table = {
        "tokens": list(LENGTHS),
        "full cache": [human_bytes(n) for n in whole],
        f"keep {KEEP_RATIO:.0%} everywhere": [human_bytes(n) for n in uniform],
        "with the skip list": [human_bytes(n) for n in plan],
        "saved": [f"{1 - kept / full:.0%}" for kept, full in zip(plan, whole, strict=True)],
    }
    words = [
        f"Keys and values of one sequence in {dtype or f'{run.dtype}, as it was run'}, by arithmetic, at keep ratio "
        f"{KEEP_RATIO:g} with the last {RECENT_WINDOW} tokens protected; skipped: "
        f"{layers_listed(spec.skip_layers)}. The model need not work at all of these lengths."
    ]
    code = [("With this library", library_code(spec, run.model))]
    if spec.policy == "low_norm":
        code.append(
            ("The nearest that NVIDIA's kvpress can do", kvpress_code(spec, shape, run.model, n_layers=run.n_layers))
        )
    else:
        words.append("NVIDIA's kvpress has no press that keeps high norms: its KnormPress does the opposite.")
    return Section(heading, tuple(words), table=table, code=tuple(code))


@dataclass(frozen=True, slots=True)
class _Advice:
    """What a report suggests for a run."""

    policy: str
    skipped: tuple[int, ...]
    rule: str

    @classmethod
    def of(cls, run: Study, studies: Sequence[Study]) -> _Advice:
        """By the study of the same model if there is one, since one text is an anecdote; else by the run.

        Of the paper's rule and its mirror the one that beats a random order in more layers; the paper's on a tie.
        """
        alike = (study for study in studies if study.model == run.model and study.layer_kinds == run.layer_kinds)
        measured = next(alike, run)
        found = {policy: suggest_skip_layers(measured, policy) for policy in ("low_norm", "high_norm")}
        policy = min(found, key=lambda policy: len(found[policy].layers))
        return cls(policy, found[policy].layers, found[policy].rule)

    @property
    def spec(self) -> CompressionSpec:
        return CompressionSpec(
            keep_ratio=KEEP_RATIO, policy=self.policy, skip_layers=self.skipped, protect_last=RECENT_WINDOW
        )


def _data(
    runs: Sequence[Capture],
    names: Sequence[str],
    measured: Sequence[Study],
    advice: Sequence[_Advice],
    results: Sequence[Results],
) -> str:
    told = [
        {
            "name": name,
            "model": run.model,
            "n_tokens": run.n_tokens,
            "answer": answer(study),
            "probe": "next token",
            "heads": {name: _shortened(study.of(name)[0]) for name in study.metrics} | {"verdict": verdicts(study)},
            "spec": asdict(each.spec),
        }
        for name, run, study, each in zip(names, runs, measured, advice, strict=True)
    ]
    scored = evaluation.summaries(results)
    return json_line({"l2kv_report": VERSION, "runs": told} | ({"results": scored} if scored else {}))


def _shortened(values: np.ndarray) -> np.ndarray:
    """Values to six digits, two more than tables show: all of float64 would be a tenth of the page."""
    return np.array([float(f"{value:.6g}") for value in values.flat]).reshape(values.shape)
