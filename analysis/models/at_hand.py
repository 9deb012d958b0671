"""Which models are at hand, and one of them fetched by name. Reads names and sizes of files, no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from analysis.errors import ModelError
from analysis.models.load import BUNDLED, BUNDLED_MODELS, model_folder
from analysis.models.packaged import ORIGINALS, PACKAGED, UnreachableError, folder_of, is_fetched
from analysis.progress import Progress, unheard


@dataclass(frozen=True, slots=True)
class ModelAtHand:
    """A model that can be named without a download, or be fetched by its name."""

    name: str
    kind: str
    """"package", "bundled", "folder", "GGUF" or "hub cache"."""
    size: str
    where: str
    """Its folder or file; of one that is to be fetched, the command that does it."""


def models_at_hand() -> Iterator[ModelAtHand]:
    """Models of packages, bundled ones, those in the folders of `L2KV_MODEL_DIRS`, and those in the hub's cache."""
    for model in PACKAGED.values():
        folder, to_fetch = folder_of(model), f"{_megabytes(model.wheel_bytes)} to fetch"
        if is_fetched(model):
            yield ModelAtHand(model.name, "package", _size(folder), str(folder))
        else:
            yield ModelAtHand(model.name, "package", to_fetch, f"not here yet: l2kv models {model.name}")
    for name in BUNDLED_MODELS:
        yield ModelAtHand(name, "bundled", _size(BUNDLED / name), str(BUNDLED / name))
    for root in filter(None, os.environ.get("L2KV_MODEL_DIRS", "").split(os.pathsep)):
        yield from _in_folder(Path(root).expanduser())
    yield from _in_hub_cache()


def fetch(name: str, *, progress: Progress = unheard) -> tuple[str, Path]:
    """Fetch a model by name, and return its name and folder.

    Where the package index cannot be reached, the original weights of a packaged model are tried, from the hub: that
    is another model, with a name of its own.

    Raises:
        ModelError: there is no such model, or none can be fetched.
    """
    try:
        return name, model_folder(name, progress=progress)
    except UnreachableError as unreachable:
        original = f"{name}-original"
        if original not in ORIGINALS:
            raise
        progress(0, 0, f"{original}, as the package index cannot be reached")
        try:
            return original, model_folder(original, progress=progress)
        except ModelError:
            raise unreachable from None  # the one that was asked for


def _in_folder(root: Path) -> Iterator[ModelAtHand]:
    """Model folders and GGUF files in a folder that the app may read."""
    for path in sorted([root, *root.iterdir()]) if root.is_dir() else ():
        if path.suffix == ".gguf":
            yield ModelAtHand(path.name, "GGUF", _megabytes(path.stat().st_size), str(path))
        elif (path / "config.json").is_file():
            yield ModelAtHand(path.name, "folder", _size(path), str(path))


def _in_hub_cache() -> Iterator[ModelAtHand]:
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
            yield ModelAtHand(repo.repo_id, "hub cache", _megabytes(repo.size_on_disk), str(repo.repo_path))


def _size(folder: Path) -> str:
    return _megabytes(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
