"""The command line, `python -m analysis COMMAND`: everything but looking. A module for each group of commands.

Where a command draws (`figures`, `report`) it calls `app`: like every program's outermost layer it knows all parts, and
nothing imports it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from analysis.cli import costs, demo, models, pages, passkeys, plans, runs, studies
from analysis.cli.shared import any_encoding
from analysis.errors import UserError
from l2kv.errors import SpecError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a mistake of the user's is one line on standard error and the exit status 2.

    A mistake of ours is not caught: a traceback, and Python's exit status 1.
    """
    any_encoding(sys.stdout, sys.stderr)
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except (UserError, SpecError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough; what Python flushes at its end must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description="Measure and compress without the app.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (runs, studies, plans, costs, demo, models, pages, passkeys):
        group.add(commands)
    return parser
