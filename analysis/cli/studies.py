"""`study`: one model over many texts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.cli.shared import (
    add_device,
    add_model,
    add_probe,
    counter,
    metric_of,
    no_progress_bars,
    probe_of,
    tell_notes,
    texts_of,
)

if TYPE_CHECKING:
    from analysis.statistics import Means
    from analysis.studies import Study


def add(commands) -> None:
    """Add the command."""
    study = commands.add_parser("study", help="what the heads do over many texts, with intervals")
    study.add_argument("texts", nargs="+", type=Path, help="text files, or folders of .txt files")
    study.add_argument("-o", "--out", type=Path, required=True, help="the table to write, or to go on with")
    add_model(study)
    study.add_argument("--tokens", type=int, default=512, help="tokens of each excerpt (512, if the model can)")
    study.add_argument("--excerpts", type=int, default=16, help="excerpts, spread over the texts (16)")
    add_probe(study)
    study.add_argument("--metric", help="print this one of each layer too: overlap, entropy-normalised, spearman, ...")
    add_device(study)
    study.set_defaults(run=_study)


def _study(arguments: argparse.Namespace) -> None:
    texts, probe = texts_of(arguments.texts), probe_of(arguments.probe)
    metric = metric_of(arguments.metric) if arguments.metric else None
    no_progress_bars()
    from analysis.models.load import load_model
    from analysis.studies import study
    from analysis.texts.excerpts import excerpts

    loaded = load_model(arguments.model, device=arguments.device)
    most = loaded.positions - 1  # one for the next token
    if arguments.tokens > most:
        print(f"{loaded.name} was trained on {most + 1} positions: excerpts are of {most} tokens", file=sys.stderr)
    given = excerpts(loaded.tokenizer, texts, n_tokens=min(arguments.tokens, most), at_most=arguments.excerpts)
    tell_notes(loaded, (excerpt.text for excerpt in given))
    count = counter()
    try:
        done = study(loaded, given, arguments.out, on_text=lambda now: count("texts", len(now.names), now.texts))
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last text that was done.", end="")
        raise
    _print_study(done, probe)
    if metric:
        _print_metric(done, metric, probe)
    print(f"wrote {arguments.out}")


def _print_study(study: Study, probe: str) -> None:
    from analysis.metrics import PROBES
    from analysis.statistics import answer, head_verdicts, layer_losses, layer_means, means, stability

    losses, verdict = layer_losses(study, probe=probe), head_verdicts(study, probe=probe)
    columns = (
        layer_means(study, probe=probe),
        layer_means(study, "gamma_without_sink", probe=probe),
        means(losses, documents=study.documents),
    )
    print(f"{study.model}, {len(study.names)} texts of {study.n_tokens.min()} to {study.n_tokens.max()} tokens")
    print("means over heads and texts; 95 % intervals over texts; layers count from 0")
    print(f"{probe}: {PROBES[probe]}")
    print("layer  gamma                 no_sink               ALR/chance            verdicts on heads")
    for layer, words in enumerate(verdict):
        figures = "  ".join(_with_ends(of, layer, sign) for of, sign in zip(columns, ("+", "+", " "), strict=True))
        counts = ", ".join(f"{(words == name).sum()} {name}" for name in sorted(set(words)))
        print(f"{layer:5}  {figures}  {counts}")
    print(stability(losses))
    print(f"Does low norm predict attention in {study.model}? {answer(study, probe=probe)}")


def _print_metric(study: Study, metric: str, probe: str) -> None:
    import numpy as np

    from analysis.metrics import METRICS
    from analysis.statistics import head_means, layer_means

    layers, heads = layer_means(study, metric, probe=probe), head_means(study, metric, probe=probe).mean
    print(f"{metric}, {probe}: {METRICS[metric].text}")
    print("layer  mean over heads             lowest head      highest head")
    for layer, row in enumerate(heads):
        ends = ""
        if np.isfinite(row).any():
            low, high = int(np.nanargmin(row)), int(np.nanargmax(row))
            ends = f"{low:4} at {row[low]:<8.3g}  {high:4} at {row[high]:.3g}"
        print(f"{layer:5}  {_with_ends(layers, layer, ' ', 3):26}  {ends}".rstrip())


def _with_ends(of: Means, layer: int, sign: str, decimals: int = 2) -> str:
    if not of.defined[layer]:
        return f"{'undefined':20}"
    mean, low, high = (f"{values[layer]:{sign}.{decimals}f}" for values in (of.mean, of.low, of.high))
    ends = f"[{low}, {high}]" if of.defined[layer] > 1 else "[one text]"
    return f"{mean} {ends:14}"
