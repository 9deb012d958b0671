"""Readers of texts: a file, an upload and a paste give the same characters."""

from __future__ import annotations

import codecs
from pathlib import Path

from analysis.errors import TextError
from analysis.words import counted

MOST_BYTES = 256 * 2**20  # in a file: far more than is ever run, and too little to exhaust memory
_LEAST_DOCUMENT = 100  # characters, in the mean, for NUL to separate documents and not be part of something else
# By the mark that a file begins with; the longer first, for one begins with another.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: str | Path) -> str:
    """Read a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, as `plain_text`.

    Raises:
        TextError: the file cannot be read, is too large, or is no text in these encodings; the message says which.
    """
    return decoded(_bytes_of(path), str(path))


def read_documents(path: str | Path, name: str) -> dict[str, str]:
    """Read the documents of a file, by name, as `documents`. Raises as `read_text`."""
    return documents(_bytes_of(path), str(path), name)


def decoded(data: bytes, source: str) -> str:
    """Decode a file's bytes as `read_text` does. Raises TextError, which names the source."""
    found = list(documents(data, source, "").values())
    if len(found) > 1:
        raise TextError(
            f"{source} holds {counted(len(found), 'document')}, separated by NUL characters. Give one of them."
        )
    return found[0]


def documents(data: bytes, source: str, name: str) -> dict[str, str]:
    """Split a file's bytes into documents at NUL characters, as in corpora.

    They are named "name 1", "name 2", ..., or "name" if there is only one, which may be empty.

    Raises:
        TextError: the bytes are no text in the encodings of `read_text`; the message names the source.
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
        raise TextError(f"{path} is larger than {MOST_BYTES // 2**20} MiB. Split it.")
    return data


def _text_of(data: bytes, source: str) -> str:
    encoding = next((of for mark, of in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextError(f"{source} is not text in UTF-8. Save it as UTF-8 in an editor, and give it again.") from error
    if text.count("\0") * _LEAST_DOCUMENT > len(text):
        raise TextError(
            f"{source} holds NUL characters: it is not text, or UTF-16 without a byte order mark. Save it as UTF-8."
        )
    return text


def plain_text(text: str) -> str:
    """Normalise line ends to "\\n", and drop byte order marks, which belong to files."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
