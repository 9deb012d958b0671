"""`ablation`, `front` and `evaluate`: what compressions cost in tasks and in prediction, measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, tell_notes, texts_of
from analysis.cli.options import Compression, CompressionOfPairs, out, refuse
from analysis.cli.output import Form, form_of, part_of_file, shown, tell, wrote
from analysis.cli.program import program, spread
from analysis.evaluation.lm import Lengths
from analysis.evaluation.methods import compare, prompt_length
from analysis.evaluation.results import FULL
from analysis.evaluation.task import Task
from analysis.evaluation.tasks import TASKS
from analysis.extras import needs
from analysis.models.load import outline
from analysis.plans.ablation import ablate_layers
from analysis.plans.curves import curves_of
from analysis.plans.front import costs_beside, measure_front
from analysis.plans.skip import Plan
from analysis.records import load, save
from analysis.studies import load_study
from analysis.texts.excerpts import SPLIT, Texts, planning_and_measuring
from analysis.words import human_bytes
from l2kv.config import CacheShape
from l2kv.spec import SCHEDULES, CompressionSpec

if TYPE_CHECKING:
    from analysis.evaluation.run import Workers

SEEN, REFERENCE = SCHEDULES


def ablation(
    to: Annotated[Path, out("ablation.json; what a stopped run measured is kept beside it")],
    compression: CompressionOfPairs,
    lengths: Lengths,
    texts: options.Texts = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure the NLL change of compressing each layer alone, beside its ALR. Run it again to go on."""
    documents = texts_of(texts)
    loaded = loaded_model(model, device)
    spec = compression.spec(loaded.config)
    given = excerpts_of(loaded, documents, n_tokens=lengths.n_tokens, at_most=excerpts)
    part = part_of_file(to)
    with shown("pass") as progress:
        found = ablate_layers(loaded, given, spec, settings=lengths.settings, out=part, progress=progress)
    wrote(save(found, to))
    part.unlink()
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
    to: Annotated[Path, out("front.json; what a stopped run measured is kept beside it")],
    lengths: Lengths,
    texts: options.Texts = [],  # noqa: B006
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
    """Compare allocation strategies at several budgets, on texts they were not planned on: a Pareto front.

    Run it again to go on where it was stopped.
    """
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
    part = part_of_file(to)
    with shown("pass") as progress:
        found = measure_front(
            loaded,
            planning,
            measuring,
            keep_ratios=keep_ratios,
            strategies=strategies or None,
            settings=lengths.settings,
            protect_last=protect_last,
            out=part,
            progress=progress,
        )
    wrote(save(found, to))
    part.unlink()
    costs_beside(part).unlink(missing_ok=True)
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
        omit = {"texts": task.texts == "no", "excerpts": task.excerpt_tokens is None, "by_position": bool(task.scoring)}
        omitted = [name for name, applies in omit.items() if applies]
        command = spread(partial(_evaluate, name), omit=omitted, settings=task.settings)
        command.__name__, command.__doc__ = name, task.about
        return get_command(program(command))


def _evaluate(
    task: str,
    context: typer.Context,
    settings: Any,
    texts: Annotated[
        list[Path],
        typer.Argument(
            parser=Path, metavar="TEXTS", help="Text files, or folders of .txt files; the bundled texts by default."
        ),
    ] = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    plan: Annotated[
        list[Path], typer.Option(parser=Path, help="Saved plan to evaluate as well; repeat for more.")
    ] = [],  # noqa: B006
    keep_ratios: options.KeepRatios = (0.5, 0.25),
    policies: options.Policies = ("low_norm", "high_norm", "streaming", "keydiff"),
    strategies: Annotated[
        Sequence[str], options.listed(options.STRATEGIES, "Allocation strategies to compare as well, by --study.")
    ] = (),
    study: Annotated[
        Path | None, typer.Option(parser=Path, help="Saved study whose loss curves the strategies go by.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Compare with random tokens too: of all, and of those between the protected ends.")
    ] = True,
    skip_layers: options.SkipLayers = "",
    protect_first: options.ProtectFirst = 0,
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    key_bits: options.KeyBits = None,
    value_bits: options.ValueBits = None,
    key_channels: options.KeyChannels = 1.0,
    prune_after: Annotated[int, typer.Option(help="Number of pairs a head must hold before any is evicted.")] = 0,
    schedule: Annotated[
        str | None,
        typer.Option(parser=options.WHEN, help=f"When to evict; by default {REFERENCE} with --chunk-size."),
    ] = None,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
    by_position: Annotated[int, typer.Option(help="Print NLL and accuracy for each group of this many positions.")] = 0,
    ray: Annotated[
        str | None, typer.Option(help="Ray cluster to run on: HOST:PORT, or auto for one on this machine.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Copies of the model on it; by default one for each GPU or machine.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            "--output-dir",
            parser=Path,
            help="File to write rows to as they are computed, or its folder; run again to continue it.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Score a model on a task with the full cache and with compressed ones."""
    chosen = TASKS[task]
    saved, curves = saved_plans(plan), curves_of(load_study(study)) if study else None
    documents = texts_of(texts) if texts or (chosen.texts == "must" and not chosen.bundled) else None
    if documents is None:
        refuse(context, ("excerpts",), "without TEXTS the number of excerpts is fixed")
    if ray is None:
        refuse(context, ("workers",), "without --ray there is one copy of the model")
    loaded = outline(model, device=device) if ray else loaded_model(model, device)
    from analysis.evaluation.run import evaluate, samples_of
    from analysis.evaluation.work import estimate

    given: Texts | None = documents
    if documents and chosen.excerpt_tokens:
        given = excerpts_of(loaded, documents, n_tokens=chosen.excerpt_tokens(settings), at_most=excerpts)
    when = schedule or (REFERENCE if getattr(settings, "chunk_size", 0) else SEEN)
    common = Compression(
        skip_layers=skip_layers,
        protect_last=protect_last,
        key_bits=key_bits,
        value_bits=value_bits,
        key_channels=key_channels,
    ).spec(loaded.config)
    comparison = compare(
        CacheShape.of(loaded.config, loaded.model.dtype.itemsize),
        replace(common, protect_first=protect_first, prune_after=prune_after, schedule=when),
        n_tokens=prompt_length(samples_of(loaded, task, texts=given, settings=settings)[0]),
        keep_ratios=keep_ratios,
        policies=policies,
        strategies=strategies,
        curves=curves,
        plans=saved,
        baselines=baselines,
    )
    methods = comparison.methods
    if ray is None:
        print(f"about {estimate(loaded, task, methods, texts=given, settings=settings)}", file=sys.stderr)
    file = to / f"{task}.jsonl" if to and (to.is_dir() or not to.suffix) else to
    with _workers(ray, model, workers, device) as its, shown("sample") as progress:
        results = evaluate(
            loaded,
            task,
            methods,
            texts=given,
            settings=settings,
            out=file,
            workers=its,
            notes=comparison.notes,
            progress=progress,
        )
    if file:
        wrote(file)
    summary = results.summary(chosen)
    for note in (*results.notes, *_useless(chosen, summary)):
        print(f"note: {note}", file=sys.stderr)
    rows = results.by_position(width=by_position) if by_position else summary
    better = "higher" if chosen.higher_is_better else "lower"
    change = "; change: against the full cache" if "change" in rows[0] else ""
    tell(
        {name: _FORMS.get(name, "") for name in rows[0]},
        rows,
        json=json,
        title=f"{loaded.name}, {chosen.title}: {chosen.about}\n"
        f"score: {chosen.unit}, {better} is better; 95 % intervals{change}; "
        f"compressed: {', '.join(dict.fromkeys(row.compressed for row in results.rows if row.compressed)) or 'never'}",
        results=results.table(),
        **{name: getattr(results, name) for name in ("model", "task", "settings", "methods", "run", "notes")},
        work=results.work(),
    )


def _workers(
    address: str | None, model: str, workers: int | None, device: str | None
) -> AbstractContextManager[Workers | None]:
    """The workers of a Ray cluster, or none where there is no address."""
    if address is None:
        return nullcontext()
    with needs("ray"):
        from analysis.evaluation.cluster import ray_workers
    return ray_workers(model, address=address, workers=workers, device=device)


def saved_plans(files: Sequence[Path]) -> list[tuple[str, CompressionSpec]]:
    """Compressions of saved plans, by the stems of their files, or by their paths where two have one stem."""
    stems = [file.stem for file in files]
    return [(str(file) if stems.count(file.stem) > 1 else file.stem, load(Plan, file).spec) for file in files]


_FORMS: dict[str, Form] = {"n_tokens": "d", "samples": "d", "MiB": ".2f", "score": ".3f", "change": "+.3f"}
_FORMS |= {"allocated_MiB": ".2f"}
_FORMS |= {"perplexity": ".2f", "perplexity_ratio": ".3f", "accuracy": ".3f", "position": "d", "nll": ".3f"}


def _useless(task: Task, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Notes on where the full cache fails, so that the other methods can't be told apart."""
    for row in rows:
        if row["method"] == FULL and task.higher_is_better and not row["score"].value:
            at = {axis: row[axis] for axis in task.axes if axis in row}
            place = ", ".join(f"{value:,} tokens" if axis == "n_tokens" else str(value) for axis, value in at.items())
            yield f"the full cache scores 0{f' at {place}' if place else ''}, so the other rows say nothing."
