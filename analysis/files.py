"""Files of arrays that are there whole or not at all: one safetensors file, its JSON header in the metadata."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_whole(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write under a temporary name, flush, rename: whatever happens meanwhile, `path` is the old file or the new one.

    Raises:
        OSError, SafetensorError: it cannot be written there.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file would leave a file that only its owner can read
        save_file(
            {name: np.ascontiguousarray(values) for name, values in arrays.items()}, temporary, metadata=dict(metadata)
        )
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
