"""Records: what is written comes back; what is foreign is refused in a sentence that says what and where."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pytest
from safetensors.numpy import save_file

from analysis import RecordError
from analysis.records import from_json, json_line, load, record, save, to_json
from l2kv import CompressionSpec


@dataclass(frozen=True)
class Point:
    keep: float
    spec: CompressionSpec
    note: str | None = None


def _upgraded(version, content):
    assert version == 1
    return content | {"points": [{"keep": keep, "spec": {}} for keep in content.pop("keeps")]}


@record("curve", version=2, again="l2kv curve", upgrade=_upgraded)
@dataclass(frozen=True)
class Curve:
    model: str
    points: tuple[Point, ...]
    shares: dict[str, float]


@record("table", version=1, title="a table")
@dataclass(frozen=True, eq=False)
class Table:
    names: tuple[str, ...]
    values: Annotated[np.ndarray, "float32 rows columns"]
    counts: Annotated[np.ndarray, "int64 rows"]
    more: Annotated[np.ndarray, "float64 rows 2"] | None = None


CURVE = Curve("m", (Point(0.5, CompressionSpec(keep_ratio=0.5, skip_layers=(0, 3))),), {"é": 0.25})
TABLE = Table(("a", "b"), np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2]))


def test_a_spec_that_was_written_before_pairs_had_formats_opens_as_it_was():
    older = json.loads(to_json(CURVE))
    for field in ("key_bits", "value_bits", "key_channels"):
        del older["points"][0]["spec"][field]
    assert from_json(Curve, json.dumps(older)) == CURVE


def written(**changes) -> str:
    return json.dumps(json.loads(to_json(CURVE)) | changes)


def test_a_record_without_arrays_comes_back_exactly(tmp_path):
    assert from_json(Curve, to_json(CURVE)) == CURVE
    assert load(Curve, save(CURVE, tmp_path / "deep" / "curve.json")) == CURVE


@pytest.mark.parametrize("more", [None, np.ones((2, 2))])
def test_a_record_with_arrays_comes_back_exactly(tmp_path, more):
    read = load(Table, save(replace(TABLE, more=more), tmp_path / "table.safetensors"))
    assert read.names == TABLE.names
    np.testing.assert_array_equal(read.values, TABLE.values)
    np.testing.assert_array_equal(read.counts, TABLE.counts)
    assert (read.more is None) == (more is None)


def test_an_older_version_is_brought_up_to_date():
    old = json.dumps({"l2kv_curve": 1, "model": "m", "keeps": [0.25], "shares": {}})
    assert from_json(Curve, old) == Curve("m", (Point(0.25, CompressionSpec()),), {})


@record("drawing", version=2, upgrade=lambda version, content: content | {"shapes": {}}, formerly="sketch")
@dataclass(frozen=True)
class Drawing:
    model: str
    shapes: Mapping[str, Point | None]


def test_what_was_headed_by_another_name_before_opens():
    assert from_json(Drawing, '{"l2kv_sketch": 1, "model": "m"}') == Drawing("m", {})
    with pytest.raises(RecordError, match="version 2 or before"):
        from_json(Drawing, '{"l2kv_curve": 1, "model": "m"}')


def test_dataclasses_in_a_mapping_come_back_and_a_slip_in_one_is_named():
    drawing = Drawing("m", {"a b": Point(0.5, CompressionSpec()), "none": None})
    assert from_json(Drawing, to_json(drawing)) == drawing
    text = to_json(drawing).replace('"keep_ratio"', '"keep_ration"')
    with pytest.raises(RecordError, match=r"shapes\.a b"):
        from_json(Drawing, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "truncated"),
        ("[]", "not a JSON object"),
        ("{}", "it has no version. Make it again: l2kv curve"),
        (written(l2kv_curve=3), "it is of version 3"),
        (written(l2kv_curve=True), "it is of version True"),
        (written(model=5), "Expected `str`, got `int` - at `$.model`"),
        (written(points=[{"keep": True, "spec": {}}]), "Expected `float`, got `bool` - at `$.points[0].keep`"),
        (written(points=[{"keep": 1, "spec": {"keep_ration": 1}}]), "points.spec has no field 'keep_ration'"),
        (written(points=[{"keep": 1, "spec": {"keep_ratio": 7}}]), "keep_ratio must be from 0 to 1, got 7.0"),
        (written(points=[{"keep": 1}]), "missing required field `spec` - at `$.points[0]`"),
        ('{"l2kv_curve": 2, "model": "\\ud800"}', "truncated|surrogate"),
        ("[" * 100_000, "cannot be read|can be read"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_foreign_is_refused_with_the_place_and_the_reason(text, reason):
    with pytest.raises(RecordError) as refused:
        from_json(Curve, text)
    assert any(words in str(refused.value) for words in reason.split("|"))
    assert str(refused.value).startswith("This is not a curve") and len(str(refused.value)) < 400


def test_what_others_add_on_the_outermost_level_is_let_pass():
    assert from_json(Curve, written(remark="mine")) == CURVE


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"counts": np.array([1.0, 2.0])}, "counts must be of type int64, got float64"),
        ({"counts": np.array([1, 2, 3])}, r"counts must be of shape \(2\), got \(3,\)"),
        ({"more": np.ones((2, 3))}, r"more must be of shape \(2, 2\), got \(2, 3\)"),
        ({"others": np.ones(1)}, "arrays hold others"),
        ({"counts": None}, "arrays lack counts"),
    ],
)
def test_arrays_of_other_types_and_shapes_are_refused(tmp_path, arrays, reason):
    given = {"values": TABLE.values, "counts": TABLE.counts} | arrays
    metadata = {"l2kv_table": "1", "header": json.dumps({"names": ["a", "b"]})}
    path = tmp_path / "table.safetensors"
    save_file({name: array for name, array in given.items() if array is not None}, path, metadata=metadata)
    with pytest.raises(RecordError, match=f"table.safetensors is not a table that can be read: .*{reason}"):
        load(Table, path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "not a table"),
        ({"l2kv_table": "2", "header": "{}"}, "it is of version 2"),
        ({"l2kv_table": "one", "header": "{}"}, "it is of version 'one'"),
        ({"l2kv_table": "1", "header": "[]"}, "no JSON object"),
        ({"l2kv_table": "1"}, "no JSON object"),
    ],
)
def test_a_safetensors_file_of_something_else_is_refused(tmp_path, metadata, reason):
    save_file({"values": TABLE.values, "counts": TABLE.counts}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(RecordError, match=reason):
        load(Table, tmp_path / "x.safetensors")


def test_a_file_that_is_not_there_or_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"There is no file .*none\.json"):
        load(Curve, tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    for thing in (CURVE, TABLE):
        with pytest.raises(RecordError, match="cannot be written"):
            save(thing, tmp_path / "file" / "below")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save(TABLE, tmp_path / "table.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RecordError, match="disk full"):
        save(replace(TABLE, names=("c", "d")), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@record("journal", version=1, lines="points")
@dataclass(frozen=True)
class Journal:
    model: str
    points: tuple[Point, ...]


def test_a_record_of_lines_can_be_appended_to_and_loses_only_a_line_half_written(tmp_path):
    point = Point(0.5, CompressionSpec(), "a\nnote\u2028 of é")
    path = save(Journal("m", (point, point)), tmp_path / "journal.jsonl")
    text = path.read_text()
    header, *lines = text.split("\n")
    assert json.loads(header) == {"l2kv_journal": 1, "model": "m"} and lines[0] == lines[1] and lines[2] == ""
    assert load(Journal, path) == Journal("m", (point, point))
    path.write_text(text + json_line(point))
    assert load(Journal, path) == Journal("m", (point,) * 3)
    for end in range(len(header) + 1, len(text)):
        path.write_text(text[:end])
        whole = text[:end].count("\n") - 1 + (end in (len(header) + 1 + len(lines[0]), len(text) - 1))
        assert load(Journal, path) == Journal("m", (point,) * whole)
    for foreign in ("", header[:-1], f"[{header}]\n", lines[0], f"{header}\n{lines[0][:-1]}\n{lines[0]}", "3\n"):
        path.write_text(foreign)
        with pytest.raises(RecordError, match=r"journal\.jsonl: This is not a journal"):
            load(Journal, path)
