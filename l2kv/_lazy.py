"""Lazy imports: a package's names are imported on first use, so that what needs no torch does not wait for it.

A package's stub (`__init__.pyi`) lists its public names once, for type checkers, editors and this module, as with
scikit-image's lazy_loader.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """Make a package's `__getattr__` (PEP 562) and `__all__` from the stub beside its `__init__.py` (`file`)."""
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    home = {name.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(str(home[name])), name)

    return __getattr__, sorted(home)
