"""The rows of an evaluation in a file, written as they are computed, so that none is computed twice. Knows no model.

The key of a row is a digest of everything its score depends on: model, task and version of the task, the sample, the
spec, and the samples and specs in the same batch. The first line of the file is what all rows share. An evaluation
continues a file only under the same settings, threads, device, dtype and versions, and makes the same batches again, so
that ties fall the same way: methods that are added later are batches of their own.
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
from analysis.evaluation.batches import Cells, Specs
from analysis.evaluation.results import Methods, Results, Row, Run
from analysis.evaluation.task import Sample
from analysis.records import content_of, json_line, json_text, text_of, write_text
from analysis.texts.read import read_text
from l2kv.spec import CompressionSpec


def digest_of_sample(sample: Sample) -> str:
    """Digest of a sample: its tokens, and what its answer is scored by."""
    ids = [part.tolist() for part in (sample.context, sample.question, sample.target)]
    asked = [*ids, sample.name, sample.answer, sample.new_tokens, sample.document, dict(sample.at), sample.example]
    return _digest(msgspec.json.encode(asked, enc_hook=repr))


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """Digest of samples, in order."""
    return _digest(" ".join(map(digest_of_sample, samples)).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


class Log:
    """The known rows of an evaluation, by batch and spec.

    Args:
        path: file to begin or to continue; None keeps nothing.
        about: fields of the `Results` without its rows.

    Raises:
        RecordError: the file holds no results, or those of another model, task, number of threads and so on, or it
            cannot be written.
    """

    def __init__(self, path: str | Path | None, about: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.methods: Methods = about["methods"]
        self.run: Run = about["run"]
        common = {"weights": about["weights"], "task": about["task"], "run": replace(self.run, together=())}
        self._common = json_text(common)
        self._rows: dict[str, Row] = {}
        self._written: set[tuple[str, str]] = set()
        if self.path is None:
            return
        rows: tuple[Row, ...] = ()
        if self.path.exists():
            known = content_of(Results, read_text(self.path))
            rows = _rows_of(self.path, known)
            self.methods, self.run = _continued(self.path, known, about)
            about = {**about, "methods": self.methods, "run": self.run}
        self._rows = {row.key: row for row in rows}
        self._written = {(row.method, row.key) for row in rows}
        # The last line may be half written, and there may be more methods now.
        write_text(text_of(Results, {**about, "rows": rows}), self.path)

    @property
    def together(self) -> list[Specs]:
        """Specs that are evaluated at a time, as `Run.together`; none twice."""
        known: set[CompressionSpec | None] = set()
        found = []
        for names in self.run.together:
            found.append(tuple(dict.fromkeys(spec for name in names if (spec := self.methods[name]) not in known)))
            known |= {*found[-1]}
        return found

    def find(self, cells: Cells) -> list[Row] | None:
        """Find the rows of a batch; None if any is missing, since a batch is computed as a whole."""
        if not self._rows:
            return None
        rows = [row for key in self._keys(cells) if (row := self._rows.get(key))]
        return rows if len(rows) == len(list(cells.rows())) else None

    def add(self, cells: Cells, rows: Sequence[Row]) -> list[Row]:
        """Add keys to the rows of a batch, and write those that are new, for each method with their spec."""
        rows = [replace(row, key=key) for row, key in zip(rows, self._keys(cells), strict=True)]
        for row, (spec, _) in zip(rows, cells.rows(), strict=True) if self.path else ():
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

    def _keys(self, cells: Cells) -> list[str]:
        of_batch = {"specs": cells.specs, "samples": list(map(digest_of_sample, cells.samples))}
        common = self._common + json_text(of_batch)
        return [_digest(f"{common} {i}".encode()) for i, _ in enumerate(cells.rows())]


def _rows_of(path: Path, known: Mapping[str, Any]) -> tuple[Row, ...]:
    try:
        return msgspec.convert(known["rows"], tuple[Row, ...])
    except msgspec.ValidationError as error:
        raise RecordError(f"{path} holds rows that cannot be read: {error}. Choose another file.") from error


def _together_of(path: Path, known: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    try:
        return msgspec.convert(known["run"].get("together", ()), tuple[tuple[str, ...], ...])
    except (msgspec.ValidationError, LookupError, AttributeError) as error:
        raise RecordError(f"{path} does not say what was evaluated together: {error}. Choose another file.") from error


def _continued(path: Path, known: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[Methods, Run]:
    """Join the methods of the file and the new ones. Raises RecordError unless everything else is equal."""
    run: Run = about["run"]
    together = _together_of(path, known)
    now = msgspec.json.decode(json_text({**about, "run": replace(run, together=together)}).encode())
    for name in ("model", "weights", "task", "settings", "run"):
        if (then := known.get(name)) != now[name]:
            told = _told(then, now[name])
            raise RecordError(f"{path} was made with another {name}{told}. Use the same, or choose another file.")
    try:
        before = msgspec.convert(known["methods"], Methods)
    except (msgspec.ValidationError, LookupError, ValueError) as error:
        raise RecordError(f"{path} holds methods that cannot be read: {error}. Choose another file.") from error
    methods: Methods = about["methods"]
    for name in methods:
        if name in before and before[name] != methods[name]:
            raise RecordError(f"{path} calls another compression {name!r}. Choose another name, or another file.")
    new = tuple(name for name in methods if name not in before)
    return {**before, **methods}, replace(run, together=(*together, new) if new else together)


def _told(then: object, now: object) -> str:
    """Describe what differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return ": " + ", ".join(f"{key} was {then.get(key)!s:.80}, is {now.get(key)!s:.80}" for key in keys)
    return f": it was {then!s:.80}, is {now!s:.80}"
