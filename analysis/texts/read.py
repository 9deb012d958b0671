"""Texts as they come in, in the one form in which they go on: of a file, an upload and a paste the same characters."""

from __future__ import annotations

import codecs
from pathlib import Path

from analysis.errors import TextError

MOST_BYTES = 256 * 2**20  # of a file: far more than is ever run, and less than takes all memory
_LEAST_DOCUMENT = 100  # characters, in the mean, for NUL to separate documents and not be part of something else
# By the mark that a file begins with; the longer first, for one begins with another.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: str | Path) -> str:
    """Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, as `plain_text`.

    Raises:
        TextError: it cannot be read, is too large, or is no text in these; says which.
    """
    return decoded(_bytes_of(path), str(path))


def read_documents(path: str | Path, name: str) -> dict[str, str]:
    """The documents of a file by name, as `documents`; raises as `read_text`."""
    return documents(_bytes_of(path), str(path), name)


def decoded(data: bytes, source: str) -> str:
    """Text of a file's bytes, as `read_text`. Raises TextError, with the file that is its source."""
    found = list(documents(data, source, "").values())
    if len(found) > 1:
        raise TextError(f"{source} holds {len(found)} documents, separated by NUL characters. Give one of them.")
    return found[0]


def documents(data: bytes, source: str, name: str) -> dict[str, str]:
    """The documents that a file's bytes hold, separated by NUL characters as in corpora: "name 1", "name 2", ..., or
    "name" where it holds but one, which may be empty.

    Raises:
        TextError: it is no text in the encodings of `read_text`, with its source.
    """
    text = _text_of(data, source)
    parts = [plain_text(part) for part in text.split("\0") if part.strip()]
    if len(parts) < 2:
        return {name: parts[0] if parts else ""}
    return {f"{name} {number}": part for number, part in enumerate(parts, 1)}


def _bytes_of(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # a ValueError: a NUL in its name
        raise TextError(f"{path} cannot be read: {error}.") from error
    if len(data) > MOST_BYTES:
        raise TextError(f"{path} has more than {MOST_BYTES // 2**20} MiB. Give parts of it.")
    return data


def _text_of(data: bytes, source: str) -> str:
    encoding = next((of for mark, of in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextError(f"{source} is not text in UTF-8. Save it as UTF-8 in an editor, and give it again.") from error
    if text.count("\0") * _LEAST_DOCUMENT > len(text):
        raise TextError(f"{source} holds NUL characters: it is no text file, or one in UTF-16 without its mark.")
    return text


def plain_text(text: str) -> str:
    """The text with one form of line ends, "\\n", and without byte order marks, which are of files and not of texts."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
