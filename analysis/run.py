"""`Capture`: all that one run of a model over one text has shown, and its file. Knows numpy; knows no torch, no plot.

A run is one safetensors file, its JSON header in the file's metadata: one file can be renamed into place at once, so a
run on disk is whole or not there, and it can be handed on in one piece. Reading it runs no code.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from analysis.errors import RunFileError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Capture:
    """One text in one model. L layers, H query heads, Hkv kv heads, T tokens, P <= 128 bins of tokens.

    Kv head k serves the query heads k * G to (k + 1) * G - 1, G = H / Hkv.
    """

    model: str  # its name
    architecture: str
    device: str
    dtype: str
    text: str
    labels: tuple[str, ...]  # T, what to call each token
    probe_label: str  # of the token whose attention row `probe_attention` is
    layer_kinds: tuple[str, ...]  # L of "full" or "sliding"
    warnings: tuple[str, ...]
    seconds: float
    tokens_per_bin: int

    token_ids: np.ndarray  # [T] int64
    token_spans: np.ndarray  # [T, 2] int32, characters of `text`
    key_norm: np.ndarray  # [L, Hkv, T] float32, of keys as cached
    value_norm: np.ndarray  # [L, Hkv, T] float32
    attention_received: np.ndarray  # [L, H, T] float32: mean over the queries that can see the key
    probe_attention: np.ndarray  # [L, H, T] float32: the row of the greedy next token, without its own column
    pooled_attention: np.ndarray  # [L, H, P, P] uint8: 255 * sqrt(share / scale), see `pooled`
    pooled_scale: np.ndarray  # [L, H] float32

    def __post_init__(self) -> None:
        length, (layers, heads) = len(self.token_ids), self.probe_attention.shape[:2]
        kv_heads, bins = self.key_norm.shape[1], self.pooled_attention.shape[-1]
        expected = {
            "token_ids": (length,),
            "token_spans": (length, 2),
            "key_norm": (layers, kv_heads, length),
            "value_norm": (layers, kv_heads, length),
            "attention_received": (layers, heads, length),
            "probe_attention": (layers, heads, length),
            "pooled_attention": (layers, heads, bins, bins),
            "pooled_scale": (layers, heads),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be of shape {shape}, got {getattr(self, name).shape}")
        if heads % kv_heads or len(self.labels) != length or len(self.layer_kinds) != layers or self.tokens_per_bin < 1:
            raise ValueError("the parts of the capture do not fit each other")

    @property
    def n_layers(self) -> int:
        return self.probe_attention.shape[0]

    @property
    def n_heads(self) -> int:
        return self.probe_attention.shape[1]

    @property
    def n_kv_heads(self) -> int:
        return self.key_norm.shape[1]

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    def kv_head(self, head: int) -> int:
        """The kv head that a query head reads."""
        return head * self.n_kv_heads // self.n_heads

    def key_norm_by_head(self) -> np.ndarray:
        """Key norms [L, H, T], each kv head's repeated for its query heads."""
        return np.repeat(self.key_norm, self.n_heads // self.n_kv_heads, axis=1)

    def pooled(self, layer: int, head: int) -> np.ndarray:
        """[P, P] float32: the share of their attention that the queries of a bin (row) give to the keys of a bin."""
        return (self.pooled_attention[layer, head] / np.float32(255)) ** 2 * self.pooled_scale[layer, head]


_ARRAYS = tuple(f.name for f in fields(Capture) if f.type == "np.ndarray")
_HEADER = tuple(f.name for f in fields(Capture) if f.type != "np.ndarray")


def save_run(capture: Capture, path: str | Path) -> Path:
    """Write a run to a file; whatever happens meanwhile, `path` is the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {name: getattr(capture, name) for name in _HEADER}
    arrays = {name: np.ascontiguousarray(getattr(capture, name)) for name in _ARRAYS}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
        temporary_path = Path(temporary.name)
    try:
        save_file(arrays, temporary_path, metadata={"l2kv_run": str(VERSION), "header": json.dumps(header)})
        with temporary_path.open("rb") as written:
            os.fsync(written.fileno())
        temporary_path.replace(path)
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise
    return path


def load_run(path: str | Path) -> Capture:
    """Read a run, which may come from anyone.

    Raises:
        RunFileError: it cannot be read; the message says why.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "l2kv_run" not in metadata:
                raise RunFileError(f"{path.name} is a safetensors file, but not a saved run.")
            if metadata["l2kv_run"] != str(VERSION):
                raise RunFileError(
                    f"{path.name} is of version {metadata['l2kv_run'][:20]}, this program reads version {VERSION}. "
                    "Use the program that wrote it, or capture the text again."
                )
            header = json.loads(metadata["header"])
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        tuples = {name: tuple(value) for name, value in header.items() if isinstance(value, list)}
        capture = Capture(**(header | tuples | arrays))
        _check_values(capture)
    except RunFileError:
        raise
    except FileNotFoundError as error:
        raise RunFileError(f"There is no file {path}.") from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunFileError(f"{path.name} is not a run that can be read: {str(error)[:200]}") from error
    return capture


def _check_values(capture: Capture) -> None:
    texts = (capture.model, capture.architecture, capture.device, capture.dtype, capture.text, capture.probe_label)
    if not all(isinstance(t, str) for t in (*texts, *capture.labels, *capture.layer_kinds, *capture.warnings)):
        raise ValueError("a field that should be text is not")
    if not isinstance(capture.tokens_per_bin, int) or not isinstance(capture.seconds, (int, float)):
        raise ValueError("a field that should be a number is not")
    for name in ("key_norm", "value_norm", "attention_received", "probe_attention", "pooled_scale"):
        values = getattr(capture, name)
        if values.dtype != np.float32 or not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{name} holds values that no run can have")
    if capture.pooled_attention.dtype != np.uint8 or capture.token_ids.dtype != np.int64:
        raise ValueError("an array is of the wrong type")
