"""`l2kv`: the commands of `analysis`, and beside them those that draw. The outermost layer: nothing imports it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis import defaults
from analysis.__main__ import commands as commands_of_analysis
from analysis.captures import Capture
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, texts_of
from analysis.cli.output import shown, wrote
from analysis.cli.program import Command, run
from analysis.errors import UserError
from analysis.evaluation.results import Results
from analysis.extras import needs
from analysis.paper.experiments import EXPERIMENTS, Case, cases
from analysis.paper.figures import FIGURES, reproduce
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front
from analysis.records import Record, load_any, write_text
from analysis.studies import Study

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


def commands() -> typer.Typer:
    """All commands."""
    made = commands_of_analysis()
    made.command(cls=Command)(report)
    made.command(cls=Command, epilog=_about_figures())(paper)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    made.command("app", cls=Command, context_settings=passed_on, options_metavar="[STREAMLIT OPTIONS]")(open_app)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    return run(commands(), argv, name="l2kv")


def _about_figures() -> str:
    """What each figure is, what the paper reports, and what differs here, as paragraphs."""
    told = {
        name: f"{name} ({figure.title}). The paper: {figure.paper}" for name, figure in options.FIGURES.registry.items()
    }
    for name, one in EXPERIMENTS.items():
        told[name] += f" Here: {one.here} Size: {one.size}; with --quick {one.quick}."
    return "\n\n".join(told.values())


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
            parser=Path,
            metavar="FILES",
            help="One or two runs, and their studies, a front and an ablation; or results of `evaluate`.",
        ),
    ],
    to: Annotated[Path, options.out("report.html")],
) -> None:
    """Write one page about a run, two compared, or evaluations. Its reader needs nothing installed."""
    read = [load_any((Capture, Study, Front, Ablation, Results), file) for file in files]
    runs, studies, results = _all(Capture, read), _all(Study, read), _all(Results, read)
    fronts, ablations = _all(Front, read), _all(Ablation, read)
    if not (runs or results) or len(runs) > 2 or len(studies) > 2 or len(fronts) > 1 or len(ablations) > 1:
        raise UserError(
            "A report is of one run or of two, with at most two studies, one front and one ablation, or of results; "
            f"got {len(runs)}, {len(studies)}, {len(fronts)}, {len(ablations)} and {len(results)} of them."
        )
    with needs("app"):
        from app import report as reports
    front, ablation = next(iter(fronts), None), next(iter(ablations), None)
    page = reports.report(runs, studies=studies, front=front, ablation=ablation, results=results)
    wrote(write_text(page, to))


def _all(kind: type[Record], read: Sequence[object]) -> list[Record]:
    return [one for one in read if isinstance(one, kind)]


def _head(word: str) -> tuple[int, int]:
    """The (layer, head) of a head that is written as layer.head. Raises BadParameter."""
    if not re.fullmatch(r"\d+\.\d+", word):
        raise typer.BadParameter(f"must be heads as layer.head, such as 0.3,2.1, got {word!r}")
    layer, head = word.split(".")
    return int(layer), int(head)


def paper(
    context: typer.Context,
    figures: Annotated[
        Sequence[str],
        typer.Argument(parser=options.Listed(options.FIGURES), metavar="FIGURES", help="Figures to make."),
    ],
    to: Annotated[Path, typer.Option("-o", "--out", parser=Path, help="Folder to write to; run again to continue.")],
    texts: options.Texts = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, for a laptop.")] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens per excerpt, or of the longest prompt; 1024 for figures without a size.")
    ] = None,
    excerpts: Annotated[
        int | None, typer.Option(help="Excerpts, or samples at each length and depth; 16 for figures without a size.")
    ] = None,
    path: Annotated[list[str], typer.Option(help="File of LongBench, for fig5; repeat for more.")] = [],  # noqa: B006
    heads: Annotated[
        Sequence[Any],
        options.listed(_head, "Heads of fig1, as layer.head: 0.3,2.1. By default from lowest to highest gamma."),
    ] = (),
    device: options.Device = None,
) -> None:
    """Reproduce figures of the paper for any model, as HTML and JSON.

    Of those that are measured, results are written as they are computed, and a stopped run is continued.
    """
    read_off, measured = ([name for name in figures if name in among] for among in (FIGURES, EXPERIMENTS))
    if not measured:
        options.refuse(context, ("quick",), "these figures have one size")
    if "fig5" not in figures:
        options.refuse(context, ("path",), "only fig5 reads files of examples")
    if "fig1" not in figures:
        options.refuse(context, ("heads",), "only fig1 shows heads by choice")
    documents = texts_of(texts)
    with needs("app"):
        from app.report.paper import write_pages
    loaded = loaded_model(model, device)
    n_tokens = min(tokens or 1024, loaded.positions - 1)  # one for the next token
    at_most = excerpts or defaults.EXCERPTS
    given = excerpts_of(loaded, documents, n_tokens=n_tokens, at_most=at_most) if read_off else ()

    def made() -> Iterator[tuple[str, object]]:
        if read_off:
            with shown("step") as progress:
                passages = [one.text for one in given]
                yield from reproduce(loaded, passages, only=read_off, heads=heads or None, progress=progress)
        for name in measured:
            size = EXPERIMENTS[name].quick if quick else EXPERIMENTS[name].size
            size = replace(size, tokens=tokens or size.tokens, samples=excerpts or size.samples)
            asked = cases(loaded, name, size, documents=documents if texts else None, files=path)
            yield name, _measured(loaded, asked, to / name)

    names = [one.name for one in given]
    for file in write_pages(made(), to, model=loaded.name, excerpts=names, n_tokens=n_tokens):
        wrote(file)


def _measured(loaded: LoadedModel, cases: Iterable[Case], to: Path) -> dict[str, Results]:
    """Run the evaluations of an experiment, each into a file of results beside `to`; they are returned by name."""
    from analysis.evaluation.run import evaluate
    from analysis.evaluation.work import estimate

    found = {}
    for case in cases:
        file = to.with_name(f"{to.name}-{case.name}.jsonl")
        texts, settings = case.texts, case.settings
        told = estimate(loaded, case.task, case.methods, texts=texts, settings=settings)
        print(f"{file.stem}: about {told}", file=sys.stderr)
        with shown("sample") as progress:
            found[case.name] = evaluate(
                loaded, case.task, case.methods, texts=texts, settings=settings, out=file, progress=progress
            )
        wrote(file)
    return found


if __name__ == "__main__":  # where the package is not installed: python -m app.cli
    sys.exit(main())
