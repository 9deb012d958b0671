"""`ablation`, `front` and `evaluate`: what compressions cost in tasks and in prediction, measured."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, tell_notes, texts_of
from analysis.cli.options import Compression, out
from analysis.cli.output import Form, form_of, shown, tell, wrote
from analysis.cli.program import program, spread
from analysis.evaluation.lm import LmSettings
from analysis.evaluation.results import FULL
from analysis.evaluation.tasks import TASKS
from analysis.models.memory import human_bytes
from analysis.plans.ablation import ablate_layers
from analysis.plans.front import measure_front
from analysis.plans.skip import Plan
from analysis.records import load, save
from analysis.texts.excerpts import SPLIT, planning_and_measuring

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


def ablation(
    texts: options.Texts,
    to: Annotated[Path, out("ablation.json")],
    compression: Compression,
    lengths: LmSettings,
    model: options.Model = defaults.MODEL,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure the NLL change of compressing each layer alone, beside its ALR."""
    documents = texts_of(texts)
    loaded = loaded_model(model, device)
    spec = compression.spec(loaded.config)
    given = excerpts_of(loaded, documents, n_tokens=lengths.n_tokens, at_most=excerpts)
    with shown("pass") as progress:
        found = ablate_layers(loaded, given, spec, settings=lengths, progress=progress)
    wrote(save(found, to))
    tell(
        {"layer": "d", "normalised_alr": form_of("normalised_alr"), "alr": ".2f", "nll_change": "+.4f"},
        found.table(),
        json=json,
        title=f"{found.model}: NLL change in nats/token when only this layer is compressed",
        answer=str(found),
        model=found.model,
        spec=found.spec,
    )


def front(
    texts: options.Texts,
    to: Annotated[Path, out("front.json")],
    lengths: LmSettings,
    model: options.Model = defaults.MODEL,
    plan_texts: Annotated[
        list[Path],
        typer.Option(parser=Path, help="Text file to plan on, instead of a part of TEXTS; repeat for more."),
    ] = [],  # noqa: B006
    keep_ratios: options.KeepRatios = defaults.KEEP_RATIOS,
    strategies: options.Strategies = (),
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Compare allocation strategies at several budgets, on texts they were not planned on: a Pareto front."""
    documents, planned = texts_of(texts), texts_of(plan_texts) if plan_texts else None
    loaded = loaded_model(model, device)
    if planned:
        planning, measuring = (
            excerpts_of(loaded, given, n_tokens=lengths.n_tokens, at_most=excerpts) for given in (planned, documents)
        )
    else:
        planning, measuring = planning_and_measuring(
            loaded.tokenizer, documents, n_tokens=lengths.n_tokens, each=excerpts
        )
        tell_notes(loaded, (excerpt.text for excerpt in (*planning, *measuring)))
    with shown("pass") as progress:
        found = measure_front(
            loaded,
            planning,
            measuring,
            keep_ratios=keep_ratios,
            strategies=strategies or None,
            settings=lengths,
            protect_last=protect_last,
            progress=progress,
        )
    wrote(save(found, to))
    columns: dict[str, Form] = {"strategy": "", "keep_ratio": ".2f", "nbytes": human_bytes}
    tell(
        columns | {"nll_change": "+.3f", "planned_loss": ".3f", "measured_loss": ".3f"},
        found.table(),
        json=json,
        title="" if planned else SPLIT,
        answer=str(found),
        model=found.model,
        planned_on=found.planned_on,
        measured_on=found.measured_on,
    )


class Tasks(TyperGroup):
    """A command for each registered task, looked up when it is asked for. Its settings are options."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the tasks that are registered now."""
        return list(TASKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a task. Raises BadParameter, with the nearest name, where there is none."""
        name = options.Named(TASKS)(cmd_name)
        task = TASKS[name]
        omit = () if task.needs_texts else ("texts", "excerpts")
        command = spread(partial(_evaluate, name), omit=omit, settings=task.settings)
        command.__name__, command.__doc__ = name, task.about
        return get_command(program(command))


def _evaluate(
    task: str,
    settings: Any,
    texts: options.Texts = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    plan: Annotated[
        list[Path], typer.Option(parser=Path, help="Saved plan to evaluate as well; repeat for more.")
    ] = [],  # noqa: B006
    keep_ratios: options.KeepRatios = (0.5, 0.25),
    policies: options.Policies = ("low_norm", "high_norm", "random", "streaming", "keydiff"),
    skip_layers: options.SkipLayers = "0,1",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
    to: Annotated[Path | None, out("results.json")] = None,
    json: options.Json = False,
) -> None:
    """Score a model on a task with the full cache and with compressed ones."""
    chosen = TASKS[task]
    saved = {file.stem: load(Plan, file).spec for file in plan}
    documents = texts_of(texts) if chosen.needs_texts else {}
    loaded = loaded_model(model, device)
    from analysis.evaluation.run import evaluate

    compressions = (
        Compression(keep_ratio=keep_ratio, policy=policy, skip_layers=skip_layers, protect_last=protect_last)
        for keep_ratio in keep_ratios
        for policy in policies
    )
    specs = {f"{one.policy} {one.keep_ratio:g}": one.spec(loaded.config) for one in compressions}
    methods = {FULL: None, **saved, **specs}
    given = excerpts_of(loaded, documents, n_tokens=settings.n_tokens, at_most=excerpts) if documents else ()
    with shown("sample") as progress:
        results = evaluate(loaded, task, methods, texts=given, settings=settings, progress=progress)
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
