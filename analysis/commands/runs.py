"""`capture` and `heads`: one text in one model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.commands.shared import add_device, add_model, no_progress_bars, text_of
from analysis.run import Capture


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
    heads.set_defaults(run=_heads)


def _capture(arguments: argparse.Namespace) -> None:
    text = text_of(arguments.text)
    no_progress_bars()
    from analysis.capturing import capture
    from analysis.models import load_model
    from analysis.run import save_run

    loaded = load_model(arguments.model, device=arguments.device)
    run = capture(loaded, text, on_layer=_progress if sys.stderr.isatty() else None)
    save_run(run, arguments.out)
    for warning in run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{arguments.out}: {run.n_tokens} tokens, {run.n_layers} layers, {run.seconds:.1f} s on {run.device}")
    _print_answer(run)


def _heads(arguments: argparse.Namespace) -> None:
    from analysis.measures import alr, correlation, sink_share, verdicts
    from analysis.run import load_run

    run = load_run(arguments.file)
    columns = (correlation(run), correlation(run, leave_out=1), alr(run) / run.n_tokens, correlation(run, "spearman"))
    print(f"{run.model}, {run.n_tokens} tokens, the query of the next token; layers and heads count from 0")
    print("layer head kv_head  gamma  no_sink  ALR/n  spearman  sink  verdict")
    share, verdict = sink_share(run), verdicts(run)
    for layer in range(run.n_layers):
        for head in range(run.n_heads):
            gamma, without, loss, rho = (column[layer, head] for column in columns)
            print(
                f"{layer:5} {head:4} {run.kv_head(head):7}  {gamma:+5.2f}  {without:+7.2f}  {loss:5.3f}  {rho:+8.2f}  "
                f"{share[layer, head]:4.2f}  {verdict[layer, head]}"
            )
    _print_answer(run)


def _print_answer(run: Capture) -> None:
    from analysis.measures import answer

    print(f"Does low norm predict attention in {run.model}? {answer(run)}")


def _progress(done: int, total: int) -> None:
    print(f"\rlayer {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
