"""`causal` and `front`: what compressions cost in prediction, measured on texts."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.cli.shared import counter, tell_notes, texts_of
from analysis.cli.specs import add_excerpts, add_out, add_spec, loaded_model, spec_of


def add(commands) -> None:
    """Add the commands."""
    causal = commands.add_parser("causal", help="compress each layer alone: does ALR tell what that costs?")
    add_excerpts(causal)
    add_spec(causal)
    add_out(causal, "causal.json", required=True)
    causal.set_defaults(run=_causal)

    front = commands.add_parser("front", help="what each way to share out a budget costs, on texts it has not seen")
    add_excerpts(front)
    front.add_argument(
        "--plan-texts", nargs="+", type=Path, help="to plan on (every second file, or the first half of one file)"
    )
    front.add_argument("--keeps", nargs="+", type=float, help="budgets (0.1 0.2 0.3 0.5 0.7)")
    front.add_argument("--protect-last", type=int, default=32, help="latest tokens that are never evicted (32)")
    add_out(front, "front.json", required=True)
    front.set_defaults(run=_front)


def _causal(arguments: argparse.Namespace) -> None:
    texts = texts_of(arguments.texts)
    loaded, count = loaded_model(arguments), counter()
    from analysis.plans.ablation import causal_check
    from analysis.records import write_text
    from analysis.texts.excerpts import SPARE, excerpts

    spec = spec_of(arguments, n_layers=loaded.config.num_hidden_layers)
    tokens = arguments.prompt_tokens + arguments.new_tokens + SPARE
    given = excerpts(loaded.tokenizer, texts, n_tokens=tokens, at_most=arguments.excerpts)
    tell_notes(loaded, (excerpt.text for excerpt in given))
    check = causal_check(
        loaded,
        [excerpt.text for excerpt in given],
        spec,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        documents=[excerpt.document for excerpt in given],
        on_done=lambda done, total: count("passes", done, total),
    )
    write_text(check.to_json(), arguments.out)
    print("layer  ALR/chance  paper's ALR  NLL change, nats a token, of compressing it alone")
    for layer, loss, paper, change in zip(check.layers, check.loss, check.paper, check.nll_change, strict=True):
        print(f"{layer:5}  {loss.mean():10.2f}  {paper.mean():11.2f}  {change.mean():+.4f}")
    print(check)
    print(f"wrote {arguments.out}")


def _front(arguments: argparse.Namespace) -> None:
    texts, plan_on = texts_of(arguments.texts), texts_of(arguments.plan_texts) if arguments.plan_texts else None
    loaded, count = loaded_model(arguments), counter()
    from analysis.plans.front import KEEPS, measure_front
    from analysis.records import write_text
    from analysis.texts.excerpts import SPARE, SPLIT, excerpts, planning_and_measuring

    tokens, n = arguments.prompt_tokens + arguments.new_tokens + SPARE, arguments.excerpts
    if plan_on:
        planning = excerpts(loaded.tokenizer, plan_on, n_tokens=tokens, at_most=n)
        measuring = excerpts(loaded.tokenizer, texts, n_tokens=tokens, at_most=n)
    else:
        planning, measuring = planning_and_measuring(loaded.tokenizer, texts, n_tokens=tokens, each=n)
        print(SPLIT)
    tell_notes(loaded, (excerpt.text for excerpt in (*planning, *measuring)))
    front = measure_front(
        loaded,
        planning,
        measuring,
        keeps=arguments.keeps or KEEPS,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        protect_last=arguments.protect_last,
        on_done=lambda done, total: count("passes", done, total),
    )
    write_text(front.to_json(), arguments.out)
    print(
        "way                              keep      MiB  NLL change (95 % interval)  attention lost: planned, measured"
    )
    for name, points in front.lines.items():
        for point in points:
            at, change = f"{point.keep:4.2f}  {point.nbytes / 2**20:7.2f}", front.interval(point)
            losses = f"{point.planned_loss:.3f}, {point.measured_loss:.3f}" if point.planned_loss >= 0 else ""
            print(f"{name:31}  {at}  {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]  {losses}")
    for words in front.left_out:
        print(f"left out: {words}")
    agree = ", ".join(f"{value:+.2f} at {keep:g}" for keep, value in front.agreement().items())
    print(
        f"Spearman over ways of the attention expected to be lost on the measured texts and of what they cost: {agree}."
    )
    for one in front.comparisons():
        less = f"{one.less.value:+.3f} [{one.less.low:+.3f}, {one.less.high:+.3f}]"
        print(f"keep {one.plan.keep:g}: {one.plan.line} against {one.uniform.line}: {less}, {one.verdict}")
    print(front.answer())
    print(f"wrote {arguments.out}")
