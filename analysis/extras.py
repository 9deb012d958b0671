"""What a command says where an extra is not installed. Imports no part that may be missing."""

from __future__ import annotations

from collections.abc import Iterator
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
