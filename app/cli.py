"""`l2kv`: the commands of `analysis`, and beside them those that draw. The outermost layer: nothing imports it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis import defaults
from analysis.__main__ import commands as commands_of_analysis
from analysis.captures import Capture
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, texts_of
from analysis.cli.output import shown, wrote
from analysis.cli.program import Command, run
from analysis.errors import UserError
from analysis.extras import needs
from analysis.paper.figures import FIGURES, reproduce
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front
from analysis.records import Record, load_any, write_text
from analysis.studies import Study


def commands() -> typer.Typer:
    """All commands."""
    made = commands_of_analysis()
    made.command(cls=Command)(report)
    made.command(cls=Command)(figures)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    made.command("app", cls=Command, context_settings=passed_on, options_metavar="[STREAMLIT OPTIONS]")(open_app)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    return run(commands(), argv, name="l2kv")


def open_app(context: typer.Context) -> None:
    """Open the app. Options such as --server.port=8501 go to Streamlit."""
    with needs("app"):
        import streamlit  # noqa: F401

        from app.__main__ import main as serve
    serve(context.args)


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            parser=Path, metavar="FILES", help="One or two runs, and their studies, a front and an ablation."
        ),
    ],
    to: Annotated[Path, options.out("report.html")],
) -> None:
    """Write one page about a run, or about two compared. Its reader needs nothing installed."""
    read = [load_any((Capture, Study, Front, Ablation), file) for file in files]
    runs, studies = _all(Capture, read), _all(Study, read)
    fronts, ablations = _all(Front, read), _all(Ablation, read)
    if not 1 <= len(runs) <= 2 or len(studies) > 2 or len(fronts) > 1 or len(ablations) > 1:
        raise UserError(
            "A report is of one run or of two, and of at most two studies, one front and one ablation; got "
            f"{len(runs)}, {len(studies)}, {len(fronts)} and {len(ablations)} of them."
        )
    with needs("app"):
        from app import report as reports
    page = reports.report(runs, studies=studies, front=next(iter(fronts), None), ablation=next(iter(ablations), None))
    wrote(write_text(page, to))


def _all(kind: type[Record], read: Sequence[object]) -> list[Record]:
    return [one for one in read if isinstance(one, kind)]


def _head(word: str) -> tuple[int, int]:
    """The (layer, head) of a head that is written as layer.head. Raises BadParameter."""
    if not re.fullmatch(r"\d+\.\d+", word):
        raise typer.BadParameter(f"must be heads as layer.head, such as 0.3,2.1, got {word!r}")
    layer, head = word.split(".")
    return int(layer), int(head)


def figures(
    texts: options.Texts,
    to: Annotated[Path, typer.Option("-o", "--out", parser=Path, help="Folder to write to.")],
    model: options.Model = defaults.MODEL,
    only: Annotated[Sequence[str], options.listed(options.FIGURES, "Figures to make; all by default.")] = (),
    heads: Annotated[
        Sequence[Any],
        options.listed(_head, "Heads of figure 1, as layer.head: 0.3,2.1. By default from lowest to highest gamma."),
    ] = (),
    tokens: options.ExcerptTokens = 1024,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
) -> None:
    """Reproduce the paper's figures for any model, as HTML and JSON."""
    documents = texts_of(texts)
    with needs("app"):
        from app.report.paper import write_pages
    loaded = loaded_model(model, device)
    n_tokens = min(tokens, loaded.positions - 1)  # one for the next token
    given = excerpts_of(loaded, documents, n_tokens=n_tokens, at_most=excerpts)
    texts_given, names = [excerpt.text for excerpt in given], [excerpt.name for excerpt in given]
    with shown("step") as progress:
        made = reproduce(loaded, texts_given, only=only or tuple(FIGURES), heads=heads or None, progress=progress)
        for file in write_pages(made, to, model=loaded.name, names=names, n_tokens=n_tokens):
            wrote(file)


if __name__ == "__main__":  # where the package is not installed: python -m app.cli
    sys.exit(main())
