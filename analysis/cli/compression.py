"""`skip`, `plan`, `savings` and `generate`: what to keep of a cache, and what that saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis import defaults
from analysis.captures import Capture
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, quiet_libraries, tell_notes, text_of, texts_of
from analysis.cli.options import CompressionOrPlan, out, refuse
from analysis.cli.output import Form, row_of, shown, tell, wrote
from analysis.errors import UserError
from analysis.evaluation.lm import Lengths, LmSettings
from analysis.evaluation.prompts import chat_text
from analysis.evaluation.results import FULL
from analysis.models.sizes import model_size
from analysis.plans import ablation, export, strategies
from analysis.plans.curves import LossCurves, curves_of
from analysis.plans.skip import Plan, suggest_skip_layers
from analysis.records import load_any, save
from analysis.studies import Study, load_study, study_of
from analysis.texts.tokens import tokenize
from analysis.words import counted, human_bytes, span
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


def skip(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(parser=Path, metavar="FILES", help="One ablation, one study, or runs of one model."),
    ],
    threshold: Annotated[
        float | None,
        typer.Option(help="Skip layers at or above this NLL change (0.01) or normalised ALR (1). The default rule."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Skip this many layers, the worst first.")] = None,
    gap: Annotated[
        bool, typer.Option("--gap", help="Skip the layers above the widest gap, if one stands out.")
    ] = False,
    keep_ratio: options.KeepRatio = defaults.KEEP_RATIO,
    policy: options.PolicyOfAlr = "low_norm",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    to: Annotated[Path | None, out("plan.json")] = None,
    json: options.Json = False,
) -> None:
    """Choose layers to skip, by an ablation or by a proxy, ALR. An ablation's plan compresses as it was measured."""
    if (threshold is not None) + (count is not None) + gap > 1:
        raise UserError("Give one of --threshold, --count and --gap.")
    rule: dict[str, Any] = {"rule": "gap" if gap else "threshold" if count is None else "count", "count": count or 0}
    if threshold is not None:
        if not 0 <= threshold < math.inf:
            raise UserError(f"--threshold must be 0 or more, and finite, got {threshold:g}")
        rule["threshold"] = threshold
    read = [load_any((ablation.Ablation, Study, Capture), file) for file in files]
    if len(read) > 1 and not all(isinstance(one, Capture) for one in read):
        raise UserError("Give one ablation, or one study, or runs alone.")
    if isinstance(measured := read[0], ablation.Ablation):
        refuse(context, ("keep_ratio", "policy", "protect_last"), f"{files[0].name} says how to compress")
        suggested = ablation.suggest_by_ablation(measured, **rule)
        spec, why = measured.spec, suggested.rule
    else:
        suggested = suggest_skip_layers(
            measured if isinstance(measured, Study) else study_of(*read, probes=["next token"]), policy, **rule
        )
        spec = CompressionSpec(keep_ratio=keep_ratio, policy=policy, protect_last=protect_last)
        why = f"By a proxy, ALR. {suggested.rule}"
    spec = replace(spec, skip_layers=(*spec.skip_layers, *suggested.layers))
    title = f"{measured.model}: skip {', '.join(map(str, spec.skip_layers)) or 'no layer'}"
    tell({}, [], json=json, title=title, answer=why, model=measured.model, spec=spec)
    _save_plan(to, measured.model, spec, why)


def plan(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            parser=Path,
            metavar="TEXTS",
            help="Text files, or folders of .txt files; or one study, whose model and texts are planned for.",
        ),
    ],
    lengths: Lengths,
    model: options.Model = defaults.MODEL,
    keep_ratio: options.KeepRatio = defaults.KEEP_RATIO,
    strategy: options.Strategy = "by_head",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
    to: Annotated[Path | None, out("plan.json")] = None,
    json: options.Json = False,
) -> None:
    """Allocate a budget to layers or heads, by loss curves: those of a study, or measured on texts."""
    if any(source.suffix == ".safetensors" for source in sources):
        name, curves, n_tokens = _of_study(context, sources, protect_last)
    else:
        documents = texts_of(sources)
        loaded = loaded_model(model, device)
        tokens = lengths.n_tokens if strategies.STRATEGIES[strategy].needs_costs else lengths.prompt_tokens
        given = excerpts_of(loaded, documents, n_tokens=tokens, at_most=excerpts)
        with shown("step") as progress:
            curves = ablation.measured_curves(
                loaded, given, strategy, protect_last=protect_last, settings=lengths.settings, progress=progress
            )
        name, n_tokens = loaded.name, [run.n_tokens for run in curves.captures]
    made = strategies.plan(curves, keep_ratio, strategy)
    spec, note = made.to_spec(), f"{strategy}, keep ratio {keep_ratio:g}, planned on {counted(len(n_tokens), 'text')}"
    tell(
        {"layer": "d", "keep_ratio": ".2f", "by_kv_head": ".2f", "direction": ""},
        made.table(),
        json=json,
        title=f"{name}: {note} of {span(n_tokens)} tokens",
        answer=str(made),
        model=name,
        strategy=strategy,
        spec=spec,
        expected_loss=made.expected_loss,
        uniform_loss=made.uniform_loss,
    )
    _save_plan(to, name, spec, note)


def _of_study(context: typer.Context, files: Sequence[Path], protect_last: int) -> tuple[str, LossCurves, list[int]]:
    """Model, loss curves and lengths of the texts of one study. Raises UserError."""
    if len(files) > 1:
        raise UserError("Give one study, or texts alone.")
    of_texts = ("model", "device", "excerpts", "prompt_tokens", "new_tokens")
    refuse(context, of_texts, f"{files[0].name} has a model and texts of its own")
    read = load_study(files[0])
    curves = curves_of(read)
    if protect_last != read.protect_last:
        raise UserError(
            f"{files[0].name} protects the last {read.protect_last} tokens, and {protect_last} were asked for. Give "
            f"--protect-last {read.protect_last}, or the texts in place of the study."
        )
    return read.model, curves, read.n_tokens.tolist()


def _save_plan(to: Path | None, model: str, spec: CompressionSpec, note: str) -> None:
    if to:
        wrote(save(Plan(model, spec, note), to))


def savings(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            parser=str,
            metavar="MODEL",
            help="Name, folder, GGUF file, config.json or hub id. Weights are not read.",
        ),
    ],
    compression: CompressionOrPlan,
    gpu_gib: Annotated[float, typer.Option(help="Memory of the GPU, in GiB.")] = 80,
    bandwidth_gb: Annotated[float, typer.Option(help="Memory bandwidth of the GPU, in GB/s.")] = 3350,
    batch: Annotated[int, typer.Option(help="Sequences to decode at once.")] = 1,
    lengths: Annotated[Sequence[int], options.listed(int, "Lengths in tokens.")] = (4096, 32_768, 131_072),
    json: options.Json = False,
) -> None:
    """Calculate what a compression saves in a model, which need not be at hand."""
    for name, value in (("--gpu-gib", gpu_gib), ("--bandwidth-gb", bandwidth_gb)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive and finite, got {value:g}")
    compression.check(context)
    quiet_libraries()
    size = model_size(model)
    spec, shape = compression.spec(size.config), size.shape
    size.check(spec)
    found = export.savings(
        shape,
        spec,
        weights_bytes=size.weights_bytes,
        gpu_bytes=int(gpu_gib * 2**30),
        bandwidth=bandwidth_gb * 1e9,
        lengths=lengths,
        batch=batch,
    )
    columns: dict[str, Form] = {"n_tokens": ",", "full_bytes": human_bytes, "kept_bytes": human_bytes, "saved": ".0%"}
    columns |= dict.fromkeys(("full_fits", "kept_fits"), lambda fits: "any" if fits is None else str(fits))
    columns |= {"full_ms": ".3g", "kept_ms": ".3g"}
    counted = "counted from the config" if size.counted else "of the files"
    tell(
        columns,
        [
            row_of(
                row,
                saved=1 - row.kept_bytes / row.full_bytes if row.full_bytes else 0.0,
                full_ms=1e3 * row.full_seconds,
                kept_ms=1e3 * row.kept_seconds,
            )
            for row in found
        ],
        json=json,
        title=f"{size.name}: weights {human_bytes(size.weights_bytes)} ({counted}); {len(shape.layers)} layers can be "
        f"compressed, of {shape.n_kv_heads} kv heads of {shape.head_dim}, {shape.itemsize} bytes a number\n"
        f"batch {batch}, GPU of {gpu_gib:g} GiB and {bandwidth_gb:g} GB/s. Computed, not measured. fits: number of "
        "sequences; ms: lower bound for one decoding step of a dense model",
        model=size.name,
        weights_bytes=size.weights_bytes,
        spec=spec,
        batch=batch,
    )


def generate(
    context: typer.Context,
    text: options.Text,
    compression: CompressionOrPlan,
    model: options.Model = defaults.MODEL,
    new_tokens: options.NewTokens = defaults.GENERATED_TOKENS,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text through the model's chat template.")] = False,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Continue a text with the full cache and with a compressed one."""
    compression.check(context)
    content = text_of(text)
    if new_tokens < 1:
        raise UserError(f"--new-tokens must be 1 or more, got {new_tokens}")
    loaded = loaded_model(model, device)
    from analysis.preview import stream

    spec = compression.spec(loaded.config)
    tell_notes(loaded, [content])
    with (
        shown("token") as progress,
        closing(stream(loaded, content, [None, spec], max_new_tokens=new_tokens, chat=chat)) as steps,
    ):
        for i, columns in enumerate(steps):
            progress(i + 1, new_tokens, "tokens")
            full, compressed = columns
    pairs = list(zip_longest(full.token_ids, compressed.token_ids))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    told = "no difference" if first is None else f"the first difference is at new token {first}"
    told += f"; {sum(a == b for a, b in pairs)} of {len(pairs)} tokens agree"
    change = _nll_change(loaded, chat_text(loaded.tokenizer, content) if chat else content, full.text, spec)
    if change is not None:
        told += f"\nthe full cache's text with the compressed cache: {change:+.4f} nats/token"
    caches = {"full": full, "compressed": compressed}
    tell(
        {},
        [{"cache": name, "bytes": step.nbytes, "text": step.text} for name, step in caches.items()],
        json=json,
        title=f"full cache, {human_bytes(full.nbytes)}: {full.text}\n"
        f"compressed, {human_bytes(compressed.nbytes)}: {compressed.text}",
        answer=told,
        model=loaded.name,
        spec=spec,
        first_difference=first,
        nll_change=change,
    )


def _nll_change(loaded: LoadedModel, prompt: str, text: str, spec: CompressionSpec) -> float | None:
    """NLL change of a text after a prompt, by compression, in nats/token; None where the text has no tokens."""
    from analysis.evaluation.run import evaluate

    prompt_tokens = len(tokenize(loaded.tokenizer, prompt))
    new = len(tokenize(loaded.tokenizer, prompt + text)) - prompt_tokens
    if new <= 0:
        return None
    settings = LmSettings(prompt_tokens, new)
    both = {FULL: None, "compressed": spec}
    found = evaluate(loaded, "lm", both, texts=[("text", prompt + text)], settings=settings)
    return float(found.change("compressed").mean())
