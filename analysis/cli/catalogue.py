"""`models` and `demo`: which models are at hand, one of them fetched, and what the app opens with made again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import loaded_model, quiet_libraries, texts_of
from analysis.cli.options import out
from analysis.cli.output import shown, tell, wrote
from analysis.errors import ModelError


def models(
    name: Annotated[
        str | None, typer.Argument(parser=str, help="smollm2, a hub id, ...: fetched if it is not at hand.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List the models at hand; with a name, fetch that one."""
    if name:
        _fetch(name)
        return
    columns = ("name", "kind", "size", "where")
    tell(dict.fromkeys(columns, ""), [dict(zip(columns, row, strict=True)) for row in _at_hand()], json=json)


def demo(
    texts: Annotated[
        list[Path],
        typer.Argument(parser=Path, metavar="TEXTS", help="Text files, or folders of them; else those of the app."),
    ] = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    without_tasks: Annotated[
        bool, typer.Option("--without-tasks", help="Look for no preset with a task: for a model that solves none.")
    ] = False,
    to: Annotated[Path | None, out("a folder; by default the app's own, of the model's name")] = None,
) -> None:
    """Make what the app opens with: presets and a run. Presets are searched for in the texts."""
    documents = texts_of(texts)
    loaded = loaded_model(model, "cpu")
    from analysis.captures import save_run
    from analysis.demo.finding import ARTICLE, find_presets
    from analysis.demo.presets import RESULT_FILES, bundled_texts
    from analysis.models.load import BUNDLED
    from analysis.recorder import capture
    from analysis.records import save

    with shown("prompt") as progress:
        found = find_presets(loaded, documents, tasks=not without_tasks, progress=progress)
    folder = to or BUNDLED / found.model
    first = next(iter(bundled_texts().values()))
    text = next((preset.text for preset in found.presets if preset.name == ARTICLE), first)
    wrote(save_run(capture(loaded, text), folder / RESULT_FILES["demo"]))
    wrote(save(found, folder / RESULT_FILES["presets"]))
    for preset in found.presets:
        print(f"{preset.name}: {preset.why}")


def _fetch(name: str) -> None:
    """Fetch a model by name; the original weights of a packaged one, where only the hub can be reached."""
    quiet_libraries()
    from analysis.models.load import model_folder
    from analysis.models.packaged import ORIGINALS, UnreachableError

    try:
        with shown("B", scale=True) as progress:
            folder = model_folder(name, progress=progress)
        print(f"{name} is in {folder}")
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
        where = str(folder_of(model)) if there else f"not here yet: l2kv models {model.name}"
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
