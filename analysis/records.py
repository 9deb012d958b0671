"""The one reader and writer of records: frozen dataclasses to files and back.

A record without arrays is a JSON object that says what it is, and of which version: {"l2kv_plan": 1, ...}. One with
arrays is a safetensors file: arrays as tensors, the rest as JSON in its metadata. Files are written atomically.
Files are untrusted: reading one runs no code, and a RecordError says what is wrong with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from analysis.errors import RecordError, TextError
from analysis.texts import read as texts

Record = TypeVar("Record")
Axes = dict[str, tuple[str, tuple[str, ...]]]
Content = dict[str, Any]
"""What a file says, before it is checked: the JSON object without its heading."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a class of records is stored on disk."""

    name: str
    """In files: "plan" is headed {"l2kv_plan": version}."""
    version: int
    """Version that is written. Older ones are read by `upgrade`."""
    title: str
    """Name for users: "a plan"."""
    again: str
    """Command that makes the record again, for users whose file is too old."""
    upgrade: Callable[[int, Content], Content] | None = None
    """(version of the file, what it says) -> what this version would say. Raises ValueError where it cannot."""
    formerly: str = ""
    """Heading of older versions, where it differed."""
    lines: str = ""
    """Field whose items are written one per line, after a line with everything else, so that items can be appended."""
    pack: Callable[[Any], tuple[Mapping[str, np.ndarray], Content]] | None = None
    """(record) -> the arrays to write instead of its own, and what to note beside them."""
    unpack: Callable[[ArrayFile], Mapping[str, np.ndarray]] | None = None
    """The way back; raises ValueError or RecordError where the arrays are not such."""


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """An open safetensors file, its arrays not read yet."""

    path: Path
    version: int
    content: Content
    names: frozenset[str]
    read: Callable[[str], np.ndarray]


def record(
    name: str,
    *,
    version: int,
    title: str = "",
    again: str = "",
    upgrade: Callable[[int, Content], Content] | None = None,
    formerly: str = "",
    lines: str = "",
    pack: Callable[[Any], tuple[Mapping[str, np.ndarray], Content]] | None = None,
    unpack: Callable[[ArrayFile], Mapping[str, np.ndarray]] | None = None,
) -> Callable[[type[Record]], type[Record]]:
    """Make a dataclass a record; the arguments are the fields of `Kind`.

    Its fields may be text, numbers, tuples, mappings, other dataclasses, and, on the outermost level, arrays declared
    as `Annotated[np.ndarray, "float32 layers heads tokens"]`: a dtype, then a name or a number for each axis.
    """

    def mark(cls: type[Record]) -> type[Record]:
        kind = Kind(name, version, title or f"a {name}", again, upgrade, formerly, lines, pack, unpack)
        cls.__record__ = kind  # type: ignore[attr-defined]
        return cls

    return mark


def kind_of(cls: type) -> Kind:
    """Find how a class of records is stored on disk."""
    kind: Kind = cls.__record__  # type: ignore[attr-defined]
    return kind


def to_json(thing: object) -> str:
    """Write a record, with few numbers if any in its arrays, as JSON. Numbers that are not finite become null.

    Raises:
        ValueError: a record without arrays that could not be read back, as one of other types than it declares, or of
            undefined numbers where there may be none: a mistake in the program.
    """
    fields = {name: getattr(thing, name) for name in _fields_of(type(thing))}
    if not _axes_of(type(thing)):
        _check_readable(type(thing), fields)
    return text_of(type(thing), fields)


def text_of(cls: type, fields: Mapping[str, Any]) -> str:
    """Write the fields of a record as `to_json` does; a record in lines may be incomplete."""
    kind = kind_of(cls)
    content = {f"l2kv_{kind.name}": kind.version} | _plain(fields)
    if not kind.lines:
        return json_text(content)
    items = content.pop(kind.lines)
    return "".join(map(json_line, (content, *items)))


def content_of(cls: type, text: str) -> Content:
    """Read the fields that `text_of` wrote, unchecked. Raises RecordError."""
    kind = kind_of(cls)
    with _refusing(kind, f"This is not {kind.title} that can be read"):
        content = _in_lines(kind.lines, text) if kind.lines else _decoded(text)
        if not isinstance(content, dict):
            raise RecordError(f"This is not {kind.title}: it is not a JSON object.")
        headed = kind.name if f"l2kv_{kind.name}" in content else kind.formerly
        return _of_this_version(kind, content.pop(f"l2kv_{headed}", None), content)


def from_json(cls: type[Record], text: str) -> Record:
    """Read a record without arrays from the text of `to_json`. Raises RecordError if it is not one."""
    return from_content(cls, content_of(cls, text))


def from_content(cls: type[Record], content: Content) -> Record:
    """Make a record without arrays from its fields, as `content_of` gives them. Raises RecordError."""
    kind = kind_of(cls)
    with _refusing(kind, f"This is not {kind.title} that can be read"):
        return _checked(cls, content)


def _decoded(text: str) -> Any:
    """The JSON in a text. Raises ValueError."""
    import msgspec

    try:
        return msgspec.json.decode(text.encode())
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error


def _in_lines(name: str, text: str) -> object:
    """The object of the first line, with the other lines as its field of that name; a last one half written is none."""
    *whole, last = text.split("\n")
    lines = [_decoded(line) for line in whole]
    with suppress(ValueError):  # no beginning of an object is an object
        lines.append(_decoded(last))
    content, *items = lines
    return {name: items, **content} if isinstance(content, dict) else content


def save(thing: object, path: str | Path) -> Path:
    """Write a record atomically: `path` is the old file or the complete new one at any time.

    Raises:
        RecordError: the record, or the place, cannot be written; the message says why.
        ValueError: the record could not be read back, as in `to_json`; nothing is written.
    """
    path, kind = Path(path), kind_of(type(thing))
    if not _axes_of(type(thing)):
        return write_text(to_json(thing), path)
    try:
        arrays, beside = kind.pack(thing) if kind.pack else (_arrays_of(thing), {})
    except ValueError as error:
        raise RecordError(f"{kind.title.capitalize()} cannot be written: {error}.") from error
    said = {name: getattr(thing, name) for name in _fields_of(type(thing)) if name not in _axes_of(type(thing))}
    header = _plain(said) | _plain(beside)
    _check_readable(type(thing), said, _arrays_of(thing))
    metadata = {f"l2kv_{kind.name}": str(kind.version), "header": json.dumps(header)}
    try:
        with _renamed_into(path) as temporary:
            mode = temporary.stat().st_mode  # save_file would leave a file that only its owner can read
            save_file(
                {name: np.ascontiguousarray(values) for name, values in arrays.items()}, temporary, metadata=metadata
            )
            temporary.chmod(mode)
    except (SafetensorError, OSError) as error:
        raise RecordError(
            f"{kind.title.capitalize()} cannot be written to {path}: {error}. Choose another place."
        ) from error
    return path


def load(cls: type[Record], path: str | Path) -> Record:
    """Read a record that `save` wrote. Raises RecordError if the file is missing, damaged, foreign or too new."""
    path, kind, axes = Path(path), kind_of(cls), _axes_of(cls)
    if not _is_file(path):
        raise RecordError(f"There is no file {path}.")
    if not axes:
        try:
            return from_json(cls, texts.read_text(path))
        except (RecordError, TextError) as error:
            raise RecordError(f"{path}: {error}") from error
    with _refusing(kind, f"{path.name} is not {kind.title} that can be read"):
        path.open("rb").close()  # safe_open would say "no such file" of one that may not be read
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if f"l2kv_{kind.name}" not in metadata:
                raise RecordError(f"{path.name} is a safetensors file, but not {kind.title}.")
            header = _decoded(metadata.get("header", "null"))
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
            version = metadata[f"l2kv_{kind.name}"]
            number: int | str = int(version) if version.isdecimal() and len(version) < 6 else version
            beside = {name: metadata[name] for name in metadata if name not in ("header", f"l2kv_{kind.name}")}
            content = _of_this_version(kind, number, header | beside, called=path.name)
            opened = ArrayFile(path, int(number), content, frozenset(file.keys()), file.get_tensor)
            arrays = dict(kind.unpack(opened) if kind.unpack else {name: opened.read(name) for name in opened.names})
            _check_names(set(arrays), cls)
            _check_dtypes(arrays, cls)
            made = _checked(cls, content, arrays)
            check_shapes(made)
            return made


def load_any(classes: Sequence[type], path: str | Path) -> Any:
    """Read a record of whichever of these classes the file says it is. Raises RecordError, with the file and reason."""
    path = Path(path)
    if not _is_file(path):
        raise RecordError(f"There is no file {path}.")
    headings = _headings(path)
    for cls in classes:
        if {f"l2kv_{kind_of(cls).name}", f"l2kv_{kind_of(cls).formerly}"} & headings:
            return load(cls, path)
    *titles, last = (kind_of(cls).title for cls in classes)
    raise RecordError(f"{path.name} is not {', '.join(titles)} or {last}.")


def _headings(path: Path) -> set[str]:
    """Names on the outermost level of a file, what it is among them; none where no record can be read from it."""
    with suppress(SafetensorError, OSError), safe_open(path, framework="numpy") as file:
        return set(file.metadata() or {})
    with suppress(TextError, ValueError, RecursionError):
        text = texts.read_text(path)
        content = _decoded(text if text.startswith("{\n") else text.split("\n", 1)[0])
        return set(content) if isinstance(content, dict) else set()
    return set()


def check_shapes(thing: object) -> None:
    """Raise ValueError unless the arrays of a record have the shapes that its class declares."""
    sizes: dict[str, int] = {}
    for name, (_, axes) in _axes_of(type(thing)).items():
        if (array := getattr(thing, name)) is None:
            continue
        told = tuple(axis if axis.isdecimal() else str(sizes.get(axis, axis)) for axis in axes)
        if len(axes) != array.ndim or any(
            (int(axis) if axis.isdecimal() else sizes.setdefault(axis, size)) != size
            for axis, size in zip(axes, array.shape, strict=True)
        ):
            raise ValueError(f"{name} must be of shape ({', '.join(told)}), got {array.shape}")


def write_text(text: str, path: str | Path) -> Path:
    """Write a text atomically. Raises RecordError if it cannot be written."""
    path = Path(path)
    try:
        with _renamed_into(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error}. Choose another place.") from error
    return path


def json_text(content: Mapping[str, Any]) -> str:
    """Write dataclasses, arrays and numbers as indented JSON; numbers that are not finite become null."""
    return json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n"


def json_line(content: object) -> str:
    """JSON on one line, of dataclasses, arrays and numbers; what is not finite becomes null."""
    return json.dumps(_plain(content), ensure_ascii=False) + "\n"


def _declared(cls: type) -> Axes:
    """The arrays of a class: name -> (dtype, axes)."""
    axes = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for one in (hint, *get_args(hint)):  # optional arrays are a union
            if get_origin(one) is Annotated and get_args(one)[0] in (np.ndarray,):
                dtype, *names = get_args(one)[1].split()
                axes[name] = dtype, tuple(names)
    return axes


_axes_of: Callable[[type], Axes] = cache(_declared)


def _fields_of(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _arrays_of(thing: object) -> dict[str, np.ndarray]:
    arrays = {name: getattr(thing, name) for name in _axes_of(type(thing))}
    return {name: array for name, array in arrays.items() if array is not None}


def _checked(cls: type[Record], content: Content, arrays: Mapping[str, np.ndarray] | None = None) -> Record:
    """The record that a file's content is. Raises ValueError."""
    import msgspec  # late, as in `_decoded`: a run of a model needs records, but neither reads nor writes any

    hints = get_type_hints(cls)
    for name in set(content) & set(hints):  # on the outermost level others may add what they like
        _check_known(name, content[name], hints[name])
    try:
        return msgspec.convert({**content, **(arrays or {})}, cls, dec_hook=_array, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def _check_readable(cls: type, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Raise ValueError where `load` would refuse what is to be written: no work may be lost unheard."""
    try:
        if arrays is not None:
            _check_names(set(arrays), cls)
            _check_dtypes(arrays, cls)
        made: object = _checked(cls, _plain(fields), arrays)
        check_shapes(made)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{kind_of(cls).title} could not be read back: {error}") from error


def _check_known(where: str, content: object, hint: Any) -> None:
    """Raise ValueError for a field that a dataclass within a record does not have, so that no typo goes unnoticed."""
    if not isinstance(content, (list, dict)) or not _holds_dataclass(hint):  # a record may hold many thousand numbers
        return
    origin, within = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for one in within:
            _check_known(where, content, one)
    elif isinstance(content, list) and origin in (tuple, list, Sequence):
        each = within if within[-1:] != (...,) and origin is tuple else within[:1] * len(content)
        for item, of in zip(content, each, strict=False):  # msgspec counts them
            _check_known(where, item, of)
    elif isinstance(content, dict) and origin in (Mapping, dict):
        for name, value in content.items():
            _check_known(f"{where}.{name}", value, within[1])
    elif isinstance(content, dict) and dataclasses.is_dataclass(hint):
        hints = _hints_of(hint)
        if unknown := set(content) - set(hints):
            raise ValueError(f"{where} has no field {', '.join(sorted(map(repr, unknown)))}")
        for name, value in content.items():
            _check_known(f"{where}.{name}", value, hints[name])


@cache
def _holds_dataclass(hint: Any) -> bool:
    """Tell whether a value of a type is, or may have within it, a dataclass."""
    return dataclasses.is_dataclass(hint) or any(map(_holds_dataclass, get_args(hint)))


_hints_of: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _array(kind: type, value: object) -> object:
    if kind is np.ndarray and isinstance(value, np.ndarray):
        return value
    raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")


def _of_this_version(kind: Kind, version: object, content: Content, *, called: str = "This") -> Content:
    if type(version) is int and version == kind.version:
        return content
    if type(version) is int and 1 <= version < kind.version and kind.upgrade:
        return kind.upgrade(version, content)
    again = f" Make it again: {kind.again}" if kind.again else ""
    told = "it has no version" if version is None else f"it is of version {version!r:.20}"
    before = " or before" if kind.upgrade else ""
    raise RecordError(f"{called} is not {kind.title} of version {kind.version}{before}: {told}.{again}")


def _check_names(arrays: set[str], cls: type) -> None:
    """Raise ValueError unless these are the arrays of a class; those that have a default may be missing."""
    declared = set(_axes_of(cls))
    needed = {f.name for f in dataclasses.fields(cls) if f.name in declared and f.default is dataclasses.MISSING}
    if missing := needed - arrays:
        raise ValueError(f"its arrays lack {', '.join(sorted(missing))}")
    if foreign := arrays - declared:
        raise ValueError(f"its arrays hold {', '.join(sorted(foreign))}, which {kind_of(cls).title} does not have")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _check_dtypes(arrays: Mapping[str, np.ndarray], cls: type) -> None:
    for name, (dtype, _) in _axes_of(cls).items():
        if name in arrays and arrays[name].dtype != dtype:
            raise ValueError(f"{name} must be of type {dtype}, got {arrays[name].dtype}")


@contextmanager
def _refusing(kind: Kind, words: str) -> Iterator[None]:
    """Turn errors within the block, which reads an untrusted file, into a RecordError."""
    try:
        yield
    except RecordError:
        raise
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
        MemoryError,
        OverflowError,
    ) as error:
        again = f". Make it again: {kind.again}" if kind.again else ""
        raise RecordError(f"{words}: {str(error)[:300]}{again}") from error


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
    """Of JSON's types: dataclasses as objects, arrays as lists, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
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
