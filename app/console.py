"""The installed command `l2kv`, which says what to install where a part is missing. Imports no such part at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from analysis.errors import UserError
from analysis.extras import needs


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    try:
        with needs("analysis"):
            from app.cli import main as run
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(argv)
