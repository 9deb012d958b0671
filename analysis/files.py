"""Files that are there whole or not at all: arrays as safetensors with a JSON header, and records as JSON.

A record is a JSON object that says what it is, and of which version: {"l2kv_plan": 1, ...}.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from analysis.errors import RecordError, TextError
from analysis.texts import read


def write_whole(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays as one safetensors file: whatever happens meanwhile, `path` is the old file or the new one.

    Raises:
        OSError, SafetensorError: it cannot be written there.
    """
    with _renamed_into(path) as temporary:
        mode = temporary.stat().st_mode  # save_file would leave a file that only its owner can read
        save_file(
            {name: np.ascontiguousarray(values) for name, values in arrays.items()}, temporary, metadata=dict(metadata)
        )
        temporary.chmod(mode)


@contextmanager
def reading_whole(path: Path, kind: str) -> Iterator[tuple[safe_open, str, dict[str, Any]]]:
    """Open what `write_whole` wrote with {"l2kv_<kind>": version, "header": a JSON object}: (file, version, header).

    It may come from anyone. What is wrong with it, or found to be wrong within the block, is raised as a RecordError.
    """
    try:
        if not path.is_file():
            raise RecordError(f"There is no file {path}.")
        path.open("rb").close()  # safe_open would say "no such file" of one that may not be read
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if f"l2kv_{kind}" not in metadata:
                raise RecordError(f"{path.name} is a safetensors file, but not a saved {kind}.")
            header = json.loads(metadata.get("header", "null"))
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
            yield file, metadata[f"l2kv_{kind}"], header
    except RecordError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise RecordError(f"{path.name} is not a {kind} that can be read: {str(error)[:200]}") from error


def write_text(text: str, path: str | Path) -> Path:
    """Write a text, whole or not at all. Raises RecordError, with the reason."""
    path = Path(path)
    try:
        with _renamed_into(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error}. Choose another place.") from error
    return path


def read_text(path: str | Path) -> str:
    """The text of a record's file. Raises RecordError, with the reason."""
    try:
        return read.read_text(path)
    except TextError as error:
        raise RecordError(str(error)) from error


def record(kind: str, version: int, content: Mapping[str, Any]) -> str:
    """The text of a record. Numbers that are not finite become null."""
    return json.dumps({f"l2kv_{kind}": version} | _plain(content), indent=2, ensure_ascii=False) + "\n"


def content_of(text: str, kind: str, version: int, *, called: str = "") -> dict[str, Any]:
    """What a record holds, without its heading; it may come from anyone. Raises RecordError, with the reason.

    Args:
        called: what users know the kind by, if not by itself.
    """
    called = called or kind
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"This is not a {called} that can be read: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise RecordError(f"This is no {called}: it is not a JSON object.")
    found = content.pop(f"l2kv_{kind}", None)
    if found != version:
        raise RecordError(f"This is no {called} of version {version}: l2kv_{kind} is {found!r:.60}.")
    return content


@contextmanager
def _renamed_into(path: Path) -> Iterator[Path]:
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _plain(value: Any) -> Any:
    """Of JSON's types: arrays as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
