"""`capture`, `heads`, `study` and `selftest`: what the heads of a model do, on one text and on many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import analysis.selftest as synthetic
from analysis import defaults, studies
from analysis.captures import load_run, save_run
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, text_of, texts_of
from analysis.cli.options import out
from analysis.cli.output import form_of, row_of, shown, tell, wrote
from analysis.errors import RecordError
from analysis.measures import by_kv_head
from analysis.metrics import METRICS, PROBES, metrics
from analysis.statistics import Interval, means, stability
from analysis.studies import head_means, layer_alr, layer_means
from analysis.verdicts import answer, verdicts
from analysis.words import counted, span

_QUESTION = "Does low norm predict attention in"


def capture(
    text: options.Text,
    to: Annotated[Path, out("run.safetensors")],
    model: options.Model = defaults.MODEL,
    device: options.Device = None,
) -> None:
    """Run a model over a text, and save what its heads did."""
    content = text_of(text)
    loaded = loaded_model(model, device)
    from analysis import recorder

    for warning in recorder.readable(loaded, content)[1]:  # before a run that may take long
        print(f"warning: {warning}", file=sys.stderr)
    with shown("layer") as progress:
        run = recorder.capture(loaded, content, progress=progress)
    wrote(save_run(run, to))
    print(
        f"{run.model}: {counted(run.n_tokens, 'token')}, {counted(run.n_layers, 'layer')}, "
        f"{run.seconds:.1f} s on {run.device}"
    )
    print(f"{_QUESTION} {run.model}? {answer(studies.study_of(run))}")


def heads(
    run: Annotated[Path, typer.Argument(parser=Path, help="Saved run.", metavar="RUN")],
    probe: options.Probe = options.PROBE,
    json: options.Json = False,
) -> None:
    """Print the metrics of each head in a saved run."""
    read = load_run(run)
    if probe == "last queries" and not read.recent_positions:
        raise RecordError(f"{run} holds no last queries. Capture the text again, or take another --probe.")
    study = studies.study_of(read, probes=[probe])
    verdict = verdicts(study, probe=probe)
    of_group = metrics(by_kv_head(read), probe, names=["alr_per_token"]).values[0]
    rows = [
        {"layer": layer, "head": head, "kv_head": read.kv_head(head)}
        | {name: float(study.of(name, probe=probe)[0, layer, head]) for name in study.metrics}
        | {"kv_alr_per_token": float(of_group[layer, read.kv_head(head)]), "verdict": str(verdict[layer, head])}
        for layer, head in np.ndindex(verdict.shape)
    ]
    columns = dict.fromkeys(("layer", "head", "kv_head"), "d")
    columns |= {name: form_of(name) for name in ("gamma", "gamma_skip_first", "alr_per_token")}
    columns |= {"kv_alr_per_token": "z.3f", "spearman": form_of("spearman"), "sink_share": ".2f", "verdict": ""}
    tell(
        columns,
        rows,
        json=json,
        title=f"{read.model}, {read.n_tokens} tokens; {probe}: {PROBES[probe]}; layers and heads count from 0\n"
        "kv alr per token: of the mean attention of all query heads that read the kv head, so lose its keys together",
        answer=f"{_QUESTION} {read.model}? {answer(study, probe=probe)}",
        model=read.model,
        tokens=read.n_tokens,
        probe=probe,
    )


def study(
    to: Annotated[Path, out("study.safetensors; a study that is there is resumed")],
    texts: options.Texts = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    tokens: options.ExcerptTokens = defaults.EXCERPT_TOKENS,
    excerpts: options.Excerpts = defaults.STUDY_EXCERPTS,
    probe: options.Probe = options.PROBE,
    metric: options.Metric = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure the heads over many texts, with intervals. Run it again to resume a study that was stopped."""
    documents = texts_of(texts)
    loaded = loaded_model(model, device)
    most = loaded.positions - 1  # one for the next token
    if tokens > most:
        print(f"{loaded.name} was trained on {most + 1} positions: excerpts are of {most} tokens", file=sys.stderr)
    given = excerpts_of(loaded, documents, n_tokens=min(tokens, most), at_most=excerpts)
    try:
        with shown("text") as progress:
            done = studies.study(loaded, given, to, progress=progress)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last text that was done.", file=sys.stderr)
        raise
    _tell_study(done, probe, metric, json=json)
    wrote(to)


def _tell_study(done: studies.Study, probe: str, metric: str | None, *, json: bool) -> None:
    losses, verdict = layer_alr(done, probe=probe), verdicts(done, probe=probe)
    of_layers = {name: layer_means(done, name, probe=probe) for name in ("gamma", "gamma_skip_first")}
    of_layers["layer_alr"] = means(losses, documents=done.documents)
    title = (
        f"{done.model}, {counted(len(done.names), 'text')} of {span(done.n_tokens.tolist())} tokens\n"
        f"means over heads and texts; 95 % intervals over texts; layers count from 0\n{probe}: {PROBES[probe]}"
    )
    ends: list[dict[str, str]] = [{} for _ in verdict]
    if metric:
        of_layers[metric] = layer_means(done, metric, probe=probe)
        ends = [_extremes(of_heads) for of_heads in head_means(done, metric, probe=probe).mean]
        title += f"\n{METRICS[metric].title}, in the mean, and in the heads where it is lowest and highest: "
        title += METRICS[metric].about
    rows = [
        {"layer": layer}
        | {name: Interval(*(float(v[layer]) for v in (m.mean, m.low, m.high))) for name, m in of_layers.items()}
        | ends[layer]
        | {"verdicts": ", ".join(f"{(words == name).sum()} {name}" for name in sorted(set(words)))}
        for layer, words in enumerate(verdict)
    ]
    columns = {"layer": "d"} | {name: form_of(name) if name in METRICS else "z.3f" for name in of_layers}
    tell(
        columns | dict.fromkeys((*ends[0], "verdicts"), ""),
        rows,
        json=json,
        title=title,
        answer=f"{stability(losses)}\n{_QUESTION} {done.model}? {answer(done, probe=probe)}",
        model=done.model,
        texts=done.names,
        probe=probe,
    )


def _extremes(by_head: np.ndarray) -> dict[str, str]:
    """The heads of a layer in which a metric is lowest and highest."""
    if not np.isfinite(by_head).any():
        return {"lowest": "", "highest": ""}
    ends = {"lowest": np.nanargmin(by_head), "highest": np.nanargmax(by_head)}
    return {name: f"head {head}: {by_head[head]:.3g}" for name, head in ends.items()}


def selftest(to: Annotated[Path | None, out("run.safetensors")] = None, json: options.Json = False) -> None:
    """Check the metrics on a synthetic run of known values: gamma is -1, 0 and +1."""
    run = synthetic.synthetic_run()
    if to is not None:
        wrote(save_run(run, to))
    found = synthetic.check(run)
    tell(
        {"probe": "", "metric": "", "layer": "d", "known": "+z.0f", "measured": "+z.7f"},
        map(row_of, found.readings),
        json=json,
        title="a synthetic run, of no model; layers count from 0; of each layer the head that is most off",
        answer=str(found),
    )
    if not found.passed:
        raise typer.Exit(1)
