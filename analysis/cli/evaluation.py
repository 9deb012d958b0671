"""`ablation`, `front` and `evaluate`: what compressions cost in tasks and in prediction, measured."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup
from typer.main import get_command

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, tell_notes, texts_of
from analysis.cli.options import out, spec_of
from analysis.cli.output import shown, tell, wrote
from analysis.cli.program import program

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.plans.front import Front


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

    spec = spec_of(None, keep_ratio, policy, skip_layers, protect_last, config=loaded.config)
    settings = LmSettings(prompt_tokens, new_tokens)
    given = excerpts_of(loaded, documents, n_tokens=settings.n_tokens, at_most=excerpts)
    with shown("pass") as progress:
        found = ablate_layers(loaded, given, spec, settings=settings, progress=progress)
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
    from analysis.texts.excerpts import SPLIT, planning_and_measuring

    settings = LmSettings(prompt_tokens, new_tokens)
    tokens = settings.n_tokens
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
            settings=settings,
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
        """Names of the tasks that are registered now."""
        from analysis.evaluation.tasks import TASKS

        return list(TASKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a task. Raises SettingsError, with the nearest name, where there is none."""
        from analysis.evaluation.tasks import TASKS

        task = TASKS.find(cmd_name)

        def command(**given: Any) -> None:
            _evaluate(cmd_name, **given)

        shared = list(inspect.signature(_evaluate, eval_str=True).parameters.values())[1:-1]
        if not task.needs_texts:
            shared = [parameter for parameter in shared if parameter.name not in ("texts", "excerpts")]
        hints = get_type_hints(task.settings, include_extras=True)
        own = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_option(hints[field.name])
            )
            for field in fields(task.settings)
        ]
        command.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        command.__name__, command.__doc__ = cmd_name, task.about
        return get_command(program(command))


def _option(hint: Any) -> Any:
    """The option of a setting: a number, a word, or several of them with commas."""
    kind, about = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    if several := get_args(kind):
        return Annotated[Sequence[Any], typer.Option(parser=options.Listed(several[0]), metavar="LIST", help=about)]
    return Annotated[kind, typer.Option(help=about)]


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

    specs = {
        f"{policy} {keep_ratio:g}": spec_of(None, keep_ratio, policy, skip_layers, protect_last, config=loaded.config)
        for keep_ratio in keep_ratios
        for policy in policies
    }
    methods = {FULL: None, **saved, **specs}
    given = excerpts_of(loaded, documents, n_tokens=set_to.n_tokens, at_most=excerpts) if documents else ()
    with shown("sample") as progress:
        results = evaluate(loaded, task, methods, texts=given, settings=set_to, progress=progress)
    if to:
        wrote(save(results, to))
    rows = results.summary(right=chosen.right)
    for row in rows:
        if row["method"] == FULL:
            _warn(loaded, row, useless=chosen.higher_is_better and not row["score"].value)
    better = "higher" if chosen.higher_is_better else "lower"
    tell(
        {name: _FORMS.get(name, "") for name in rows[0]},
        rows,
        json=json,
        title=f"{loaded.name}, {chosen.title}: {chosen.about}\n"
        f"score in {chosen.unit}, {better} is better; 95 % intervals; change: against the full cache",
        results=results.table(),
        **{name: getattr(results, name) for name in ("model", "task", "settings", "methods")},
    )


_FORMS = {"n_tokens": "d", "samples": "d", "MiB": ".2f", "score": ".3f", "change": "+.3f"}


def _warn(loaded: LoadedModel, row: dict[str, Any], *, useless: bool) -> None:
    """Say on standard error where the full cache fails, or the prompt is longer than the model was trained on."""
    n_tokens = row.get("n_tokens", 0)
    if useless:
        at = f" at {n_tokens:,} tokens" if n_tokens else ""
        print(f"note: the full cache scores 0{at}, so the other rows say nothing.", file=sys.stderr)
    if n_tokens > loaded.positions:
        trained = f"{loaded.name} was trained on {loaded.positions:,} tokens at once"
        print(f"note: {trained}; {n_tokens:,} are more.", file=sys.stderr)
