"""`make docs`: docs/cli.md and docs/registries.md, written from the command line and the registries.

A test holds the files against what this gives, so that neither can say what is no longer so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import typer
from typer.main import get_command

from analysis.evaluation.task import Task
from analysis.evaluation.tasks import TASKS
from analysis.metrics import METRICS, Metric
from analysis.plans.strategies import STRATEGIES, Strategy
from app.cli import commands
from l2kv.policies import POLICIES, Policy
from tests.support.paths import ROOT


def cli() -> str:
    """The reference of the command line: the help of every command, as it is printed."""
    group = get_command(commands())
    parts = ["# Command line", "Written by `make docs`: change the commands, not this file."]
    return "\n\n".join([*parts, *_parts(group, "l2kv")]) + "\n"


def _parts(command, name: str, level: str = "") -> Iterator[str]:
    """The help of a command, and of those within it."""
    yield from [f"{level} {name.removeprefix('l2kv ')}"] * bool(level)
    yield _help(command, name)
    for within in getattr(command, "list_commands", lambda context: ())(None):
        yield from _parts(command.get_command(None, within), f"{name} {within}", (level or "#") + "#")


def _help(command, name: str) -> str:
    settings = command.context_settings | {"terminal_width": 110, "help_option_names": ["-h", "--help"]}
    told = command.get_help(typer.Context(command, info_name=name, **settings))
    return "```\n" + "\n".join(line.rstrip() for line in told.splitlines()) + "\n```"


def registries() -> str:
    """A table of each registry: what can be chosen by name, and where it is added."""
    return "\n".join(_registries()) + "\n"


def _registries() -> Iterator[str]:
    yield "# Registries\n"
    yield "What is chosen by name. Written by `make docs`: register an entry, and it is here."
    for title, place, entries, heading, last in (
        ("Policies", "l2kv.POLICIES", POLICIES, "needs", _needs),
        ("Metrics", "analysis.METRICS", METRICS, "range", _range),
        ("Tasks", "analysis.TASKS", TASKS, "score", _score),
        ("Allocation strategies", "analysis.STRATEGIES", STRATEGIES, "needs", _needs),
    ):
        yield f"\n## {title}\n\n`{place}`\n\n| name | title | what it is | {heading} |\n|---|---|---|---|"
        for name, entry in entries.items():
            yield f"| `{name}` | {entry.title} | {entry.about} | {last(entry)} |"


def _range(metric: Metric) -> str:
    """The least and the largest value that a metric can have."""
    if metric.low is None or metric.high is None:
        return "any" if metric.low is None else f"{metric.low:g} or more".replace("-", "−")
    return f"{metric.low:g} to {metric.high:g}".replace("-", "−")


def _score(task: Task) -> str:
    return f"{task.unit}, {'higher' if task.higher_is_better else 'lower'} is better"


_NEEDS = {
    "needs_directions": "directions, measured on the model",
    "needs_filters": "filters, measured on the model",
    "needs_token_ids": "token ids, and which are special",
    "needs_received": "attention, at every step",
    "needs_rows": "attention, at every eviction",
    "needs_costs": "the cost of each head, measured in the model",
    "needs_captures": "texts: a study is not enough",
}


def _needs(entry: Policy | Strategy) -> str:
    """What an entry needs beyond the keys that it scores, or the loss curves that it plans by."""
    needed = [field.name for field in fields(entry) if field.name.startswith("needs_") and getattr(entry, field.name)]
    return "; ".join(_NEEDS[name] for name in needed) or "nothing"


FILES = {"cli.md": cli, "registries.md": registries}


def main() -> None:
    """Write the files."""
    for name, text in FILES.items():
        Path(ROOT / "docs" / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
