"""`export-generate` and `export-press`: a compression for programs of others, as a model folder or as code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import quiet_libraries
from analysis.cli.options import CompressionOrPlan, out
from analysis.cli.output import shown, wrote
from analysis.models.load import tokenizer_and_config
from analysis.plans import export
from analysis.records import write_text


def export_generate(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(parser=Path, metavar="FOLDER", help="Folder to write: a new or empty one.")],
    compression: CompressionOrPlan,
    model: options.Model = defaults.MODEL,
    link: Annotated[bool, typer.Option("--link", help="Link to the weights, instead of copying them.")] = False,
) -> None:
    """Write a model folder with which transformers' own generate uses a compressed cache. It needs l2kv there."""
    compression.check(context)
    quiet_libraries()
    from analysis.plans.export_folder import export_generate as exported

    spec = compression.spec(tokenizer_and_config(model)[1])
    with shown("B", scale=True) as progress:
        wrote(exported(model, spec, folder, link=link, progress=progress))


def export_press(
    policy: Annotated[
        str, typer.Argument(parser=options.POLICIES, metavar="POLICY", help="Policy of your own, my.py:score.")
    ],
    to: Annotated[Path, out("my_press.py")],
) -> None:
    """Write a policy of your own as a press for NVIDIA's kvpress."""
    wrote(write_text(export.press_code(policy), to))
