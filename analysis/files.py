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
from safetensors.numpy import save_file

from analysis.errors import RunFileError


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


def write_text(text: str, path: str | Path) -> Path:
    """Write a text, whole or not at all. Raises RunFileError, with the reason."""
    path = Path(path)
    try:
        with _renamed_into(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFileError(f"{path} cannot be written: {error}. Choose another place.") from error
    return path


def read_text(path: str | Path) -> str:
    """The text of a file. Raises RunFileError, with the reason."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(f"{path} cannot be read: {error}") from error


def record(kind: str, version: int, content: Mapping[str, Any]) -> str:
    """The text of a record. Numbers that are not finite become null."""
    return json.dumps({f"l2kv_{kind}": version} | _plain(content), indent=2, ensure_ascii=False) + "\n"


def content_of(text: str, kind: str, version: int) -> dict[str, Any]:
    """What a record holds, without its heading; it may come from anyone. Raises RunFileError, with the reason."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"This is not a {kind} that can be read: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise RunFileError(f"This is no {kind}: it is not a JSON object.")
    found = content.pop(f"l2kv_{kind}", None)
    if found != version:
        raise RunFileError(f"This is no {kind} of version {version}: l2kv_{kind} is {found!r:.60}.")
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
