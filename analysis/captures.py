"""`Capture`: all that one run of a model over one text has shown, and its file. Knows numpy; knows no torch, no plot.

A run is one safetensors file, its JSON header in the file's metadata: one file can be renamed into place at once, so a
run on disk is whole or not there, and it can be handed on in one piece. Reading it runs no code.

In the file large arrays are compressed, and attention is in steps (`analysis.packing`): about a quarter of the bytes.
What is read back has the very same norms, and attention in the same order, but for new ties. By any probe, and for each
of the last queries, Γ with and without the first token, ALR over that of a random order and Spearman's then differ from
those before by less than 0.01.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from analysis.errors import RecordError
from analysis.files import reading_whole, write_whole
from analysis.models.memory import free_bytes, human_bytes
from analysis.packing import code_type, deflated, inflated, quantised, restored
from l2kv.config import CacheShape

VERSION = 3
LARGE = 2**16  # numbers: more of the last queries than this are kept in fewer steps
ALWAYS_READ = 64 * 2**20  # bytes that any file may unpack to
MOST_GROWTH = 100  # times its own bytes that a larger one may; runs of models take 4, with windows up to 40


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no equality; identity also makes it a key of caches
class Capture:
    """One text in one model. L layers, H query heads, Hkv kv heads, T tokens, P <= 128 bins of tokens, W last queries.

    Kv head k serves the query heads k * G to (k + 1) * G - 1, G = H / Hkv.
    """

    model: str  # its name
    architecture: str
    device: str
    dtype: str  # that it was computed in, and cached
    text: str
    labels: tuple[str, ...]  # T, what to call each token
    probe_label: str  # of the token whose attention row `probe_attention` is
    layer_kinds: tuple[str, ...]  # L of "full" or "sliding"
    windows: tuple[int, ...]  # L, the keys that a query sees; 0 is all of them
    warnings: tuple[str, ...]
    seconds: float
    head_dim: int
    tokens_per_bin: int

    token_ids: np.ndarray  # [T] int64
    token_spans: np.ndarray  # [T, 2] int32, characters of `text`
    key_norm: np.ndarray  # [L, Hkv, T] float32, of keys as cached
    value_norm: np.ndarray  # [L, Hkv, T] float32
    attention_received: np.ndarray  # [L, H, T] float32: mean over the queries that can see the key
    probe_attention: np.ndarray  # [L, H, T] float32: the row of the greedy next token, without its own column
    recent_attention: np.ndarray  # [W, L, H, T] float32: the rows of the last W queries, see `recent_positions`
    pooled_attention: np.ndarray  # [L, H, P, P] uint8: 255 * sqrt(share / scale), see `pooled`
    pooled_scale: np.ndarray  # [L, H] float32
    stored: str = ""  # how most of its weights are stored in the model's files, "Q4_1" say; empty: not known

    def __post_init__(self) -> None:
        (layers, heads, length), (_, kv_heads, _) = self.probe_attention.shape, self.key_norm.shape
        *_, bins = self.pooled_attention.shape
        expected = {
            "token_ids": (length,),
            "token_spans": (length, 2),
            "key_norm": (layers, kv_heads, length),
            "value_norm": (layers, kv_heads, length),
            "attention_received": (layers, heads, length),
            "probe_attention": (layers, heads, length),
            "recent_attention": (*self.recent_attention.shape[:1], layers, heads, length),
            "pooled_attention": (layers, heads, bins, bins),
            "pooled_scale": (layers, heads),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be of shape {shape}, got {getattr(self, name).shape}")
        if 0 in (layers, heads, kv_heads, length, bins) or heads % kv_heads:
            raise ValueError(f"no run has {layers} layers, {heads} heads, {kv_heads} kv heads and {length} tokens")
        if len(self.recent_attention) > length:
            raise ValueError(f"{length} tokens have no {len(self.recent_attention)} last queries")
        if (
            len(self.labels) != length
            or {len(self.layer_kinds), len(self.windows)} != {layers}
            or self.tokens_per_bin < 1
        ):
            raise ValueError(
                f"labels, layer_kinds, windows or tokens_per_bin do not fit {length} tokens in {layers} layers"
            )

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

    @property
    def recent_positions(self) -> range:
        """Where the last W queries stand. The row of one at position p is of the p tokens before it: its own column is
        left out, the row is not renormalised, and columns from p on are 0."""
        return range(self.n_tokens - len(self.recent_attention), self.n_tokens)

    @property
    def cache_shape(self) -> CacheShape:
        """Of the key/value cache of this model, in the dtype it ran in."""
        itemsize = 4 if self.dtype == "float32" else 2
        layers = tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "full")
        return CacheShape(layers, self.n_heads, self.n_kv_heads, self.head_dim, itemsize)

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

# From the third version on:
_STEPPED = ("attention_received", "probe_attention", "recent_attention")
_ALONG = {"recent_attention": 0, "pooled_attention": -2}  # rows of neighbouring queries are alike
_PACKED = ("key_norm", "value_norm", "pooled_attention", *_STEPPED)


def save_run(capture: Capture, path: str | Path) -> Path:
    """Write a run to a file; whatever happens meanwhile, `path` is the old file or the whole new one.

    Raises:
        RecordError: it cannot be written there; the message says why.
    """
    path = Path(path)
    header = {name: getattr(capture, name) for name in _HEADER}
    try:
        arrays, shapes = _packed(capture)
        metadata = {"l2kv_run": str(VERSION), "header": json.dumps(header), "shapes": json.dumps(shapes)}
        write_whole(path, arrays, metadata)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"The run cannot be written to {path}: {error}. Choose another place.") from error
    except ValueError as error:
        raise RecordError(f"The run cannot be written: {error}.") from error
    return path


def load_run(path: str | Path) -> Capture:
    """Read a run, which may come from anyone.

    Raises:
        RecordError: it cannot be read; the message says why.
    """
    path = Path(path)
    with reading_whole(path, "run") as (file, version, header):
        if version not in map(str, range(1, VERSION + 1)):
            raise RecordError(
                f"{path.name} is of version {version[:20]}, this program reads versions 1 to {VERSION}. "
                "Use the program that wrote it, or capture the text again."
            )
        header = {"stored": ""} | header  # not told by the first files
        _check_names("header", header, _HEADER)
        names = _ARRAYS
        if version == "1":  # which had no last queries
            names = tuple(name for name in _ARRAYS if name != "recent_attention")
        elif version != "2":
            names += tuple(f"{name}_ends" for name in _STEPPED)
        _check_names("arrays", file.keys(), names)
        arrays = {name: file.get_tensor(name) for name in names}
        if version not in ("1", "2"):
            arrays = _unpacked(arrays, json.loads(file.metadata().get("shapes", "null")), path)
        tuples = {name: tuple(value) for name, value in header.items() if isinstance(value, list)}
        _check_header(header | tuples)
        _check_arrays(arrays, header["text"])
        if version == "1":
            arrays["recent_attention"] = np.zeros((0, *arrays["probe_attention"].shape), dtype=np.float32)
        capture = Capture(**header | tuples | arrays)
        if capture.pooled_attention.shape[-1] != math.ceil(capture.n_tokens / capture.tokens_per_bin):
            raise ValueError("tokens_per_bin does not fit pooled_attention")
        if any(row[..., at:].any() for at, row in zip(capture.recent_positions, capture.recent_attention, strict=True)):
            raise ValueError("recent_attention holds values where a query sees nothing")
        return capture


def _packed(capture: Capture) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """The arrays of a file, and the shapes of those that are compressed. Raises ValueError: values no run can have."""
    arrays = {name: getattr(capture, name) for name in _ARRAYS}
    shapes = {name: arrays[name].shape for name in _PACKED}
    for name in _STEPPED:
        arrays[name], arrays[f"{name}_ends"] = quantised(arrays[name], _levels(name, shapes[name]))
    for name in _PACKED:
        arrays[name] = deflated(arrays[name], along=_ALONG.get(name))
    return arrays, shapes


def _unpacked(arrays: dict[str, np.ndarray], shapes: object, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a run from those of its file.

    Raises:
        RecordError: they would not fit into free memory.
        ValueError: they are damaged, or would take more than any run in so many bytes.
    """
    if not isinstance(shapes, dict):
        raise ValueError("its shapes are no JSON object")
    _check_names("shapes", shapes, _PACKED)
    for name, shape in shapes.items():
        if not isinstance(shape, list) or len(shape) > 4 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise ValueError(f"the shape of {name} is no list of whole numbers")
        if arrays[name].dtype != np.uint8 or arrays[name].ndim != 1:
            raise ValueError(f"{name} is of type {arrays[name].dtype}, not compressed bytes")
    # Known before anything is unpacked: some bytes may stand for a million times as many.
    needed, size = sum(4 * math.prod(shape) for shape in shapes.values()), path.stat().st_size
    allowed = 0.8 * free_bytes("cpu")
    if needed > max(ALWAYS_READ, MOST_GROWTH * size):
        raise ValueError(f"unpacked, it would take {human_bytes(needed)}, more than any run in {human_bytes(size)}")
    if needed > allowed:
        raise RecordError(
            f"{path.name} would take {human_bytes(needed)} of memory, and {human_bytes(allowed)} may be used."
        )
    for name, shape in shapes.items():
        levels = _levels(name, shape)
        dtype = np.uint8 if name == "pooled_attention" else code_type(levels) if name in _STEPPED else np.float32
        try:
            arrays[name] = inflated(arrays[name], shape, dtype, along=_ALONG.get(name))
            if name in _STEPPED:
                arrays[name] = restored(arrays[name], arrays.pop(f"{name}_ends"), levels)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    return arrays


def _levels(name: str, shape: Sequence[int]) -> int:
    """How many steps the rows of attention have. The last queries' are most of a file, and are only shown as a mean."""
    return 140 if name == "recent_attention" and math.prod(shape) > LARGE else 4094


def _check_names(what: str, got: Iterable[str], expected: tuple[str, ...]) -> None:
    if missing := set(expected) - set(got):
        raise ValueError(f"its {what} lack {', '.join(sorted(missing))}")
    if foreign := set(got) - set(expected):
        raise ValueError(f"its {what} hold {', '.join(sorted(foreign))}, which no run has")


def _check_header(header: dict[str, object]) -> None:
    for name in ("model", "architecture", "device", "dtype", "stored", "text", "probe_label"):
        _check_text(name, header[name])
    for name in ("labels", "layer_kinds", "warnings"):
        if not isinstance(header[name], tuple):
            raise ValueError(f"{name} is not a list of texts")
        for value in header[name]:
            _check_text(name, value)
    if not set(header["layer_kinds"]) <= {"full", "sliding"}:
        raise ValueError("layer_kinds are full or sliding")
    windows = header["windows"]
    if not isinstance(windows, tuple) or not all(type(w) is int and w >= 0 for w in windows):
        raise ValueError("windows are a list of whole numbers")
    for name in ("head_dim", "tokens_per_bin"):
        if type(header[name]) is not int or header[name] < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {header[name]!r}")
    if type(header["seconds"]) not in (int, float) or not 0 <= header["seconds"] < math.inf:
        raise ValueError(f"seconds must be a number, got {header['seconds']!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} should be text, got {value!r}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} holds half a character (a lone surrogate)")  # which cannot be shown or written


def _check_arrays(arrays: dict[str, np.ndarray], text: str) -> None:
    whole = {"token_ids": np.int64, "token_spans": np.int32, "pooled_attention": np.uint8}
    for name, values in arrays.items():
        if values.dtype != whole.get(name, np.float32):
            raise ValueError(f"{name} is of type {values.dtype}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{name} holds values that no run can have")
    spans = arrays["token_spans"]
    if spans.ndim != 2 or (np.diff(spans) < 0).any() or (spans > len(text)).any():
        raise ValueError("token_spans point outside the text")
