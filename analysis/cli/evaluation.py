"""`ablation`, `front` and `evaluate`: what compressions cost in tasks and in prediction, measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, tell_notes, texts_of
from analysis.cli.options import out, spec_of
from analysis.cli.output import shown, tell, wrote
from analysis.errors import UserError


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
    tell(
        {"layer": "d", "normalised_alr": ".2f", "alr": ".2f", "nll_change": "+.4f"},
        [
            {
                "layer": layer,
                "normalised_alr": float(loss.mean()),
                "alr": float(alr.mean()),
                "nll_change": float(nll.mean()),
            }
            for layer, loss, alr, nll in zip(
                found.layers, found.normalised_alr, found.alr, found.nll_change, strict=True
            )
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
    from analysis.plans.strategies import title_of
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
    agreement = ", ".join(f"{value:+.2f} at keep ratio {keep:g}" for keep, value in found.agreement().items())
    comparisons = [
        f"keep ratio {one.plan.keep_ratio:g}: {title_of(one.plan.strategy)} against {title_of(one.uniform.strategy)}: "
        f"{one.less.value:+.3f} [{one.less.low:+.3f}, {one.less.high:+.3f}], {one.verdict}"
        for one in found.comparisons()
    ]
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
                "strategy": name,
                "keep_ratio": point.keep_ratio,
                "MiB": point.nbytes / 2**20,
                "nll_change": found.interval(point),
                "planned_loss": point.planned_loss if point.planned_loss >= 0 else None,
                "measured_loss": point.measured_loss if point.measured_loss >= 0 else None,
            }
            for name, points in found.lines.items()
            for point in points
        ],
        json=json,
        title="" if planned else SPLIT,
        answer="\n".join(
            [
                *(f"not possible: {words}" for words in found.left_out),
                "Spearman over strategies of the attention expected to be lost on the measured texts and of the NLL "
                f"change: {agreement}.",
                *comparisons,
                found.answer(),
            ]
        ),
        model=found.model,
        planned_on=found.planned_on,
        measured_on=found.measured_on,
    )


def evaluate(
    task: Annotated[str, typer.Argument(parser=options.TASKS, help="What is solved with each cache.")],
    texts: Annotated[
        list[Path],
        typer.Argument(parser=Path, metavar="TEXTS", help="Text files, or folders of them, where the task needs any."),
    ] = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    keep_ratios: options.KeepRatios = (0.5, 0.25),
    policies: options.Policies = ("low_norm", "high_norm", "random", "streaming", "keydiff"),
    skip_layers: options.SkipLayers = "0,1",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of `lm`: tokens of each excerpt that are compressed.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Of `lm`: tokens after them that are predicted.")] = None,
    lengths: Annotated[
        Sequence[int] | None,
        typer.Option(parser=options.Listed(int), metavar="LIST", help="Of `passkey`: tokens of the prompts."),
    ] = None,
    depths: Annotated[
        Sequence[float] | None,
        typer.Option(
            parser=options.Listed(float), metavar="LIST", help="Of `passkey`: where the key is told, from 0 to 1."
        ),
    ] = None,
    keys: Annotated[int | None, typer.Option(help="Of `passkey`: keys at each length and depth.")] = None,
    device: options.Device = None,
    to: Annotated[Path | None, out("results.json")] = None,
    json: options.Json = False,
) -> None:
    """Solve a task with the full cache and with compressed ones."""
    from analysis.evaluation.tasks import TASKS

    given = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "lengths": lengths,
        "depths": depths,
        "keys": keys,
    }
    settings = _settings(
        task, TASKS[task].settings, {name: value for name, value in given.items() if value is not None}
    )
    documents = texts_of(texts) if TASKS[task].needs_texts else {}
    loaded = loaded_model(model, device)
    from analysis.evaluation.results import FULL
    from analysis.evaluation.run import evaluate as run_task
    from analysis.records import save

    methods = {FULL: None} | {
        f"{policy} {keep_ratio:g}": spec_of(None, keep_ratio, policy, skip_layers, protect_last, config=loaded.config)
        for keep_ratio in keep_ratios
        for policy in policies
    }
    cut = excerpts_of(loaded, documents, n_tokens=settings.n_tokens, at_most=excerpts) if documents else ()
    with shown("sample") as progress:
        results = run_task(loaded, task, methods, texts=cut, settings=settings, progress=progress)
    rows = results.summary()
    if TASKS[task].higher_is_better:
        for row in rows:
            if row["method"] == FULL and not row["score"].value:
                print(f"note: the full cache scores 0 where {_place(row)}, so the rest says nothing.", file=sys.stderr)
    tell(
        {name: _FORMS.get(name, "g") for name in rows[0]},
        rows,
        json=json,
        title=f"{loaded.name}: {TASKS[task].title}, score in {TASKS[task].unit} with 95 % intervals; "
        + ", ".join(f"{name} {value}" for name, value in results.settings.items()),
        model=loaded.name,
        task=task,
        settings=results.settings,
        specs=methods,
    )
    if to:
        wrote(save(results, to))


_FORMS = {"method": "", "samples": "d", "MiB": ".2f", "score": ".3f", "change": "+.3f"}


def _settings(task: str, kind: type, given: dict[str, Any]) -> Any:
    """The settings of a task, as far as they were given. Raises UserError for those that it does not have."""
    known, given = [field.name for field in fields(kind)], {n: value for n, value in given.items() if value is not None}
    if foreign := [name for name in given if name not in known]:
        shown_names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise UserError(f"The task {task} has no {shown_names}.")
    return kind(**given)


def _place(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} is {value:g}" for name, value in row.items() if name not in _FORMS) or "it was asked"
