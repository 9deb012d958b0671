"""Texts as they come in, in the one form in which they go on: of a file, an upload and a paste the same characters."""

from __future__ import annotations

import codecs
from pathlib import Path

from analysis.errors import TextError

MOST_BYTES = 256 * 2**20  # of a file: far more than is ever run, and less than takes all memory
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
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # a ValueError: a NUL in its name
        raise TextError(f"{path} cannot be read: {error}.") from error
    if len(data) > MOST_BYTES:
        raise TextError(f"{path} has more than {MOST_BYTES // 2**20} MiB. Give parts of it.")
    return decoded(data, str(path))


def decoded(data: bytes, name: str) -> str:
    """Text of a file's bytes, as `read_text`. Raises TextError, with the name of the file."""
    encoding = next((of for mark, of in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextError(f"{name} is not text in UTF-8. Save it as UTF-8 in an editor, and give it again.") from error
    if "\0" in text:
        raise TextError(f"{name} holds NUL characters: it is no text file, or one in UTF-16 without its mark.")
    return plain_text(text)


def plain_text(text: str) -> str:
    """The text with one form of line ends, "\\n", and without byte order marks, which are of files and not of texts."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
