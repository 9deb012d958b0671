"""What the commands that compress share: which compression, of which model, on which texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.cli.shared import add_device, add_model, no_progress_bars

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from l2kv.spec import CompressionSpec


def add_spec(parser: argparse.ArgumentParser, *, skip_layers: bool = True) -> None:
    """--keep and the like, and where a skip list is not what is looked for, --plan instead of them."""
    parser.add_argument("--keep", type=float, default=0.5, help="share of the tokens that is kept (0.5)")
    parser.add_argument("--policy", default="low_norm", help="what stays: low_norm, high_norm, random, ... (low_norm)")
    parser.add_argument("--protect-last", type=int, default=32, help="latest tokens that are never evicted (32)")
    if skip_layers:
        parser.add_argument("--skip-layers", default="", help='layers that are left whole: "0, 1"')
        parser.add_argument("--plan", type=Path, help="a plan's file, instead of all these")


def add_excerpts(parser: argparse.ArgumentParser) -> None:
    """Texts, --model, --excerpts, --prompt-tokens and --new-tokens, --device."""
    parser.add_argument("texts", nargs="+", type=Path, help="text files, or folders of .txt files")
    add_model(parser)
    parser.add_argument("--excerpts", type=int, default=16, help="excerpts to measure on, spread over the texts (16)")
    parser.add_argument("--prompt-tokens", type=int, default=384, help="tokens of each that are compressed (384)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens after them that are predicted (64)")
    add_device(parser)


def add_out(parser: argparse.ArgumentParser, name: str = "plan.json", *, required: bool = False) -> None:
    """--out."""
    parser.add_argument("-o", "--out", type=Path, required=required, help=f"the file to write, such as {name}")


def spec_of(arguments: argparse.Namespace, *, n_layers: int) -> CompressionSpec:
    """What `add_spec` asked for, in a model of so many layers. Raises UserError."""
    from analysis.plans.skip import Plan, skip_list
    from analysis.records import load
    from l2kv.spec import CompressionSpec

    if arguments.plan:
        return load(Plan, arguments.plan).spec
    return CompressionSpec(
        keep_ratio=arguments.keep,
        policy=arguments.policy,
        skip_layers=skip_list(arguments.skip_layers, n_layers=n_layers),
        protect_last=arguments.protect_last,
    )


def loaded_model(arguments: argparse.Namespace) -> LoadedModel:
    """That of --model on --device. Imports torch: call it once arguments are checked."""
    no_progress_bars()
    from analysis.models.load import load_model

    return load_model(arguments.model, device=arguments.device)
