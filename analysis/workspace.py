"""The workspace: a folder of runs, studies, results and plans, each by an id that names its content.

A record is a file of its own, beside a small file that says what it is: a list of a thousand reads the small ones only.
An id is the digest of the file's bytes, so the same run has the same id on every machine, and a link that names it
can't show another. Results grow while they are measured: theirs is the digest of what was asked (`results_file`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from analysis.captures import Capture
from analysis.decision.speed import Speed
from analysis.errors import RecordError
from analysis.evaluation.results import Results, results_so_far
from analysis.models.packaged import home
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front
from analysis.plans.skip import Plan
from analysis.records import json_line, kind_of, load, load_any, record, save
from analysis.stories import Story
from analysis.studies import Study
from analysis.timelines import Timeline
from analysis.words import counted

KINDS: dict[str, type] = {
    kind_of(cls).name: cls for cls in (Capture, Study, Results, Plan, Front, Ablation, Speed, Timeline, Story)
}
"""Classes of records that a workspace holds, by the name of their kind: "run", "study", "results", ..."""
ID_DIGITS = 12
_ABOUT = ".about.json"
_MODELS = "models.jsonl"
_ID = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}")

Thing = TypeVar("Thing")


@record("entry", version=1, title="the description of a file in a workspace")
@dataclass(frozen=True, slots=True)
class Entry:
    """What a workspace says of one of its records without opening it."""

    id: str
    kind: str
    """Name in `KINDS`."""
    model: str
    """Name of the model that it is of."""
    name: str
    """What the user calls it."""
    about: str
    """What it is, in a few words: "1,409 tokens"."""
    created: str
    """When it was added, in ISO 8601, UTC."""
    file: str
    """Name of its file."""


class Workspace:
    """The records in a folder; by default `home() / "workspace"`. Processes may share one.

    Args:
        folder: where it is; it is made with the first record.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._given = None if folder is None else Path(folder)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._given or home() / "workspace"

    def entries(self, kind: str | None = None, *, model: str | None = None) -> list[Entry]:
        """List what is there, newest first, of one kind or model or of all. Files that can't be read are left out."""
        found = (_entry(Path(each.path), each.stat().st_mtime_ns) for each in self._abouts())
        wanted = [one for one in found if one and kind in (None, one.kind) and model in (None, one.model)]
        return sorted(wanted, key=lambda one: (one.created, one.id), reverse=True)

    def find(self, id: str) -> Entry | None:
        """Find what is known of an id; None where nothing is."""
        about = self.folder / f"{id}{_ABOUT}"
        if not _ID.fullmatch(id) or not about.is_file():
            return None
        return _entry(about, about.stat().st_mtime_ns)

    def path(self, id: str) -> Path:
        """File of a record. Raises RecordError where there is none."""
        entry = self.find(id)
        if entry is None or not (path := self.folder / entry.file).is_file():
            raise RecordError(f"There is nothing with the id {id[:40]!r} in this workspace.")
        return path

    def open(self, cls: type[Thing], id: str) -> Thing:
        """Read a record of a class. Raises RecordError."""
        return load(cls, self.path(id))

    def add(self, thing: object, *, name: str) -> Entry:
        """Save a record, and return what is known of it; the same record again keeps its id and gets the new name."""
        arrays = isinstance(thing, (Capture, Study, Timeline))
        new = self.folder / f".new-{os.urandom(6).hex()}{'.safetensors' if arrays else '.json'}"
        try:
            return self._take(save(thing, new), thing, name)
        finally:
            with suppress(OSError):
                new.unlink()

    def add_file(self, path: str | Path, *, name: str = "") -> Entry:
        """Copy a file of any of the `KINDS` into the workspace. Raises RecordError: it is none, or is damaged."""
        path = Path(path)
        thing = load_any(tuple(KINDS.values()), path)
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".new-{os.urandom(6).hex()}{path.suffix}"
        try:
            shutil.copyfile(path, new)
            return self._take(new, thing, name or path.stem)
        except OSError as error:
            raise RecordError(f"{path.name} cannot be copied into {self.folder}: {error}.") from error
        finally:
            with suppress(OSError):
                new.unlink()

    def results_file(self, asked: Mapping[str, Any]) -> tuple[str, Path]:
        """Id and file of results that are measured as they were `asked` for: the same question finds them again."""
        id = _digest(asked)
        return id, self.folder / f"{id}.jsonl"

    def note_results(self, id: str, *, name: str) -> Entry:
        """List results that were written to their `results_file`, whether or not all of them. Raises RecordError."""
        path = self.folder / f"{id}.jsonl"
        return self._note(id, path, results_so_far(path), name)

    def unfinished(self, asked: Mapping[str, Any]) -> Path:
        """File for a record that is still being made as it was `asked` for: the same question finds it again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f".unfinished-{_digest(asked)}.safetensors"

    def answer(self, cls: type[Thing], asked: Mapping[str, Any]) -> Thing | None:
        """Read what was kept for a question by `keep`, which no list shows; None where nothing that can be read was."""
        with suppress(RecordError):
            return load(cls, self._answer_file(asked))
        return None

    def keep(self, thing: object, asked: Mapping[str, Any]) -> None:
        """Keep the answer to a question, for `answer`. Raises RecordError where it can't be written."""
        save(thing, self._answer_file(asked))

    def _answer_file(self, asked: Mapping[str, Any]) -> Path:
        return self.folder / f".answer-{_digest(asked)}"

    def note_model(self, ref: str) -> None:
        """Remember a folder or file of a model, so that it need not be typed again."""
        if ref in self.models():
            return
        with suppress(OSError):  # a convenience
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / _MODELS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(ref) + "\n")

    def models(self) -> list[str]:
        """List what `note_model` was told, the latest first."""
        with suppress(OSError, ValueError):
            lines = (self.folder / _MODELS).read_text(encoding="utf-8").splitlines()
            return [ref for line in reversed(lines) if isinstance(ref := json.loads(line), str)]
        return []

    def rename(self, id: str, name: str) -> Entry:
        """Call a record something else. Raises RecordError where there is none."""
        self.path(id)
        entry = self.find(id)
        assert entry is not None
        return self._write(replace(entry, name=name.strip()[:200] or entry.name))

    def delete(self, id: str) -> None:
        """Delete a record, if it is there."""
        if entry := self.find(id):
            for path in (self.folder / f"{id}{_ABOUT}", self.folder / entry.file):
                with suppress(FileNotFoundError):
                    path.unlink()

    def _abouts(self) -> Iterator[os.DirEntry[str]]:
        with suppress(FileNotFoundError), os.scandir(self.folder) as files:
            yield from (file for file in files if file.name.endswith(_ABOUT))

    def _take(self, new: Path, thing: object, name: str) -> Entry:
        id = digest_of_file(new)
        path = self.folder / f"{id}{new.suffix}"
        new.replace(path)
        return self._note(id, path, thing, name)

    def _note(self, id: str, path: Path, thing: object, name: str) -> Entry:
        kind = kind_of(type(thing)).name
        known = self.find(id)
        created = known.created if known else datetime.now(UTC).isoformat(timespec="milliseconds")
        model: str = getattr(thing, "model", "")
        return self._write(Entry(id, kind, model, name.strip()[:200] or kind, _in_words(thing), created, path.name))

    def _write(self, entry: Entry) -> Entry:
        save(entry, self.folder / f"{entry.id}{_ABOUT}")
        return entry


def _digest(asked: Mapping[str, Any]) -> str:
    canonical = json.dumps(json.loads(json_line(asked)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:ID_DIGITS]


def digest_of_file(path: str | Path) -> str:
    """Id of a record by the bytes of its file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:ID_DIGITS]


@lru_cache(maxsize=4096)
def _entry(path: Path, changed: int) -> Entry | None:
    """Read an entry; None for one that can't be, as when it was deleted in between. `changed` names the version."""
    with suppress(OSError, msgspec.MsgspecError):
        content = msgspec.json.decode(path.read_bytes(), type=dict)
        entry = msgspec.convert(content, Entry)
        if entry.kind in KINDS and f"{entry.id}{_ABOUT}" == path.name and Path(entry.file).name == entry.file:
            return entry
    return None


def _in_words(thing: object) -> str:
    if isinstance(thing, Capture):
        return counted(thing.n_tokens, "token")
    if isinstance(thing, Study):
        return counted(len(thing.names), "text")
    if isinstance(thing, Results):
        return f"{thing.task}, {counted(len(thing.samples), 'sample')}, {counted(len(thing.methods), 'method')}"
    if isinstance(thing, Timeline):
        return f"{counted(len(thing.labels), 'token')}, {len(thing.nats)} of them its continuation"
    if isinstance(thing, Story):
        return f"{counted(len(thing.caches), 'cache')}, {counted(len(thing.labels), 'token')} and {thing.n_steps} new"
    return kind_of(type(thing)).title.removeprefix("a ")
