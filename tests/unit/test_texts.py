"""A text reads the same as a file, an upload and a paste."""

import io
import sys
from types import SimpleNamespace

import pytest

from analysis import RecordError, read_text, records
from analysis.cli.inputs import text_of, texts_of
from analysis.errors import TextError
from analysis.plans.skip import Plan
from analysis.records import to_json
from analysis.texts import read
from app.components import uploads
from l2kv import CompressionSpec

BODY = "The sea, déjà vu 😀.\nHe looked.\n\nSo did it.\n"
LINE_ENDS = {"\\n": "\n", "\\r\\n": "\r\n", "\\r": "\r"}
ENCODINGS = {
    "utf-8": b"", "utf-8-sig": b"", "utf-16": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-32": b"",
    "utf-32-be": b"\x00\x00\xfe\xff",
}  # fmt: skip


def by_upload(data, path):
    return uploads.decoded(SimpleNamespace(name=path.name, getvalue=lambda: data))


def by_file(data, path):
    path.write_bytes(data)
    return text_of(str(path))


def by_folder(data, path):
    path.write_bytes(data)
    (text,) = texts_of([path.parent]).values()
    return text


def by_library(data, path):
    path.write_bytes(data)
    return read_text(path)


def by_standard_input(data, path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        return text_of("-")


DOORS = (by_upload, by_file, by_folder, by_library, by_standard_input)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_text_is_the_same_whatever_its_encoding_its_line_ends_and_its_door(tmp_path, door, end, encoding):
    data = ENCODINGS[encoding] + BODY.replace("\n", end).encode(encoding)
    assert door(data, tmp_path / "notes.txt") == BODY


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "data",
    ["déjà".encode("latin-1"), bytes(range(256)), b"a\0b", b"\xff\xfea", "ab".encode("utf-16-le"), b"\xed\xa0\xbd"],
)
def test_what_is_no_text_is_refused_by_every_door_with_the_same_reason(tmp_path, door, data):
    with pytest.raises(TextError, match=r"UTF-8|NUL") as refused:
        door(data, tmp_path / "notes.txt")
    assert str(refused.value).startswith(("notes.txt", str(tmp_path), "Standard input"))
    assert "UnicodeDecodeError" not in str(refused.value)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_record_is_read_in_the_encodings_of_a_text(tmp_path, encoding):
    plan = Plan("déjà vu 😀", CompressionSpec())
    path = tmp_path / "plan.json"
    path.write_bytes(ENCODINGS[encoding] + to_json(plan).replace("\n", "\r\n").encode(encoding))
    assert records.load(Plan, path) == plan
    path.write_bytes(to_json(plan).encode("latin-1", "ignore"))
    with pytest.raises(RecordError, match="UTF-8"):
        records.load(Plan, path)


def test_marks_within_a_text_are_left_by_files_that_were_put_together():
    joined = b"".join(part.encode("utf-8-sig") for part in ("One.\r\n", "Two.\r", "Three.\n"))
    assert read.decoded(joined, "x") == "One.\nTwo.\nThree.\n"


def test_what_was_pasted_is_read_as_a_file_is():
    for end in LINE_ENDS.values():
        assert read.plain_text("\ufeff" + BODY.replace("\n", end)) == BODY


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b"])
def test_what_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(TextError, match="cannot be read"):
        read_text(f"{tmp_path}/{name}")


def test_a_file_without_end_is_refused_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MOST_BYTES", 2**20)
    (tmp_path / "big.txt").write_bytes(b"a" * (2**20 + 1))
    for path in (tmp_path / "big.txt", "/dev/zero"):
        with pytest.raises(TextError, match="larger than 1 MiB"):
            read_text(path)


def test_a_record_that_an_editor_has_saved_opens(tmp_path):
    plan = Plan("m", CompressionSpec(keep_ratio=0.5), note="déjà vu")
    path = tmp_path / "plan.json"
    path.write_bytes(to_json(plan).replace("\n", "\r\n").encode("utf-8-sig"))
    assert records.load(Plan, path) == plan


CORPUS = "\0".join(
    f"Book {i}. " + "The sea was calm that day, and so were the old man and his cat. " * 3 for i in (1, 2, 3)
)


def test_a_corpus_is_its_documents_for_whoever_takes_many_and_refused_by_whoever_takes_one(tmp_path):
    (tmp_path / "books.txt").write_bytes(CORPUS.encode())
    (tmp_path / "note.txt").write_text("One only.")
    found = texts_of([tmp_path])
    assert list(found) == ["books 1", "books 2", "books 3", "note"]
    assert "\0".join(found[name] for name in list(found)[:3]) == CORPUS and found["note"] == "One only."
    assert read.documents(CORPUS.encode("utf-16"), "x", "books") == {k: v for k, v in found.items() if k != "note"}
    with pytest.raises(TextError, match=r"books\.txt holds 3 documents, separated by NUL characters"):
        read_text(tmp_path / "books.txt")
    assert read.documents(b"", "x", "nothing") == {"nothing": ""}
    assert list(read.documents(CORPUS.encode() + b"\0", "x", "closed")) == ["closed 1", "closed 2", "closed 3"]
