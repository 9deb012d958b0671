"""How commands tell what they found: a table or JSON on standard output; how far they are, and files, on the other."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from analysis.metrics import METRICS
from analysis.progress import Progress, unheard
from analysis.records import json_text

Row = Mapping[str, Any]
Form = str | Callable[[Any], str]
"""How a value is written: a format, "+.2f", or a function."""


def tell(
    columns: Mapping[str, Form],
    rows: Iterable[Row],
    *,
    json: bool,
    title: str = "",
    answer: str = "",
    **about: object,
) -> None:
    """Print rows as a table, or, for programs, as JSON with all of their digits.

    Args:
        columns: those of the table, and how their values are formatted: {"gamma": "+.2f"}. Metrics are headed by their
            titles. JSON holds all of a row, by the names.
        title: lines above the table.
        answer: lines below it.
        about: what else JSON says.
    """
    rows = list(rows)
    if json:
        print(json_text({**about, "rows": rows, "answer": answer}), end="")
        return
    for text in (title, *(_table(columns, rows) if columns else ()), answer):
        if text:
            print(text)


def row_of(thing: Any, **more: Any) -> dict[str, Any]:
    """A row of what a dataclass holds, and more."""
    return {field.name: getattr(thing, field.name) for field in fields(thing)} | more


def form_of(metric: str) -> str:
    """How values of a metric are formatted."""
    return "+z.2f" if METRICS[metric].diverging else "z.3f"


def wrote(path: Path) -> None:
    """Say on standard error that a file was written."""
    print(f"wrote {path}", file=sys.stderr)


def part_of_file(path: Path) -> Path:
    """File beside another that what is measured is written to, until all is: the same command goes on from there."""
    return path.with_name(f"{path.stem}.part.jsonl")


@contextmanager
def shown(unit: str = "it", *, scale: bool = False) -> Iterator[Progress]:
    """Show on standard error how far work is, at which rate, and what time is left; nothing where nobody looks.

    Args:
        scale: write large numbers of units short, such as of bytes.
    """
    from tqdm import tqdm

    with tqdm(disable=None, leave=False, unit=unit if scale else f" {unit}", unit_scale=scale, desc="") as bar:

        def show(done: int, total: int, what: str, /) -> None:
            if bar.desc != what or bar.total != total:
                bar.set_description_str(what, refresh=False)
                bar.reset(total)
            bar.update(done - bar.n)

        yield unheard if bar.disable else show


def _table(columns: Mapping[str, Form], rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table, the same wherever they are printed: never wrapped, and without colours."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False, header_style="")
    for name, form in columns.items():
        heading = METRICS[name].title if name in METRICS else name.removeprefix("n_").replace("_", " ")
        table.add_column(heading, justify="left" if form == "" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[name], form) for name, form in columns.items()))
    console = Console(width=10_000, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as printed:
        console.print(table)
    return (line.rstrip() for line in printed.get().splitlines())


def _cell(value: Any, form: Form) -> str:
    """A value as a table shows it; what is undefined says so."""
    if callable(form):
        return form(value)
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return "  ".join(_cell(each, form) for each in value)
    if hasattr(value, "low"):  # an interval
        middle, low, high = (_cell(each, form) for each in (value.value, value.low, value.high))
        return middle if low == "undefined" else f"{middle} [{low}, {high}]"
    if isinstance(value, float) and math.isnan(value):
        return "undefined"
    return format(value, form)
