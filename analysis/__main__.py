"""`python -m analysis COMMAND`: the command line without what draws (see `app.cli`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from analysis.cli import catalogue, compression, decision, evaluation, export, harness, lab, measures
from analysis.cli.program import Command, program, run, with_version

COMMANDS = (
    measures.capture,
    measures.heads,
    measures.study,
    measures.selftest,
    compression.skip,
    compression.plan,
    evaluation.ablation,
    evaluation.front,
    lab.lab,
    compression.savings,
    compression.generate,
    decision.verdict,
    export.export_generate,
    export.export_press,
    catalogue.models,
    catalogue.demo,
)


def commands() -> typer.Typer:
    """The commands of `analysis`, to which others may be added."""
    made = program(*COMMANDS)
    made.callback()(with_version)
    about = "Score a model on a task, with the full cache and with compressed ones."
    made.add_typer(typer.Typer(), name="evaluate", cls=evaluation.Tasks, help=about)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    made.command("lm-eval", cls=Command, context_settings=passed_on, options_metavar="[LM-EVAL OPTIONS]")(
        harness.lm_eval
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `analysis`, and return the exit status."""
    return run(commands(), argv, name="python -m analysis")


if __name__ == "__main__":
    sys.exit(main())
