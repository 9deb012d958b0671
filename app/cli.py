"""`l2kv`: the commands of `analysis`, and beside them those that draw. The outermost layer: nothing imports it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from analysis import defaults
from analysis.__main__ import commands as commands_of_analysis
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, texts_of
from analysis.cli.output import shown, wrote
from analysis.cli.program import Command, run
from analysis.errors import UserError


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
    from app.__main__ import main as serve

    serve(context.args)


def report(
    runs: Annotated[list[Path], typer.Argument(parser=Path, metavar="RUN", help="A saved run, or two.")],
    to: Annotated[Path, options.out("report.html")],
    study: Annotated[list[Path], typer.Option(parser=Path, help="A study of many texts; again for a second.")] = [],  # noqa: B006
    front: Annotated[Path | None, typer.Option(parser=Path, help="What `front` wrote.")] = None,
    ablation: Annotated[Path | None, typer.Option(parser=Path, help="What `ablation` wrote.")] = None,
) -> None:
    """Write one page about a run, or about two compared. Its reader needs nothing installed."""
    if len(runs) > 2 or len(study) > 2:
        raise UserError("A report is of one run or of two, and of two studies at most.")
    from analysis.captures import load_run
    from analysis.plans.ablation import Ablation
    from analysis.plans.front import Front
    from analysis.records import load, write_text
    from analysis.studies import load_study
    from app import report as reports

    page = reports.report(
        [load_run(file) for file in runs],
        studies=[load_study(file) for file in study],
        front=load(Front, front) if front else None,
        ablation=load(Ablation, ablation) if ablation else None,
    )
    wrote(write_text(page, to))


def figures(
    texts: options.Texts,
    to: Annotated[Path, typer.Option("-o", "--out", parser=Path, help="The folder to write to.")],
    model: options.Model = defaults.MODEL,
    only: Annotated[
        Sequence[str], typer.Option(parser=options.Listed(options.FIGURES), metavar="LIST", help="Which.")
    ] = (),
    heads: Annotated[
        str, typer.Option(help="Heads of figure 1, as layer.head: 0.3,2.1; else from lowest to highest gamma.")
    ] = "",
    tokens: options.ExcerptTokens = 1024,
    excerpts: options.Excerpts = defaults.EXCERPTS,
    device: options.Device = None,
) -> None:
    """Reproduce the paper's figures for any model. As HTML and JSON."""
    chosen, documents = _heads_of(heads), texts_of(texts)
    loaded = loaded_model(model, device)
    from analysis.paper.figures import FIGURES, reproduce, to_json
    from analysis.records import write_text
    from app.report.paper import section
    from app.report.writing import Section, document

    n_tokens = min(tokens, loaded.positions - 1)  # one for the next token
    given = excerpts_of(loaded, documents, n_tokens=n_tokens, at_most=excerpts)
    names = [excerpt.name for excerpt in given]
    lead = f"{loaded.name}, on excerpts of {n_tokens} tokens; the first is “{names[0]}”."
    about = {"model": loaded.name, "texts": names, "tokens_per_excerpt": n_tokens}
    made = []
    with shown("step") as progress:
        for name, numbers in reproduce(
            loaded,
            [excerpt.text for excerpt in given],
            only=only or tuple(FIGURES),
            heads=chosen,
            progress=progress,
        ):
            drawn, data = section(name, numbers), to_json(name, numbers, about)
            page = document(drawn.heading, lead, [replace(drawn, heading="")], data=data)
            wrote(write_text(page, to / f"{name}.html"))
            wrote(write_text(data, to / f"{name}.json"))
            links = (("The figure", f"{name}.html"), ("Its numbers, as JSON", f"{name}.json"))
            made.append(Section(drawn.heading, (drawn.words[0], drawn.words[-1]), links=links))
    wrote(write_text(document(f"The paper's figures, for {loaded.name}", lead, made), to / "index.html"))


def _heads_of(words: str) -> list[tuple[int, int]] | None:
    """The (layer, head) of each head that is written as layer.head. Raises UserError."""
    if not words:
        return None
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", words):
        raise UserError(f"--heads takes heads as layer.head, such as 0.3,2.1; got {words!r}")
    return [(int(layer), int(head)) for layer, head in (word.split(".") for word in words.split(","))]


if __name__ == "__main__":  # where the package is not installed: python -m app.cli
    sys.exit(main())
