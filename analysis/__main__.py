"""`python -m analysis COMMAND`: the command line without what draws (see `app.cli`)."""

from __future__ import annotations

import sys
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


if __name__ == "__main__":
    sys.exit(main())
