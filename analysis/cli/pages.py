"""`figures` and `report`: pages of HTML for those who have nothing installed. The one module here that draws."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from analysis.cli.shared import add_device, add_model, counter, no_progress_bars, tell_notes, texts_of
from analysis.errors import RecordError, UserError
from analysis.files import read_text, write_text


def add(commands) -> None:
    """Add the commands."""
    figures = commands.add_parser("figures", help="the paper's figures again, for any model: HTML and JSON")
    figures.add_argument("texts", nargs="+", type=Path, help="text files, or folders of .txt files")
    figures.add_argument("-o", "--out", type=Path, required=True, help="the folder to write to")
    add_model(figures)
    figures.add_argument("--only", help="some of them, such as fig1,fig8 (default: all)")
    figures.add_argument("--heads", help="of Figure 1, as layer.head: 0.3,2.1 (default: from lowest to highest Γ)")
    figures.add_argument("--tokens", type=int, default=1024, help="tokens of an excerpt (1024, if the model can)")
    figures.add_argument("--excerpts", type=int, default=16, help="excerpts, spread over the texts (16)")
    add_device(figures)
    figures.set_defaults(run=_figures)

    report = commands.add_parser("report", help="one page about a run, or about two compared")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a saved run, or two")
    report.add_argument("-o", "--out", type=Path, required=True, help="the page to write, such as report.html")
    report.add_argument("--study", type=Path, action="append", default=[], help="a study of many texts; or two")
    report.add_argument("--front", type=Path, help="what ways to share out a cache's bytes cost (`front`)")
    report.add_argument("--causal", type=Path, help="each layer compressed alone (`causal`)")
    report.set_defaults(run=_report)


def _figures(arguments: argparse.Namespace) -> None:
    from analysis.paper.figures import FIGURES

    only = arguments.only.split(",") if arguments.only else list(FIGURES)
    if unknown := set(only) - set(FIGURES):
        raise UserError(f"--only takes {', '.join(FIGURES)}; got {', '.join(sorted(unknown))}")
    heads = _heads_of(arguments.heads)
    texts = texts_of(arguments.texts)
    no_progress_bars()
    from analysis.models.load import load_model
    from analysis.paper.figures import reproduce, to_json
    from analysis.texts.excerpts import excerpts
    from app.report.paper import section
    from app.report.writing import Section, document

    loaded = load_model(arguments.model, device=arguments.device)
    n_tokens = min(arguments.tokens, loaded.positions - 1)  # one for the next token
    given = excerpts(loaded.tokenizer, texts, n_tokens=n_tokens, at_most=arguments.excerpts)
    tell_notes(loaded, (excerpt.text for excerpt in given))
    names = [excerpt.name for excerpt in given]
    lead = f"{loaded.name}, on excerpts of {n_tokens} tokens; the first is “{names[0]}”."
    about = {"model": loaded.name, "texts": names, "tokens_per_excerpt": n_tokens}
    made = []
    figures = reproduce(loaded, [excerpt.text for excerpt in given], only=only, heads=heads, on_stage=counter())
    for name, numbers in figures:
        shown, data = section(name, numbers), to_json(name, numbers, about)
        write_text(
            document(shown.heading, lead, [replace(shown, heading="")], data=data), arguments.out / f"{name}.html"
        )
        print(f"wrote {write_text(data, arguments.out / f'{name}.json')} and .html")
        links = (("The figure", f"{name}.html"), ("Its numbers, as JSON", f"{name}.json"))
        made.append(Section(shown.heading, (shown.words[0], shown.words[-1]), links=links))
    title = f"The paper's figures, for {loaded.name}"
    print(f"wrote {write_text(document(title, lead, made), arguments.out / 'index.html')}")


def _heads_of(words: str | None) -> list[tuple[int, int]] | None:
    if words is None:
        return None
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", words):
        raise UserError(f"--heads takes heads as layer.head, such as 0.3,2.1; got {words!r}")
    return [tuple(map(int, word.split("."))) for word in words.split(",")]


def _report(arguments: argparse.Namespace) -> None:
    if len(arguments.runs) > 2 or len(arguments.study) > 2:
        raise UserError("A report is of one run or of two, and of two studies at most.")
    from analysis.captures import load_run
    from analysis.plans.front import Front
    from analysis.studies import load_study
    from app.report import report

    page = report(
        [load_run(file) for file in arguments.runs],
        studies=[load_study(file) for file in arguments.study],
        front=_read(arguments.front, Front.from_json),
        causal=_read(arguments.causal, _causal_of),
    )
    print(f"wrote {write_text(page, arguments.out)}")


def _causal_of(text: str):
    from analysis.plans.ablation import CausalCheck  # waits for torch

    return CausalCheck.from_json(text)


def _read(file: Path | None, reader):
    """What a file holds, or None without one; a mistake names the file."""
    if file is None:
        return None
    text = read_text(file)
    try:
        return reader(text)
    except RecordError as error:
        raise RecordError(f"{file}: {error}") from error
