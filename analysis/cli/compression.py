"""`skip`, `plan`, `savings` and `generate`: what to keep of a cache, and what that saves."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, tell_notes, text_of, texts_of
from analysis.cli.options import out, spec_of
from analysis.cli.output import Form, shown, tell, wrote
from analysis.errors import RecordError, UserError

if TYPE_CHECKING:
    from analysis.plans.skip import SkipSuggestion
    from l2kv.spec import CompressionSpec

_SAVINGS_AT = (4096, 32_768, 131_072)


def skip(
    files: Annotated[
        list[Path],
        typer.Argument(parser=Path, metavar="FILES", help="What `ablation` wrote; or runs of one model, or a study."),
    ],
    threshold: Annotated[
        float | None, typer.Option(help="Skip layers of this NLL change (0.01) or normalised ALR (1) or more.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Skip this many, the worst.")] = None,
    gap: Annotated[bool, typer.Option("--gap", help="Skip those above the widest gap, if one stands out.")] = False,
    keep_ratio: options.KeepRatio = defaults.KEEP_RATIO,
    policy: options.Policy = "low_norm",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    to: Annotated[Path | None, out("plan.json")] = None,
    json: options.Json = False,
) -> None:
    """Choose layers to skip. By a single-layer ablation, or, as a proxy, by the ALR of runs or of a study."""
    from l2kv.spec import CompressionSpec

    if (threshold is not None) + (count is not None) + gap > 1:
        raise UserError("Give one of --threshold, --count and --gap.")
    rule: dict[str, Any] = {"rule": "gap" if gap else "threshold" if count is None else "count", "count": count or 0}
    if threshold is not None:
        rule["threshold"] = threshold
    if any(file.suffix == ".json" for file in files):
        if len(files) > 1:
            raise UserError("Give the one file that `ablation` wrote.")
        model, spec, why = _skip_by_ablation(files[0], rule)
    else:
        model, suggestion = _skip_by_alr(files, policy, rule)
        why = f"By a proxy, ALR. {suggestion.rule}"
        spec = CompressionSpec(
            keep_ratio=keep_ratio, policy=policy, skip_layers=suggestion.layers, protect_last=protect_last
        )
    tell(
        {},
        [],
        json=json,
        title=f"{model}: skip {', '.join(map(str, spec.skip_layers)) or 'no layer'}",
        answer=why,
        model=model,
        spec=spec,
    )
    _save_plan(to, model, spec, why)


def _skip_by_ablation(file: Path, rule: dict[str, Any]) -> tuple[str, CompressionSpec, str]:
    """The model, the spec that was measured with its costliest layers skipped, and why."""
    from analysis.plans.ablation import Ablation, suggest_by_ablation
    from analysis.records import load

    found = load(Ablation, file)
    suggestion = suggest_by_ablation(found, **rule)
    skipped = (*found.spec.skip_layers, *suggestion.layers)
    return found.model, replace(found.spec, skip_layers=skipped), suggestion.rule


def _skip_by_alr(files: list[Path], policy: str, rule: dict[str, Any]) -> tuple[str, SkipSuggestion]:
    """The model, and the layers of the highest normalised ALR in runs or in a study of it."""
    from analysis.captures import load_run
    from analysis.plans.skip import suggest_skip_layers
    from analysis.studies import load_study, study_of

    if policy not in ("low_norm", "high_norm"):
        raise UserError(f"--policy must be low_norm or high_norm: ALR speaks of these; got {policy!r}")
    try:
        study = load_study(files[0]) if len(files) == 1 else None
    except RecordError:
        study = None
    if study:
        return study.model, suggest_skip_layers(study, policy, **rule)
    runs = [load_run(file) for file in files]
    return runs[0].model, suggest_skip_layers(study_of(*runs, probes=["next token"]), policy, **rule)


def plan(
    texts: options.Texts,
    model: options.Model = defaults.MODEL,
    keep_ratio: options.KeepRatio = defaults.KEEP_RATIO,
    strategy: options.Strategy = "by_head",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    prompt_tokens: options.PromptTokens = defaults.PROMPT_TOKENS,
    new_tokens: options.NewTokens = defaults.NEW_TOKENS,
    device: options.Device = None,
    to: Annotated[Path | None, out("plan.json")] = None,
    json: options.Json = False,
) -> None:
    """Allocate a budget to layers or heads. By loss curves, which are measured on the texts."""
    documents = texts_of(texts)
    loaded = loaded_model(model, device)
    from analysis import recorder
    from analysis.evaluation.lm import LmSettings, prompt_of
    from analysis.models.memory import DTYPES, human_bytes
    from analysis.plans import strategies
    from analysis.plans.ablation import with_head_costs
    from analysis.plans.curves import loss_curves, slim

    costs, settings = strategies.STRATEGIES[strategy].needs_costs, LmSettings(prompt_tokens, new_tokens)
    tokens = settings.n_tokens if costs else prompt_tokens
    given = excerpts_of(loaded, documents, n_tokens=tokens, at_most=excerpts)
    with shown("step") as progress:
        runs = []
        for i, excerpt in enumerate(given):
            prompt = prompt_of(loaded.tokenizer, excerpt.text, prompt_tokens) if costs else excerpt.text
            runs.append(slim(recorder.capture(loaded, prompt, last_queries=0)))
            progress(i + 1, len(given), "texts")
        curves = loss_curves(*runs, protect_last=protect_last, documents=[excerpt.document for excerpt in given])
        if costs:
            curves = with_head_costs(curves, loaded, given, settings=settings, progress=progress)
    made = strategies.plan(curves, keep_ratio, strategy)
    spec, shape = made.to_spec(), replace(runs[0].cache_shape, itemsize=DTYPES.get(loaded.stored, 2))
    full, kept = shape.nbytes(4096), shape.nbytes(4096, spec)
    note = f"{strategy}, keep ratio {keep_ratio:g}, planned on {len(runs)} texts"
    tell(
        {"layer": "d", "keep_ratio": ".2f", "by_kv_head": ".2f", "direction": ""},
        [
            {
                "layer": layer,
                "keep_ratio": float(made.ratios[layer].mean()),
                "by_kv_head": made.ratios[layer].tolist(),
                "direction": list(made.directions[layer]) if made.directions else None,
            }
            for layer in shape.layers
        ],
        json=json,
        title=f"{loaded.name}: {note} of {min(r.n_tokens for r in runs)} to {max(r.n_tokens for r in runs)} tokens",
        answer=f"expected attention loss {made.expected_loss:.4f}; with one ratio for all {made.uniform_loss:.4f}; "
        f"at most {made.gap:.4f} less by any other allocation. On the texts of the plan: `front` measures on others.\n"
        f"at 4096 tokens {human_bytes(kept)} instead of {human_bytes(full)}: {1 - kept / full:.0%} saved",
        model=loaded.name,
        strategy=strategy,
        spec=spec,
        expected_loss=made.expected_loss,
        uniform_loss=made.uniform_loss,
    )
    _save_plan(to, loaded.name, spec, note)


def _save_plan(to: Path | None, model: str, spec: CompressionSpec, note: str) -> None:
    from analysis.plans.skip import Plan
    from analysis.records import save

    if to:
        wrote(save(Plan(model, spec, note), to))


def savings(
    model: Annotated[
        str,
        typer.Argument(
            parser=str, help="A name, a folder, a GGUF file, a config.json or a hub id; weights are not read."
        ),
    ],
    keep_ratio: options.KeepRatio = defaults.KEEP_RATIO,
    policy: options.Policy = "low_norm",
    skip_layers: options.SkipLayers = "",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    plan: options.PlanFile = None,
    gpu_gib: Annotated[float, typer.Option(help="Memory of the GPU.")] = 80,
    bandwidth_gb: Annotated[float, typer.Option(help="GB a second that its memory delivers.")] = 3350,
    batch: Annotated[int, typer.Option(help="Sequences that are decoded at once.")] = 1,
    lengths: options.Lengths = _SAVINGS_AT,
    json: options.Json = False,
) -> None:
    """Work out what a compression saves in a model. Its weights need not be at hand."""
    from analysis.models.memory import human_bytes
    from analysis.models.sizes import model_size
    from analysis.plans import export

    for name, value in (("--gpu-gib", gpu_gib), ("--bandwidth-gb", bandwidth_gb)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive and finite, got {value:g}")
    size = model_size(model)
    spec = spec_of(plan, keep_ratio, policy, skip_layers, protect_last, config=size.config)
    size.check(spec)
    found = export.savings(
        size.shape,
        spec,
        weights_bytes=size.weights_bytes,
        gpu_bytes=int(gpu_gib * 2**30),
        bandwidth=bandwidth_gb * 1e9,
        lengths=lengths,
        batch=batch,
    )
    shape, counted = size.shape, "counted from the config" if size.counted else "of the files"
    columns: dict[str, Form] = {"tokens": ",", "full_bytes": human_bytes, "kept_bytes": human_bytes, "saved": ".0%"}
    columns |= {"full_fits": _number_or_any, "kept_fits": _number_or_any, "full_ms": ".3g", "kept_ms": ".3g"}
    tell(
        columns,
        [
            {
                "tokens": row.n_tokens,
                "full_bytes": row.full_bytes,
                "kept_bytes": row.kept_bytes,
                "saved": 1 - row.kept_bytes / row.full_bytes if row.full_bytes else 0.0,
                "full_fits": row.full_fits,
                "kept_fits": row.kept_fits,
                "full_ms": 1e3 * row.full_seconds,
                "kept_ms": 1e3 * row.kept_seconds,
            }
            for row in found
        ],
        json=json,
        title=f"{size.name}: weights {human_bytes(size.weights_bytes)} ({counted}); {len(shape.layers)} layers can be "
        f"compressed, of {shape.n_kv_heads} kv heads of {shape.head_dim}, {shape.itemsize} bytes a number\n"
        f"batch {batch}, GPU of {gpu_gib:g} GiB and {bandwidth_gb:g} GB/s; by arithmetic; fits: sequences that "
        "fit; ms: of a step of a dense model, at least",
        model=size.name,
        weights_bytes=size.weights_bytes,
        spec=spec,
        batch=batch,
    )


def _number_or_any(fits: int | None) -> str:
    return "any" if fits is None else str(fits)


def generate(
    text: options.Text,
    model: options.Model = defaults.MODEL,
    keep_ratio: options.KeepRatio = defaults.KEEP_RATIO,
    policy: options.Policy = "low_norm",
    skip_layers: options.SkipLayers = "",
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    plan: options.PlanFile = None,
    new_tokens: options.NewTokens = defaults.GENERATED_TOKENS,
    chat: Annotated[bool, typer.Option("--chat", help="Ask it through the model's chat template.")] = False,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Continue a text with the full cache and with a compressed one."""
    content = text_of(text)
    if new_tokens < 1:
        raise UserError(f"--new-tokens must be 1 or more, got {new_tokens}")
    loaded = loaded_model(model, device)
    from analysis.evaluation.lm import LmSettings
    from analysis.evaluation.prompts import chat_text
    from analysis.evaluation.results import FULL
    from analysis.evaluation.run import evaluate
    from analysis.models.memory import human_bytes
    from analysis.preview import stream
    from analysis.texts.tokens import tokenize

    spec = spec_of(plan, keep_ratio, policy, skip_layers, protect_last, config=loaded.config)
    tell_notes(loaded, [content])
    with (
        shown("token") as progress,
        closing(stream(loaded, content, [None, spec], max_new_tokens=new_tokens, chat=chat)) as steps,
    ):
        for i, columns in enumerate(steps):
            progress(i + 1, new_tokens, "tokens")
            full, compressed = columns
    pairs = list(zip(full.token_ids, compressed.token_ids, strict=False))
    same, longest = sum(a == b for a, b in pairs), max(len(full.token_ids), len(compressed.token_ids))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None if same == longest else len(pairs))
    told = "no difference" if first is None else f"the first difference is at new token {first}"
    read = chat_text(loaded.tokenizer, content) if chat else content
    prompt = len(tokenize(loaded.tokenizer, read))
    change = None
    if (new := len(tokenize(loaded.tokenizer, read + full.text)) - prompt) > 0:
        both = {FULL: None, "compressed": spec}
        settings = LmSettings(prompt, new)
        measured = evaluate(loaded, "lm", both, texts=[("text", read + full.text)], settings=settings)
        change = float(measured.change("compressed").mean())
    tell(
        {},
        [
            {"cache": name, "bytes": step.nbytes, "text": step.text}
            for name, step in (("full", full), ("compressed", compressed))
        ],
        json=json,
        title=f"full cache, {human_bytes(full.nbytes)}: {full.text}\n"
        f"compressed, {human_bytes(compressed.nbytes)}: {compressed.text}",
        answer=f"{told}; {same} of {longest} tokens agree"
        + ("" if change is None else f"\nthe full cache's text with the compressed cache: {change:+.4f} nats/token"),
        model=loaded.name,
        spec=spec,
        first_difference=first,
        nll_change=change,
    )
