"""`ablation`, `front` and `evaluate`: what compressions cost in tasks and in prediction, measured."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperGroup
from typer.main import get_command

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, tell_notes, texts_of
from analysis.cli.options import out, spec_of
from analysis.cli.output import Row, shown, tell, wrote
from analysis.cli.program import program

if TYPE_CHECKING:
    import numpy as np

    from analysis.evaluation.results import Results
    from analysis.plans.front import Front
    from analysis.statistics import Interval


def ablation(
    texts: options.Texts,
    to: Annotated[Path, out("ablation.json")],
    model: options.Model = defaults.MODEL,
    keep_ratio: options.KeepRatio = defaults.KEEP_RATIO,
    policy: options.Policy = "low_norm",
    skip_layers: options.SkipLayers = "",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    prompt_tokens: options.PromptTokens = defaults.PROMPT_TOKENS,
    new_tokens: options.NewTokens = defaults.NEW_TOKENS,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Compress each layer alone, and measure the NLL change. It is told beside the layer's ALR."""
    documents = texts_of(texts)
    loaded = loaded_model(model, device)
    from analysis.evaluation.lm import LmSettings
    from analysis.plans.ablation import ablate_layers
    from analysis.records import save
    from analysis.texts.excerpts import SPARE

    spec = spec_of(None, keep_ratio, policy, skip_layers, protect_last, config=loaded.config)
    given = excerpts_of(loaded, documents, n_tokens=prompt_tokens + new_tokens + SPARE, at_most=excerpts)
    with shown("pass") as progress:
        found = ablate_layers(loaded, given, spec, settings=LmSettings(prompt_tokens, new_tokens), progress=progress)
    wrote(save(found, to))
    columns = {"normalised_alr": found.normalised_alr, "alr": found.alr, "nll_change": found.nll_change}
    tell(
        {"layer": "d", "normalised_alr": ".2f", "alr": ".2f", "nll_change": "+.4f"},
        [
            {"layer": layer} | {name: float(v[i].mean()) for name, v in columns.items() if v is not None}
            for i, layer in enumerate(found.layers)
        ],
        json=json,
        title=f"{found.model}: NLL change in nats/token when only this layer is compressed",
        answer=str(found),
        model=found.model,
        spec=found.spec,
    )


def front(
    texts: options.Texts,
    to: Annotated[Path, out("front.json")],
    model: options.Model = defaults.MODEL,
    plan_texts: Annotated[
        list[Path],
        typer.Option(parser=Path, help="A file to plan on, in place of a part of TEXTS; again for more files."),
    ] = [],  # noqa: B006
    keep_ratios: options.KeepRatios = defaults.KEEP_RATIOS,
    strategies: options.Strategies = (),
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    prompt_tokens: options.PromptTokens = defaults.PROMPT_TOKENS,
    new_tokens: options.NewTokens = defaults.NEW_TOKENS,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Compare allocation strategies at several budgets. On texts that they were not planned on: a Pareto front."""
    documents, planned = texts_of(texts), texts_of(plan_texts) if plan_texts else None
    loaded = loaded_model(model, device)
    from analysis.evaluation.lm import LmSettings
    from analysis.plans.front import measure_front
    from analysis.records import save
    from analysis.texts.excerpts import SPARE, SPLIT, planning_and_measuring

    tokens = prompt_tokens + new_tokens + SPARE
    if planned:
        planning = excerpts_of(loaded, planned, n_tokens=tokens, at_most=excerpts)
        measuring = excerpts_of(loaded, documents, n_tokens=tokens, at_most=excerpts)
    else:
        planning, measuring = planning_and_measuring(loaded.tokenizer, documents, n_tokens=tokens, each=excerpts)
        tell_notes(loaded, (excerpt.text for excerpt in (*planning, *measuring)))
    with shown("pass") as progress:
        found = measure_front(
            loaded,
            planning,
            measuring,
            keep_ratios=keep_ratios,
            strategies=strategies or None,
            settings=LmSettings(prompt_tokens, new_tokens),
            protect_last=protect_last,
            progress=progress,
        )
    wrote(save(found, to))
    tell(
        {
            "strategy": "",
            "keep_ratio": ".2f",
            "MiB": ".2f",
            "nll_change": "+.3f",
            "planned_loss": ".3f",
            "measured_loss": ".3f",
        },
        [
            {
                "strategy": point.strategy,
                "keep_ratio": point.keep_ratio,
                "MiB": point.nbytes / 2**20,
                "nll_change": found.interval(point),
                "planned_loss": point.planned_loss,
                "measured_loss": point.measured_loss,
            }
            for points in found.lines.values()
            for point in points
        ],
        json=json,
        title="" if planned else SPLIT,
        answer="\n".join(_of_front(found)),
        model=found.model,
        planned_on=found.planned_on,
        measured_on=found.measured_on,
    )


def _of_front(found: Front) -> Iterator[str]:
    yield from (f"not possible: {words}" for words in found.left_out)
    agreement = ", ".join(f"{value:+.2f} at keep ratio {keep:g}" for keep, value in found.agreement().items())
    yield f"Spearman over strategies of expected attention loss, on the measured texts, and NLL change: {agreement}"
    for one in found.comparisons():
        less = f"{one.less.value:+.3f} [{one.less.low:+.3f}, {one.less.high:+.3f}], {one.verdict}"
        yield f"keep ratio {one.plan.keep_ratio:g}: {one.plan.strategy} against {one.uniform.strategy}: {less}"
    yield found.answer()


class Tasks(TyperGroup):
    """A command for each registered task, looked up when it is asked for. Its settings are options."""

    def list_commands(self, ctx: Any) -> list[str]:
        from analysis.evaluation.tasks import TASKS

        return list(TASKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from analysis.evaluation.tasks import TASKS

        task = TASKS.find(cmd_name)

        def command(**given: Any) -> None:
            _evaluate(cmd_name, **given)

        shared = list(inspect.signature(_evaluate, eval_str=True).parameters.values())[1:-1]
        if not task.needs_texts:
            shared = [parameter for parameter in shared if parameter.name not in ("texts", "excerpts")]
        hints = get_type_hints(task.settings)
        own = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_option(hints[field.name])
            )
            for field in fields(task.settings)
        ]
        command.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        command.__name__, command.__doc__ = cmd_name, f"{task.about} {inspect.getdoc(task.settings)}"
        return get_command(program(command))


def _option(kind: Any) -> Any:
    """The option of a setting: a number, a word, or several of them with commas."""
    if several := get_args(kind):
        return Annotated[Sequence[Any], typer.Option(parser=options.Listed(several[0]), metavar="LIST")]
    return Annotated[kind, typer.Option()]


def _evaluate(
    task: str,
    *,
    texts: options.Texts = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    plans: Annotated[
        list[Path], typer.Option("--plan", parser=Path, help="A plan's file to evaluate as well; again for more.")
    ] = [],  # noqa: B006
    keep_ratios: options.KeepRatios = (0.5, 0.25),
    policies: options.Policies = ("low_norm", "high_norm", "random", "streaming", "keydiff"),
    skip_layers: options.SkipLayers = "0,1",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
    to: Annotated[Path | None, out("results.json")] = None,
    json: options.Json = False,
    **settings: Any,
) -> None:
    """Score a model on a task with the full cache and with compressed ones."""
    from analysis.evaluation.results import FULL
    from analysis.evaluation.tasks import TASKS
    from analysis.plans.skip import Plan
    from analysis.records import load, save

    chosen = TASKS.find(task)
    set_to = chosen.settings(**settings)
    saved = {file.stem: load(Plan, file).spec for file in plans}
    documents = texts_of(texts) if chosen.needs_texts else {}
    loaded = loaded_model(model, device)
    from analysis.evaluation.run import evaluate
    from analysis.texts.excerpts import SPARE

    methods = (
        {FULL: None}
        | saved
        | {
            f"{policy} {keep_ratio:g}": spec_of(
                None, keep_ratio, policy, skip_layers, protect_last, config=loaded.config
            )
            for keep_ratio in keep_ratios
            for policy in policies
        }
    )
    tokens = sum(number for name, number in asdict(set_to).items() if name.endswith("_tokens")) + SPARE
    given = excerpts_of(loaded, documents, n_tokens=tokens, at_most=excerpts) if documents else ()
    with shown("sample") as progress:
        results = evaluate(loaded, task, methods, texts=given, settings=set_to, progress=progress)
    if to:
        wrote(save(results, to))
    axes = tuple(results.rows[0].at)[:1]
    for (n_tokens,) in results.grouped(*axes) if axes == ("n_tokens",) else ():
        if n_tokens > loaded.positions:
            print(
                f"note: {loaded.name} was trained on {loaded.positions:,} tokens at once; {n_tokens:,} are more.",
                file=sys.stderr,
            )
    better = "higher" if chosen.higher_is_better else "lower"
    tell(
        {"method": "", **dict.fromkeys(axes, "g"), "samples": "d", "score": ".3f", "change": "+.3f", "MiB": ".2f"},
        _scores(results, axes),
        json=json,
        title=f"{loaded.name}, {chosen.title}: {chosen.about}\n{chosen.unit}, {better} is better; 95 % intervals; change: against the full cache",
        results=results.table(),
        **{name: getattr(results, name) for name in ("model", "task", "settings", "methods")},
    )


def _scores(results: Results, axes: tuple[str, ...]) -> Iterator[Row]:
    for method in results.methods:
        for at, scores in results.scores_by(method, *axes).items():
            yield {
                "method": method,
                **dict(zip(axes, at, strict=True)),
                "samples": len(scores),
                "score": _interval(results, scores),
                "change": None if axes else results.interval(results.change(method)),
                "MiB": results.nbytes(method) / 2**20,
            }


def _interval(results: Results, scores: np.ndarray) -> Interval:
    """Wilson's of what is found or not; else documents are resampled, where all samples are there."""
    from analysis.statistics import Interval

    if ((scores == 0) | (scores == 1)).all():
        from scipy.stats import binomtest

        ends = binomtest(int(scores.sum()), len(scores)).proportion_ci(method="wilson")
        return Interval(float(scores.mean()), ends.low, ends.high)
    if len(scores) == len(results.samples):
        return results.interval(scores)
    return Interval(float(scores.mean()), float("nan"), float("nan"))
