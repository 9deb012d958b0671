"""`capture` and `heads`: one text in one model; `instrument`: a run of no model, to check the figures by."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.cli.shared import add_device, add_model, add_probe, no_progress_bars, probe_of, text_of
from analysis.errors import RecordError


def add(commands) -> None:
    """Add the commands."""
    capture = commands.add_parser("capture", help="run a model over a text and save what its heads did")
    capture.add_argument("text", help="a text file, or - for standard input")
    capture.add_argument("-o", "--out", type=Path, required=True, help="the run to write, such as run.safetensors")
    add_model(capture)
    add_device(capture)
    capture.set_defaults(run=_capture)

    heads = commands.add_parser("heads", help="what a saved run says of each head")
    heads.add_argument("file", type=Path, help="a saved run")
    add_probe(heads)
    heads.set_defaults(run=_heads)

    instrument = commands.add_parser("instrument", help="check the figures by a synthetic run whose Γ are known")
    instrument.add_argument("-o", "--out", type=Path, help="where to write that run, such as run.safetensors")
    instrument.set_defaults(run=_instrument)


def _capture(arguments: argparse.Namespace) -> None:
    text = text_of(arguments.text)
    no_progress_bars()
    from analysis.captures import save_run
    from analysis.measures import answer
    from analysis.models.load import load_model
    from analysis.recorder import capture, readable

    loaded = load_model(arguments.model, device=arguments.device)
    for warning in readable(loaded, text)[1]:  # before a run that may take long
        print(f"warning: {warning}", file=sys.stderr)
    run = capture(loaded, text, on_layer=_progress if sys.stderr.isatty() else None)
    save_run(run, arguments.out)
    print(f"{arguments.out}: {run.n_tokens} tokens, {run.n_layers} layers, {run.seconds:.1f} s on {run.device}")
    print(f"Does low norm predict attention in {run.model}? {answer(run)}")


def _heads(arguments: argparse.Namespace) -> None:
    from analysis.captures import load_run
    from analysis.measures import answer_of, by_kv_head, verdicts_of
    from analysis.metrics import PROBES, metrics

    probe, run = probe_of(arguments.probe), load_run(arguments.file)
    if probe == "last queries" and not run.recent_positions:
        raise RecordError(f"{arguments.file} holds no last queries. Capture the text again, or take another --probe.")
    figures = metrics(run, probe=probe)
    columns = [figures.of(name) for name in ("gamma", "gamma_without_sink", "alr_per_token", "spearman")]
    share, verdict = figures.of("sink_share"), verdicts_of(*columns[:2])
    of_group = metrics(by_kv_head(run), probe=probe).of("alr_per_token")
    print(f"{run.model}, {run.n_tokens} tokens; {probe}: {PROBES[probe]}; layers and heads count from 0")
    print("kv ALR/n: of the mean attention of all query heads that read the kv head, and so lose its keys together")
    print("layer head kv_head  gamma  no_sink  ALR/n  kv ALR/n  spearman  sink  verdict")
    for layer in range(run.n_layers):
        for head in range(run.n_heads):
            gamma, without, loss, rho = (column[layer, head] for column in columns)
            print(
                f"{layer:5} {head:4} {run.kv_head(head):7}  {gamma:+z5.2f}  {without:+z7.2f}  {loss:z5.3f}  "
                f"{of_group[layer, run.kv_head(head)]:z8.3f}  "
                f"{rho:+z8.2f}  {share[layer, head]:4.2f}  {verdict[layer, head]}"
            )
    print(f"Does low norm predict attention in {run.model}? {answer_of(verdict, columns[0], n_tokens=run.n_tokens)}")


def _instrument(arguments: argparse.Namespace) -> None:
    from analysis.captures import save_run
    from analysis.selftest import check, instrument

    run = instrument()
    if arguments.out is not None:
        print(f"wrote {save_run(run, arguments.out)}")
    found = check(run)
    print("a synthetic run, of no model; layers count from 0; of each layer the head that is most off")
    print("probe         figure              layer  known  measured")
    for reading in found.readings:
        known, measured = f"{reading.known:+z.0f}", f"{reading.measured:+z.7f}"
        print(f"{reading.probe:12}  {reading.metric:18}  {reading.layer:5}  {known:>5}  {measured}")
    if not found.passed:
        sys.exit(str(found))
    print(found)


def _progress(done: int, total: int) -> None:
    print(f"\rlayer {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
