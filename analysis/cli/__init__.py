"""The command line of `analysis`: all that needs no drawing, as `python -m analysis`, and within `l2kv` (`app.cli`).

`measures`, `compression`, `evaluation` and `catalogue` hold the commands, one function each. `options` declares what
they take, `output` is how they tell what they found, `program` makes one program of them, with exit statuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from analysis.cli import catalogue, compression, evaluation, measures
from analysis.cli.program import program, run

COMMANDS = (
    measures.capture,
    measures.heads,
    measures.study,
    measures.selftest,
    compression.skip,
    compression.plan,
    evaluation.ablation,
    evaluation.front,
    evaluation.evaluate,
    compression.savings,
    compression.generate,
    catalogue.models,
    catalogue.demo,
)


def commands() -> typer.Typer:
    """The commands of `analysis`, to which others may be added."""
    return program(*COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `analysis`, and return the exit status."""
    return run(commands(), argv, name="python -m analysis")
