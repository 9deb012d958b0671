"""`ablation`, `front` and `evaluate`: what compressions cost in tasks and in prediction, measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, tell_notes, texts_of
from analysis.cli.options import out, spec_of
from analysis.cli.output import shown, tell, wrote


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
    from analysis.plans.ablation import causal_check
    from analysis.records import write_text
    from analysis.texts.excerpts import SPARE

    spec = spec_of(None, keep_ratio, policy, skip_layers, protect_last, config=loaded.config)
    tokens = prompt_tokens + new_tokens + SPARE
    given = excerpts_of(loaded, documents, n_tokens=tokens, at_most=excerpts)
    with shown("pass") as progress:
        found = causal_check(
            loaded,
            [excerpt.text for excerpt in given],
            spec,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            documents=[excerpt.document for excerpt in given],
            on_done=lambda done, total: progress(done, total, "passes"),
        )
    wrote(write_text(found.to_json(), to))
    tell(
        {"layer": "d", "normalised_alr": ".2f", "alr": ".2f", "nll_change": "+.4f"},
        [
            {
                "layer": layer,
                "normalised_alr": float(loss.mean()),
                "alr": float(alr.mean()),
                "nll_change": float(nll.mean()),
            }
            for layer, loss, alr, nll in zip(found.layers, found.loss, found.paper, found.nll_change, strict=True)
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
    from analysis.plans.front import measure_front
    from analysis.records import write_text
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
            keeps=keep_ratios,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            protect_last=protect_last,
            on_done=lambda done, total: progress(done, total, "passes"),
        )
    wrote(write_text(found.to_json(), to))
    agreement = ", ".join(f"{value:+.2f} at keep ratio {keep:g}" for keep, value in found.agreement().items())
    comparisons = [
        f"keep ratio {one.plan.keep:g}: {one.plan.line} against {one.uniform.line}: {one.less.value:+.3f} "
        f"[{one.less.low:+.3f}, {one.less.high:+.3f}], {one.verdict}"
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
                "keep_ratio": point.keep,
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


def _tasks() -> dict[str, Any]:
    return {"passkey": _passkey}


def evaluate(
    task: Annotated[
        str, typer.Argument(parser=options.Named(_tasks, "task"), help="The task to solve with each cache.")
    ],
    model: options.Model = defaults.MODEL,
    keep_ratios: options.KeepRatios = (0.5, 0.25),
    policies: options.Policies = ("low_norm", "high_norm", "random", "streaming", "keydiff"),
    skip_layers: options.SkipLayers = "0,1",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    lengths: options.Lengths = (400, 1000, 2000),
    depths: Annotated[
        Sequence[float],
        typer.Option(parser=options.Listed(float), metavar="LIST", help="Where in the prompt the passkey is, 0 to 1."),
    ] = (0.1, 0.3, 0.5, 0.7, 0.9),
    keys: Annotated[int, typer.Option(help="Passkeys at each length and depth.")] = 4,
    device: options.Device = None,
    to: Annotated[Path | None, out("passkey.json")] = None,
    json: options.Json = False,
) -> None:
    """Solve a task with the full cache and with compressed ones."""
    loaded = loaded_model(model, device)
    methods = {"full cache": None} | {
        f"{policy} {keep_ratio:g}": spec_of(None, keep_ratio, policy, skip_layers, protect_last, config=loaded.config)
        for keep_ratio in keep_ratios
        for policy in policies
    }
    _tasks()[task](loaded, methods, lengths, depths, keys, to, json)


def _passkey(
    loaded: Any,
    methods: dict[str, Any],
    lengths: Sequence[int],
    depths: Sequence[float],
    keys: int,
    to: Path | None,
    json: bool,
) -> None:
    """Say a number that was told in a long text, exactly; the question comes after compression."""
    from scipy.stats import binomtest

    from analysis.evaluation.run import passkey_grid, passkeys
    from analysis.records import json_text, write_text
    from analysis.statistics import Interval

    with shown("answer") as progress:
        scores = passkey_grid(
            loaded,
            methods,
            lengths=lengths,
            depths=depths,
            keys=passkeys(keys),
            on_done=lambda done, total: progress(done, total, "answers"),
        )
    rows = []
    for method in methods:
        for length in sorted(set(lengths)):
            here = [score for score in scores if (score.spec, score.n_tokens) == (method, length)]
            found, trials = sum(score.found for score in here), sum(score.trials for score in here)
            ends = binomtest(found, trials).proportion_ci(method="wilson")
            share = Interval(found / trials, ends.low, ends.high)
            rows.append({"method": method, "tokens": length, "found": found, "of": trials, "share": share})
            if method == "full cache" and not found:
                print(f"note: of {length} tokens the full cache finds none, so the rest says nothing.", file=sys.stderr)
    for length in sorted(set(lengths)):
        if length > loaded.positions:
            print(
                f"note: {loaded.name} was trained on {loaded.positions:,} tokens at once; {length:,} are more.",
                file=sys.stderr,
            )
    about = {"model": loaded.name, "specs": methods, "scores": scores}
    tell(
        {"method": "", "tokens": "d", "found": "d", "of": "d", "share": ".0%"},
        rows,
        json=json,
        title=f"{loaded.name}: passkeys found, with 95 % Wilson intervals; {len(depths)} depths, {keys} keys each; the "
        "question comes after compression",
        **about,
    )
    if to:
        wrote(write_text(json_text(about), to))
