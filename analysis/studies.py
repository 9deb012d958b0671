"""One model over many texts: the figures of every head for each text, kept and resumed. Captures are not kept.

Memory holds one capture at a time; the table grows by 3 probes x 12 metrics x L x H numbers a text. It is written as
texts are done, and however the study ends, as one file that is there whole or not at all. What the table says is worked
out in `analysis.statistics`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError

from analysis.errors import RecordError, TextError
from analysis.files import reading_whole, write_whole
from analysis.metrics import METRICS, PROBES, STATUSES, metrics
from analysis.texts.excerpts import Excerpt

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.recorder import OnLayer

VERSION = 3
MOST_TEXTS = 10_000  # of a study: intervals over more take more memory than a study of them does
_EACH, _PAUSE = 8, 5.0  # so many texts are each written at once; those after them at most every few seconds

OnText = Callable[["Study"], None]
"""Called after each text with the study so far: `len(study.names)` of `study.texts` are done. What it raises cancels
the study and passes through; what was done is in the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """The figures of a model on N texts, all or the first of those asked for."""

    model: str  # its name
    weights: str  # a digest of weights and vocabulary: which model this is
    layer_kinds: tuple[str, ...]  # L of "full" or "sliding"
    texts: int  # asked for
    names: tuple[str, ...]  # N, of the texts done
    digests: tuple[str, ...]  # N, sha256 of each text

    n_tokens: np.ndarray  # [N] int64
    values: np.ndarray  # [N, P, M, L, H] float64, P `PROBES` and M `METRICS`; NaN where the status is not "ok"
    status: np.ndarray  # [N, P, M, L, H] uint8, index into `STATUSES`
    documents: tuple[str, ...] = ()  # N, names of what each text is an excerpt of; none in older files: not known

    def __post_init__(self) -> None:
        n = len(self.names)
        if not 1 <= n <= self.texts <= MOST_TEXTS or 0 in self.values.shape:
            raise ValueError(
                f"a study is of 1 to {MOST_TEXTS:,} texts, and of heads; got {n} of {self.texts} texts, and values of "
                f"shape {self.values.shape}"
            )
        expected = (n, len(PROBES), len(METRICS), len(self.layer_kinds))
        if not (self.values.shape == self.status.shape and self.values.ndim == 5 and self.values.shape[:4] == expected):
            raise ValueError(f"values and status must be of shape {(*expected, 'H')}, got {self.values.shape}")
        if len(self.digests) != n or len(self.documents) not in (0, n) or self.n_tokens.shape != (n,):
            raise ValueError(f"digests, documents or n_tokens do not fit {n} texts")
        if (self.status >= len(STATUSES)).any() or (np.isfinite(self.values) != (self.status == 0)).any():
            raise ValueError("values must be numbers where the status is ok, and nowhere else")

    @property
    def complete(self) -> bool:
        """Whether all texts asked for are done."""
        return len(self.names) == self.texts

    def of(self, metric: str, *, probe: str = "next token") -> np.ndarray:
        """[N, L, H] of one metric by one probe."""
        return self.values[:, *_place(metric, probe)]

    def status_of(self, metric: str, *, probe: str = "next token") -> np.ndarray:
        """[N, L, H] of str: "ok", or why the metric is undefined there."""
        return np.array(STATUSES, dtype=object)[self.status[:, *_place(metric, probe)]]


def study(
    loaded: LoadedModel,
    texts: Iterable[Excerpt | tuple[str, str]],
    path: str | Path | None = None,
    *,
    on_text: OnText | None = None,
    on_layer: OnLayer | None = None,
) -> Study:
    """Capture each text and keep what `analysis.metrics` says of it.

    Args:
        texts: (name, text) of each, or `excerpts`. The texts stay in memory, their captures do not.
        path: where to keep the table. If it is there, it is gone on with: what it holds must be the first of `texts`,
            in the same model. Whatever ends the study, the texts done are in it; a process that is killed loses those
            of its last few seconds.
        on_text, on_layer: for progress and cancelling; `on_layer` as in `capture`.

    Raises:
        RecordError: the file is of another model or of other texts, or cannot be read or written; says which.
        TextError: there are no texts, or more than `MOST_TEXTS`, or one of them cannot be run; says which, and those
            before it are in the file.
        OutOfMemoryError, ModelError: as `capture`.
    """
    from analysis.recorder import capture  # waits for torch, which reading a study need not

    texts = tuple(Excerpt(*text) for text in texts)
    if not texts:
        raise TextError("There are no texts to study.")
    if len(texts) > MOST_TEXTS:
        raise TextError(f"A study is of {MOST_TEXTS:,} texts at most, got {len(texts):,}.")
    weights = _digest_of_model(loaded)
    done = written = _resumed(path, loaded.name, weights, texts)
    due = 0.0
    try:
        for name, text, document in texts[len(done.names) if done else 0 :]:
            try:
                run = capture(loaded, text, on_layer=on_layer)
            except TextError as error:
                raise TextError(f"{name}: {error}") from error
            figures = [metrics(run, probe=probe) for probe in PROBES]
            done = Study(
                model=loaded.name,
                weights=weights,
                layer_kinds=run.layer_kinds,
                texts=len(texts),
                names=(*(done.names if done else ()), name),
                digests=(*(done.digests if done else ()), _digest(text)),
                n_tokens=_joined(done and done.n_tokens, np.array(run.n_tokens)),
                values=_joined(done and done.values, np.stack([f.values for f in figures])),
                status=_joined(done and done.status, np.stack([f.status for f in figures])),
                documents=(*(done.documents if done else ()), document or name),
            )
            del run  # before the next is made: two do not fit where one does
            # The file is the whole table: written at every text, its bytes would grow with the square of the texts.
            if path is not None and (len(done.names) <= _EACH or time.monotonic() >= due):
                save_study(done, path)
                written, due = done, time.monotonic() + _PAUSE
            if on_text is not None:
                on_text(done)
    finally:
        if path is not None and done is not written:
            save_study(done, path)
    assert done is not None  # there is a text
    return done


def save_study(study: Study, path: str | Path) -> Path:
    """Write a study, whole or not at all. Raises RecordError, with the reason."""
    path = Path(path)
    header = {name: getattr(study, name) for name in _HEADER} | {"probes": tuple(PROBES), "metrics": tuple(METRICS)}
    metadata = {"l2kv_study": str(VERSION), "header": json.dumps(header)}
    try:
        write_whole(path, {name: getattr(study, name) for name in _ARRAYS}, metadata)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"The study cannot be written to {path}: {error}. Choose another place.") from error
    return path


def load_study(path: str | Path) -> Study:
    """Read a study, which may come from anyone. Raises RecordError, with the reason."""
    path = Path(path)
    with reading_whole(path, "study") as (file, version, header):
        known = (header.pop("probes", 0), header.pop("metrics", 0)) == (list(PROBES), list(METRICS))
        if version not in ("2", str(VERSION)) or not known:
            raise RecordError(
                f"{path.name} is a study of version {version[:20]} or of other metrics; this program reads versions 2 "
                f"and {VERSION} with its own. Use the one that wrote it, or study them again."
            )
        if version == "2":
            header["documents"] = []
        _check_header(header, set(file.keys()))
        arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        for name, dtype in {"n_tokens": np.int64, "values": np.float64, "status": np.uint8}.items():
            if arrays[name].dtype != dtype:
                raise ValueError(f"{name} is of type {arrays[name].dtype}")
        return Study(**{k: tuple(v) if isinstance(v, list) else v for k, v in header.items()}, **arrays)


_ARRAYS = tuple(f.name for f in fields(Study) if f.type == "np.ndarray")
_HEADER = tuple(f.name for f in fields(Study) if f.type != "np.ndarray")


def _place(metric: str, probe: str) -> tuple[int, int]:
    for name, known, what in ((probe, PROBES, "probe"), (metric, METRICS, "metric")):
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    return tuple(PROBES).index(probe), tuple(METRICS).index(metric)


def _check_header(header: dict[str, object], arrays: set[str]) -> None:
    if set(header) != set(_HEADER) or arrays != set(_ARRAYS):
        raise ValueError("it holds other parts than a study")
    lists = {name: header[name] for name in ("layer_kinds", "names", "digests", "documents")}
    for name, value in {"model": [header["model"]], "weights": [header["weights"]], **lists}.items():
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise ValueError(f"{name} should be text")
        "".join(value).encode()  # half a character (a lone surrogate) cannot be shown or written
    if len(header["names"]) > MOST_TEXTS:  # before their numbers are read
        raise ValueError(f"it holds more than {MOST_TEXTS:,} texts")
    if type(header["texts"]) is not int:
        raise ValueError(f"texts should be a whole number, got {header['texts']!r}")


def _resumed(path: str | Path | None, model: str, weights: str, texts: tuple[Excerpt, ...]) -> Study | None:
    """The study that the file holds, if there is one and it is a beginning of the one asked for."""
    if path is None or not Path(path).exists():
        return None
    done, instead = load_study(path), "Choose another file, or delete this one."
    if done.weights != weights:
        raise RecordError(
            f"{path} holds a study of another model: {done.model}, whose weights, dtype or vocabulary are not those of "
            f"{model}. {instead}"
        )
    if len(done.names) > len(texts):
        raise RecordError(f"{path} holds {len(done.names)} texts already, and {len(texts)} were given. {instead}")
    for i, (before, digest, (name, text, _)) in enumerate(zip(done.names, done.digests, texts, strict=False)):
        if (before, digest) != (name, _digest(text)):
            what = f"it was {before!r}, and is now {name!r}" if before != name else f"{name!r} has changed"
            raise RecordError(f"{path} holds a study of other texts: of text {i}, {what}. {instead}")
    known = tuple(document or name for name, _, document in texts[: len(done.names)])
    return replace(done, texts=len(texts), documents=known)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest_of_model(loaded: LoadedModel) -> str:
    """Of every weight its name, dtype, shape and 64 of its numbers, and of the vocabulary all of it.

    64 are enough to tell a model from any that was trained on; to read all of a large one would take as long as a text.
    """
    digest = hashlib.sha256(json.dumps(loaded.tokenizer.get_vocab(), sort_keys=True).encode())
    for name, weight in loaded.model.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def _joined(before: np.ndarray | None, one: np.ndarray) -> np.ndarray:
    return one[None] if before is None else np.concatenate([before, one[None]])
