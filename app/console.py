"""The installed command `l2kv`, which says what to install where a part is missing. Imports no such part at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from analysis.errors import UserError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra to install where an import in the block finds a package of others missing. Raises UserError."""
    try:
        yield
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package in ("", "l2kv", "analysis", "app"):  # a mistake of ours
            raise
        raise UserError(
            f"{package} is not installed. Install what this command needs: pip install 'l2kv[{extra}]'"
        ) from missing


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    try:
        with needs("analysis"):
            from app.cli import main as run
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(argv)
