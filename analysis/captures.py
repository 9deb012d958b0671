"""`Capture`: the record of one run of a model over one text, and its file. Knows numpy; knows no torch and no plots.

In the file large arrays are compressed and attention is quantised (`analysis.packing`): about a quarter of the bytes.
Norms are read back exactly, and attention in the same order but for new ties. By any probe, and for each
of the last queries, Γ with and without the first token, normalised ALR and Spearman's ρ differ from the original by
less than 0.01.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from analysis import records
from analysis.errors import RecordError
from analysis.models.memory import free_bytes
from analysis.packing import code_type, deflated, inflated, quantised, restored
from analysis.records import ArrayFile
from analysis.ties import levelled, shared_ranks
from analysis.words import human_bytes
from l2kv.config import CacheShape

LARGE = 2**16  # numbers: more of the last queries than this are kept in fewer steps
ALWAYS_READ = 64 * 2**20  # bytes that any file may unpack to
MOST_GROWTH = 100  # times its own bytes that a larger one may; runs of models take 4, with windows up to 40

# From the third version of the file on:
_STEPPED = ("attention_received", "probe_attention", "recent_attention")
_ALONG = {"recent_attention": 0, "pooled_attention": -2}  # rows of neighbouring queries are alike
_PACKED = ("key_norm", "value_norm", "pooled_attention", *_STEPPED)
_PLAIN = ("token_ids", "token_spans", "pooled_scale")


def _pack(capture: Capture) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, and the shapes of those that are compressed. Raises ValueError: values no run can have."""
    arrays = {name: getattr(capture, name) for name in (*_PLAIN, *_PACKED)}
    shapes = {name: arrays[name].shape for name in _PACKED}
    for name in _STEPPED:
        arrays[name], arrays[f"{name}_ends"] = quantised(arrays[name], _levels(name, shapes[name]))
    for name in _PACKED:
        arrays[name] = deflated(arrays[name], along=_ALONG.get(name))
    return arrays, {"shapes": shapes}


def _unpack(file: ArrayFile) -> Mapping[str, np.ndarray]:
    """The arrays of a run from those of its file, of any version. Raises ValueError or RecordError."""
    names = {*_PLAIN, *_PACKED}
    if file.version == 1:  # which had no last queries
        names.remove("recent_attention")
    elif file.version > 2:
        names |= {f"{name}_ends" for name in _STEPPED}
    _check_names("arrays", file.names, names)
    arrays = {name: file.read(name) for name in names}
    if file.version > 2:
        arrays = _inflated(arrays, file.content.pop("shapes", None), file.path)
    _check_values(arrays)
    if file.version == 1:
        arrays["recent_attention"] = np.zeros((0, *arrays["probe_attention"].shape), dtype=np.float32)
    return arrays


def _upgrade(version: int, content: records.Content) -> records.Content:
    """Bring the content of versions 1 to 3 to this one; `_unpack` reads their arrays."""
    if version == 3:
        content["shapes"] = json.loads(content.get("shapes", "null"))
    return content


@records.record("run", version=4, again="l2kv capture", upgrade=_upgrade, pack=_pack, unpack=_unpack)
@dataclass(frozen=True, eq=False)  # arrays have no equality; identity also makes it a key of caches
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
    probe_label: str  # label of the probe's token
    layer_kinds: tuple[str, ...]  # L of "full" or "sliding"
    windows: tuple[int, ...]  # L, the keys that a query sees; 0 is all of them
    warnings: tuple[str, ...]
    seconds: float
    head_dim: int
    tokens_per_bin: int

    token_ids: Annotated[np.ndarray, "int64 T"]
    token_spans: Annotated[np.ndarray, "int32 T 2"]  # characters of `text`
    key_norm: Annotated[np.ndarray, "float32 L Hkv T"]  # of keys as cached
    value_norm: Annotated[np.ndarray, "float32 L Hkv T"]
    attention_received: Annotated[np.ndarray, "float32 L H T"]  # mean over the queries that can see the key
    probe_attention: Annotated[np.ndarray, "float32 L H T"]  # of the greedy next token, without its own column
    recent_attention: Annotated[np.ndarray, "float32 W L H T"]  # of the last W queries, see `recent_positions`
    pooled_attention: Annotated[np.ndarray, "uint8 L H P P"]  # 255 * sqrt(share / scale), see `pooled`
    pooled_scale: Annotated[np.ndarray, "float32 L H"]
    stored: str = ""  # how most of its weights are stored in the model's files, "Q4_1" say; empty: not known

    def __post_init__(self) -> None:
        records.check_shapes(self)
        (layers, heads, length), kv_heads = self.probe_attention.shape, self.key_norm.shape[1]
        bins = self.pooled_attention.shape[-1]
        if 0 in (layers, heads, kv_heads, length, bins) or heads % kv_heads:
            raise ValueError(f"no run has {layers} layers, {heads} heads, {kv_heads} kv heads and {length} tokens")
        if len(self.recent_attention) > length:
            raise ValueError(f"{length} tokens have no {len(self.recent_attention)} last queries")
        if len(self.labels) != length or {len(self.layer_kinds), len(self.windows)} != {layers}:
            raise ValueError(f"labels, layer_kinds or windows do not fit {length} tokens in {layers} layers")
        if not set(self.layer_kinds) <= {"full", "sliding"}:
            raise ValueError(f"layer_kinds are full or sliding, got {set(self.layer_kinds)!r:.60}")
        for name, least in (("windows", min(self.windows)), ("head_dim", self.head_dim - 1), ("seconds", self.seconds)):
            if not 0 <= least < math.inf:
                raise ValueError(f"{name} must be from {int(name == 'head_dim')}, got {getattr(self, name)!r:.60}")
        if self.tokens_per_bin < 1 or bins != math.ceil(length / self.tokens_per_bin):
            raise ValueError(f"tokens_per_bin must be that of {bins} bins, got {self.tokens_per_bin!r:.60}")
        spans = self.token_spans
        if (spans < 0).any() or (np.diff(spans) < 0).any() or (spans > len(self.text)).any():
            raise ValueError("token_spans point outside the text")
        if any(row[..., at:].any() for at, row in zip(self.recent_positions, self.recent_attention, strict=True)):
            raise ValueError("recent_attention holds values where a query sees nothing")

    @property
    def n_layers(self) -> int:
        """Number of layers, L."""
        return self.probe_attention.shape[0]

    @property
    def n_heads(self) -> int:
        """Number of query heads in each layer, H."""
        return self.probe_attention.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """Number of kv heads in each layer, Hkv."""
        return self.key_norm.shape[1]

    @property
    def n_tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.token_ids)

    @property
    def recent_positions(self) -> range:
        """Positions of the last W queries. The row of a query at position p covers the p tokens before it: it is not
        renormalised without its own column, and columns from p on are 0."""
        return range(self.n_tokens - len(self.recent_attention), self.n_tokens)

    @property
    def cache_shape(self) -> CacheShape:
        """Shape of this model's key/value cache, in the dtype it ran in."""
        itemsize = 4 if self.dtype == "float32" else 2
        layers = tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "full")
        return CacheShape(layers, self.n_heads, self.n_kv_heads, self.head_dim, itemsize)

    def kv_head(self, head: int) -> int:
        """Number of the kv head that a query head reads."""
        return head * self.n_kv_heads // self.n_heads

    def key_norm_by_head(self) -> np.ndarray:
        """Key norms [L, H, T], each kv head's repeated for its query heads."""
        return np.repeat(self.key_norm, self.n_heads // self.n_kv_heads, axis=1)

    @cached_property
    def levels(self) -> np.ndarray:
        """Key norms [L, Hkv, T] float64; norms that differ by rounding alone are set equal (see `analysis.ties`)."""
        return levelled(self.key_norm, self.dtype)

    @cached_property
    def ranks(self) -> np.ndarray:
        """Lowest and highest rank among the ties of each norm, [2, L, Hkv, T] (see `ties.shared_ranks`)."""
        return shared_ranks(self.levels)

    def with_attention(self, **changes: Any) -> Capture:
        """Copy the run with other attention. Levels and ranks of its norms, the slow part, are kept."""
        made = replace(self, **changes)
        vars(made).update({name: of for name, of in vars(self).items() if name in ("levels", "ranks")})
        return made

    def with_order(self, scores: np.ndarray) -> Capture:
        """Copy the run with another order of its pairs: those of low score [L, Hkv, T] are as those of high norm."""
        ranks = shared_ranks(-scores)
        rank = ranks.mean(axis=0)
        made = replace(self, key_norm=rank.astype(np.float32))
        vars(made).update(levels=rank, ranks=ranks)  # ranks that are no norms have no rounding to level
        return made

    def pooled(self, layer: int, head: int) -> np.ndarray:
        """Share of attention that the queries of a bin (row) give to the keys of a bin (column), [P, P] float32."""
        return (self.pooled_attention[layer, head] / np.float32(255)) ** 2 * self.pooled_scale[layer, head]


def save_run(capture: Capture, path: str | Path) -> Path:
    """Write a run to a file, atomically. Raises RecordError if it cannot be written."""
    return records.save(capture, path)


def load_run(path: str | Path) -> Capture:
    """Read a run from an untrusted file. Raises RecordError if it is not one."""
    return records.load(Capture, path)


def _inflated(arrays: dict[str, np.ndarray], shapes: object, path: Path) -> dict[str, np.ndarray]:
    """The arrays as they were before `_pack`.

    Raises:
        RecordError: they would not fit into free memory.
        ValueError: they are damaged, or would take more than any run in so many bytes.
    """
    if not isinstance(shapes, dict):
        raise ValueError("its shapes are no JSON object")
    _check_names("shapes", shapes.keys(), set(_PACKED))
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
            f"{path.name} would take {human_bytes(needed)} of memory, and {human_bytes(allowed)} may be used. "
            "Free some, and try again."
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
    """Number of levels for rows of attention. The last queries fill most of a file, and are shown as a mean only."""
    return 140 if name == "recent_attention" and math.prod(shape) > LARGE else 4094


def _check_names(what: str, got: Set[str], expected: Set[str]) -> None:
    if missing := expected - got:
        raise ValueError(f"its {what} lack {', '.join(sorted(missing))}")
    if foreign := got - expected:
        raise ValueError(f"its {what} hold {', '.join(sorted(foreign))}, which no run has")


def _check_values(arrays: Mapping[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{name} holds values that no run can have")
