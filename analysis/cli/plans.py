"""`skip`, `plan`, `savings` and `generate`: what to keep of a cache, and what that saves."""

from __future__ import annotations

import argparse
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.cli.shared import add_device, add_model, counter, tell_notes, text_of, texts_of
from analysis.cli.specs import add_excerpts, add_out, add_spec, loaded_model, spec_of
from analysis.errors import RecordError, UserError

if TYPE_CHECKING:
    from analysis.plans.allocation import AllocationPlan
    from analysis.plans.skip import SkipSuggestion
    from l2kv.spec import CompressionSpec


def add(commands) -> None:
    """Add the commands."""
    skip = commands.add_parser("skip", help="which layers to leave whole: as measured by `causal`, or by a proxy")
    skip.add_argument(
        "files", nargs="+", type=Path, help="what `causal` wrote (.json); or, for ALR, runs of one model, or one study"
    )
    rules = skip.add_mutually_exclusive_group()
    rules.add_argument("--threshold", type=float, help="skip layers of this cost (0.01) or ALR / chance (1) or more")
    rules.add_argument("--count", type=int, help="skip so many, the worst")
    rules.add_argument("--gap", action="store_true", help="skip those above the widest gap, if one stands out")
    add_spec(skip, skip_layers=False)
    add_out(skip)
    skip.set_defaults(run=_skip)

    plan = commands.add_parser("plan", help="share out a budget over layers or heads, from measured loss curves")
    add_excerpts(plan)
    plan.add_argument("--keep", type=float, default=0.5, help="the budget, a share of all pairs (0.5)")
    plan.add_argument("--by", default="head", help="head or layer (head)")
    plan.add_argument("--method", default="dp", help="dp, hull, uniform, skip, global or adakv (dp)")
    plan.add_argument("--policy", default="signed_norm", help="signed_norm, low_norm or high_norm (signed_norm)")
    plan.add_argument("--protect-last", type=int, default=32, help="latest tokens that are never evicted (32)")
    plan.add_argument(
        "--weighed", action="store_true", help="count attention by what compressing each head alone costs"
    )
    plan.add_argument("--whole-without-signal", action="store_true", help="heads whose norms tell nothing stay whole")
    add_out(plan)
    plan.set_defaults(run=_plan)

    savings = commands.add_parser("savings", help="what a compression saves in a model, which need not be there")
    savings.add_argument(
        "model", help="a bundled name, a folder, a GGUF file, a config.json or a hub id: weights are not read"
    )
    add_spec(savings)
    savings.add_argument("--gpu-gib", type=float, default=80, help="memory of the GPU (80)")
    savings.add_argument("--bandwidth-gb", type=float, default=3350, help="its memory's GB a second (3350)")
    savings.add_argument("--batch", type=int, default=1, help="sequences decoded at once (1)")
    savings.add_argument("--lengths", nargs="+", type=int, help="tokens of each (4096 32768 131072)")
    savings.set_defaults(run=_savings)

    generate = commands.add_parser("generate", help="go on with a text over the full cache and over a compressed one")
    generate.add_argument("text", help="a text file, or - for standard input")
    add_model(generate)
    add_spec(generate)
    generate.add_argument("--new-tokens", type=int, default=64, help="at most (64)")
    generate.add_argument("--chat", action="store_true", help="ask it as a question, through the model's chat template")
    add_device(generate)
    generate.set_defaults(run=_generate)


def _write_plan(arguments: argparse.Namespace, model: str, spec: CompressionSpec, note: str) -> None:
    from analysis.plans.skip import Plan
    from analysis.records import save

    if arguments.out:
        print(f"wrote {save(Plan(model, spec, note), arguments.out)}")


def _skip(arguments: argparse.Namespace) -> None:
    from l2kv.spec import CompressionSpec

    rule = "gap" if arguments.gap else "threshold" if arguments.count is None else "count"
    options = {} if arguments.threshold is None else {"threshold": arguments.threshold}
    options |= {"rule": rule, "count": arguments.count or 0}
    measured = [file for file in arguments.files if file.suffix == ".json"]
    if measured:
        if len(arguments.files) > 1:
            raise UserError("Give the one file that `causal` wrote.")
        model, spec, words = _skip_by_cost(measured[0], options)
    else:
        model, suggestion = _skip_by_alr(arguments, options)
        words = f"By a proxy, ALR. {suggestion.rule}"
        spec = CompressionSpec(
            keep_ratio=arguments.keep,
            policy=arguments.policy,
            skip_layers=suggestion.layers,
            protect_last=arguments.protect_last,
        )
    print(f"{model}: leave whole {', '.join(map(str, spec.skip_layers)) or 'no layer'}")
    print(words)
    _write_plan(arguments, model, spec, words)


def _skip_by_cost(file: Path, options: dict) -> tuple[str, CompressionSpec, str]:
    """The model, the spec that was measured with its costliest layers skipped, and why."""
    from analysis.files import read_text
    from analysis.plans.ablation import CausalCheck, suggest_by_cost

    check = CausalCheck.from_json(read_text(file))
    suggestion = suggest_by_cost(check, **options)
    skipped = (*check.spec.skip_layers, *suggestion.layers)
    return check.model, replace(check.spec, skip_layers=skipped), suggestion.rule


def _skip_by_alr(arguments: argparse.Namespace, options: dict) -> tuple[str, SkipSuggestion]:
    """The model, and the layers of most ALR / chance in runs or in a study of it."""
    from analysis.captures import load_run
    from analysis.plans.skip import suggest_skip_layers
    from analysis.studies import load_study

    try:
        measured = load_study(arguments.files[0]) if len(arguments.files) == 1 else None
    except RecordError:
        measured = None
    measured = measured or [load_run(file) for file in arguments.files]
    model = measured[0].model if isinstance(measured, list) else measured.model
    if arguments.policy not in ("low_norm", "high_norm"):
        raise UserError(f"--policy must be low_norm or high_norm: ALR speaks of these; got {arguments.policy!r}")
    return model, suggest_skip_layers(measured, arguments.policy, **options)


def _plan(arguments: argparse.Namespace) -> None:
    texts = texts_of(arguments.texts)
    loaded, count = loaded_model(arguments), counter()
    from analysis.evaluation.run import prompt_of
    from analysis.models.memory import DTYPES, human_bytes
    from analysis.plans.ablation import weighed_by_cost
    from analysis.plans.allocation import plan
    from analysis.plans.curves import loss_curves, slim
    from analysis.recorder import capture
    from analysis.texts.excerpts import SPARE, excerpts

    runs, prompt = [], arguments.prompt_tokens
    tokens = prompt + (arguments.new_tokens + SPARE) * arguments.weighed
    given = excerpts(loaded.tokenizer, texts, n_tokens=tokens, at_most=arguments.excerpts)
    tell_notes(loaded, (excerpt.text for excerpt in given))
    for i, (_, text, _) in enumerate(given):
        text = prompt_of(loaded, text, prompt) if arguments.weighed else text
        runs.append(slim(capture(loaded, text, last_queries=0)))
        count("texts", i + 1, len(given))
    documents = [excerpt.document for excerpt in given]
    curves = loss_curves(*runs, protect_last=arguments.protect_last, documents=documents)
    if arguments.weighed:
        curves = weighed_by_cost(
            curves,
            loaded,
            [excerpt.text for excerpt in given],
            prompt_tokens=prompt,
            new_tokens=arguments.new_tokens,
            on_done=lambda done, total: count("passes", done, total),
        )
    made = plan(
        curves,
        arguments.keep,
        by=arguments.by,
        method=arguments.method,
        policy=arguments.policy,
        whole_without_signal=arguments.whole_without_signal,
        weighed=arguments.weighed,
    )
    spec, shape = made.to_spec(), replace(runs[0].cache_shape, itemsize=DTYPES.get(loaded.stored, 2))
    how = f"{made.method} by {arguments.by}" + ", weighed by cost" * arguments.weighed
    note = f"{how}, keep {made.keep:g}, planned on {len(runs)} texts"
    print(f"{loaded.name}: {note} of {min(r.n_tokens for r in runs)} to {max(r.n_tokens for r in runs)} tokens")
    _print_ratios(made)
    print(
        f"{'cost expected, in what heads cost alone' if arguments.weighed else 'attention expected to be lost'} "
        f"{made.expected_loss:.4f}; by one ratio for all {made.uniform_loss:.4f}; no plan in such steps loses less by "
        f"over {made.gap:.4f}. On the texts it was made from: `front` measures on others."
    )
    whole, kept = shape.nbytes(4096), shape.nbytes(4096, spec)
    print(f"at 4096 tokens {human_bytes(kept)} instead of {human_bytes(whole)}: {1 - kept / whole:.0%} saved")
    _write_plan(arguments, loaded.name, spec, note)


def _print_ratios(made: AllocationPlan) -> None:
    print(
        "layer  keeps  by kv head; - is low norm kept and + high norm"
        if made.directions
        else "layer  keeps  by kv head"
    )
    for layer, row in enumerate(made.ratios):
        if not made.compressible[layer]:
            print(f"{layer:5}  a sliding window: left alone")
            continue
        signs = (
            ["-+"[direction == "high"] for direction in made.directions[layer]] if made.directions else [""] * len(row)
        )
        heads = "  ".join(f"{ratio:.2f}{sign}" for ratio, sign in zip(row, signs, strict=True))
        print(f"{layer:5}  {row.mean():5.2f}  {heads}")


def _savings(arguments: argparse.Namespace) -> None:
    from analysis.models.memory import human_bytes
    from analysis.models.sizes import model_size
    from analysis.plans.export import LENGTHS, savings

    for name, value in (("--gpu-gib", arguments.gpu_gib), ("--bandwidth-gb", arguments.bandwidth_gb)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive and finite, got {value:g}")
    size = model_size(arguments.model)
    spec = spec_of(arguments, n_layers=size.config.num_hidden_layers)
    size.check(spec)
    rows = savings(
        size.shape,
        spec,
        weights_bytes=size.weights_bytes,
        gpu_bytes=int(arguments.gpu_gib * 2**30),
        bandwidth=arguments.bandwidth_gb * 1e9,
        lengths=arguments.lengths or LENGTHS,
        batch=arguments.batch,
    )
    how = "counted from the config" if size.counted else "of the files"
    print(
        f"{size.name}: weights {human_bytes(size.weights_bytes)} ({how}), {len(size.shape.layers)} layers that can be"
    )
    print(
        f"compressed, {size.shape.n_kv_heads} kv heads of {size.shape.head_dim}, {size.shape.itemsize} bytes a number"
    )
    print(
        f"batch {arguments.batch}, GPU of {arguments.gpu_gib:g} GiB and {arguments.bandwidth_gb:g} GB/s; by arithmetic"
    )
    print("  tokens   full cache   compressed   saved   sequences that fit   ms a step of a dense model, at least")
    for row in rows:
        fits, ms = (
            f"{whole} to {kept}"
            for whole, kept in (
                (
                    "any" if row.whole_fits is None else row.whole_fits,
                    "any" if row.kept_fits is None else row.kept_fits,
                ),
                (f"{1e3 * row.whole_seconds:.3g}", f"{1e3 * row.kept_seconds:.3g}"),
            )
        )
        saved = 1 - row.kept_bytes / row.whole_bytes if row.whole_bytes else 0.0
        print(
            f"{row.n_tokens:8,}  {human_bytes(row.whole_bytes):>11}  {human_bytes(row.kept_bytes):>11}  {saved:6.0%}"
            f"   {fits:>18}   {ms:>35}"
        )


def _generate(arguments: argparse.Namespace) -> None:
    text = text_of(arguments.text)
    loaded, count = loaded_model(arguments), counter()
    from analysis.evaluation.prompts import chat_text
    from analysis.evaluation.run import nll_changes
    from analysis.models.memory import human_bytes
    from analysis.preview import stream
    from analysis.texts.tokens import tokenize

    spec, n = spec_of(arguments, n_layers=loaded.config.num_hidden_layers), arguments.new_tokens
    tell_notes(loaded, [text])
    if n < 1:
        raise UserError(f"--new-tokens must be 1 or more, got {n}")
    with closing(stream(loaded, text, [None, spec], max_new_tokens=n, chat=arguments.chat)) as steps:
        for i, columns in enumerate(steps):
            count("tokens", i + 1, n)
            full, compressed = columns
    for name, step in (("full cache", full), ("compressed", compressed)):
        print(f"{name}, {human_bytes(step.nbytes)}: {step.text}")
    pairs = list(zip(full.token_ids, compressed.token_ids, strict=False))
    same, longest = sum(a == b for a, b in pairs), max(len(full.token_ids), len(compressed.token_ids))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    where = (
        "no difference"
        if same == longest
        else f"the first difference is at new token {len(pairs) if first is None else first}"
    )
    print(f"{where}; {same} of {longest} tokens agree")
    read = chat_text(loaded.tokenizer, text) if arguments.chat else text
    prompt = len(tokenize(loaded.tokenizer, read))
    whole = read + full.text
    if (new := len(tokenize(loaded.tokenizer, whole)) - prompt) > 0:
        (change,) = nll_changes(loaded, [whole], {"": spec}, prompt_tokens=prompt, new_tokens=new)
        print(f"the full cache's text over the compressed cache: {change.mean:+.4f} nats a token")
