"""`make docs`: docs/cli.md and docs/registries.md, written from the command line and the registries.

A test holds the files against what this gives, so that neither can say what is no longer so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import typer
from typer.main import get_command

from tests.support.paths import ROOT


def cli() -> str:
    """The reference of the command line: the help of every command, as it is printed."""
    from app.cli import commands

    group = get_command(commands())
    parts = ["# Command line", "Written by `make docs`: change the commands, not this file."]
    parts.append(_help(group, "l2kv"))
    for name, command in group.commands.items():
        parts += [f"## {name}", _help(command, f"l2kv {name}")]
    return "\n\n".join(parts) + "\n"


def _help(command, name: str) -> str:
    settings = command.context_settings | {"terminal_width": 110}
    told = command.get_help(typer.Context(command, info_name=name, **settings))
    return "```\n" + "\n".join(line.rstrip() for line in told.splitlines()) + "\n```"


def registries() -> str:
    """A table of each registry: what can be chosen by name, and where it is added."""
    return "\n".join(_registries()) + "\n"


def _registries() -> Iterator[str]:
    from analysis.evaluation.tasks import TASKS
    from analysis.metrics import METRICS
    from analysis.plans.strategies import STRATEGIES
    from l2kv.policies import POLICIES

    yield "# Registries\n"
    yield "What is chosen by name. Written by `make docs`: register an entry, and it is here."
    for title, place, entries in (
        ("Policies", "l2kv.POLICIES", POLICIES),
        ("Metrics", "analysis.METRICS", METRICS),
        ("Tasks", "analysis.TASKS", TASKS),
        ("Allocation strategies", "analysis.STRATEGIES", STRATEGIES),
    ):
        yield f"\n## {title}\n\n`{place}`\n\n| name | what it is |\n|---|---|"
        yield from _rows(entries)


def _rows(entries: Mapping[str, object]) -> Iterator[str]:
    for name, entry in entries.items():
        about = getattr(entry, "about", "") or getattr(entry, "text", "") or inspect.getdoc(entry).splitlines()[0]
        yield f"| `{name}` | {about} |"


FILES = {"cli.md": cli, "registries.md": registries}


def main() -> None:
    """Write the files."""
    for name, text in FILES.items():
        Path(ROOT / "docs" / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
