"""The rows of an evaluation as a file of lines, written as they are computed. What it holds is not computed again.

A row is found by a key, a digest of all that its score depends on: the model, the task and its version, the sample,
those that it was batched with, and the spec. The file's first line says what all rows have in common: it is gone on
with only under the same threads, device, dtype and versions, so that ties fall alike. Knows no model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from analysis.errors import RecordError
from analysis.evaluation.results import Methods, Results, Row
from analysis.evaluation.task import Sample
from analysis.records import content_of, json_line, json_text, text_of, write_text
from analysis.texts.read import read_text
from l2kv.spec import CompressionSpec


def digest_of_sample(sample: Sample) -> str:
    """Digest of all that a sample asks, and of what its score goes by."""
    ids = [part.tolist() for part in (sample.context, sample.question, sample.target)]
    asked = [*ids, sample.name, sample.answer, sample.new_tokens, sample.document, dict(sample.at), sample.example]
    return _digest(msgspec.json.encode(asked, enc_hook=repr))


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """Digest of samples in their order."""
    return _digest(" ".join(map(digest_of_sample, samples)).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


class Log:
    """The rows that are known of an evaluation, by batch and spec. With a path they are kept there, else nowhere.

    Args:
        path: of a file that is started, or resumed.
        about: the fields of the `Results` but for their rows.

    Raises:
        RecordError: the file is none of results, or of others: another model, task, number of threads ...; or it
            can't be written.
    """

    def __init__(self, path: str | Path | None, about: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.methods: Methods = about["methods"]
        self._common = json_text({name: about[name] for name in ("weights", "task", "run")})
        self._rows: dict[str, Row] = {}
        self._written: set[tuple[str, str]] = set()
        if self.path is None:
            return
        rows: tuple[Row, ...] = ()
        if self.path.exists():
            known = content_of(Results, read_text(self.path))
            rows = _rows_of(self.path, known)
            about = {**about, "methods": _methods_of(self.path, known, about)}
        self._rows = {row.key: row for row in rows}
        self._written = {(row.method, row.key) for row in rows}
        # Anew, for the last line may be half written, and there may be more methods now.
        write_text(text_of(Results, {**about, "rows": rows}), self.path)

    def find(self, batch: Sequence[Sample], spec: CompressionSpec | None) -> tuple[Row, ...] | None:
        """The rows of a batch by a spec; None where one is missing, for a batch is computed as a whole."""
        if not self._rows:
            return None
        rows = [self._rows.get(key) for key in self._keys(batch, spec)]
        found = tuple(row for row in rows if row)
        return found if len(found) == len(batch) else None

    def add(self, batch: Sequence[Sample], spec: CompressionSpec | None, rows: Sequence[Row]) -> list[Row]:
        """The rows of a batch by a spec with their keys. Written are those of each method that is it, if not yet."""
        rows = [replace(row, key=key) for row, key in zip(rows, self._keys(batch, spec), strict=True)]
        for row in rows if self.path else ():
            for method in (name for name, its in self.methods.items() if its == spec):
                if (method, row.key) not in self._written:
                    self._append(replace(row, method=method))
        return rows

    def _append(self, row: Row) -> None:
        assert self.path is not None
        try:
            with self.path.open("ab") as file:
                file.write(json_line(row).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecordError(f"{self.path} cannot be written: {error}. Choose another place.") from error
        self._rows[row.key] = row
        self._written.add((row.method, row.key))

    def _keys(self, batch: Sequence[Sample], spec: CompressionSpec | None) -> list[str]:
        common = self._common + json_text({"spec": spec, "batch": list(map(digest_of_sample, batch))})
        return [_digest(f"{common} {i}".encode()) for i in range(len(batch))]


def _rows_of(path: Path, known: Mapping[str, Any]) -> tuple[Row, ...]:
    try:
        return msgspec.convert(known["rows"], tuple[Row, ...])
    except msgspec.ValidationError as error:
        raise RecordError(f"{path} holds rows that cannot be read: {error}. Choose another file.") from error


def _methods_of(path: Path, known: Mapping[str, Any], about: Mapping[str, Any]) -> Methods:
    """The methods of the file and those of now. Raises RecordError unless all else is the same."""
    now = msgspec.json.decode(json_text(about).encode())
    for name in ("model", "weights", "task", "settings", "run"):
        if (then := known.get(name)) != now[name]:
            told = _told(then, now[name])
            raise RecordError(
                f"{path} was begun with another {name}{told}. Go on under the same, or choose another file."
            )
    try:
        before = msgspec.convert(known["methods"], Methods)
    except (msgspec.ValidationError, LookupError, ValueError) as error:
        raise RecordError(f"{path} holds methods that cannot be read: {error}. Choose another file.") from error
    methods: Methods = about["methods"]
    for name in methods:
        if name in before and before[name] != methods[name]:
            raise RecordError(f"{path} calls another compression {name!r}. Choose another name, or another file.")
    return {**before, **methods}


def _told(then: object, now: object) -> str:
    """What differs, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return ": " + ", ".join(f"{key} was {then.get(key)!s:.80}, is {now.get(key)!s:.80}" for key in keys)
    return f": it was {then!s:.80}, is {now!s:.80}"
