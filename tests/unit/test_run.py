"""Runs and plans as files: the round trip, and every broken or hostile file ends in a RecordError."""

import dataclasses
import json
import math
import os
import pickle
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save, save_file

from analysis import captures as run_module
from analysis import records as records_module
from analysis.captures import Capture, load_run, save_run
from analysis.errors import RecordError
from analysis.packing import deflated, quantised, restored
from analysis.plans.skip import Plan
from analysis.records import from_json, to_json
from l2kv import CompressionSpec

LAYERS, HEADS, KV_HEADS, TOKENS, BINS = 2, 4, 2, 5, 3
QUERIES = 2
TEXT = 'a🙂\0<b>"\u202e é'  # T = 5 tokens of it
STEPPED = run_module._STEPPED
ARRAYS = (*run_module._PLAIN, *run_module._PACKED)
HEADER = tuple(field.name for field in dataclasses.fields(Capture) if field.name not in ARRAYS)
PATHS = ("../../evil", "/etc/passwd", "<script>alert(1)</script>", "a\0b", "__class__", "{0.__class__}")


@pytest.fixture(autouse=True)
def as_a_large_run(monkeypatch):
    monkeypatch.setattr(run_module, "LARGE", 0)


def make(**changes) -> Capture:
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return random.random(shape, dtype=np.float32)

    def kept(name: str, weights: np.ndarray) -> np.ndarray:  # as a file keeps it, so that it comes back exactly
        levels = run_module._levels(name, weights.shape)
        return restored(*quantised(weights, levels), levels)

    parts = {
        "model": "tiny",
        "architecture": "LlamaForCausalLM",
        "device": "cpu",
        "dtype": "float32",
        "text": TEXT,
        "labels": ("<s>", "a", "🙂 1/2", "🙂 2/2", "\0<b>"),
        "probe_label": "\u202e",
        "layer_kinds": ("full", "sliding"),
        "windows": (0, 4),
        "warnings": ("one", "two\n"),
        "seconds": 0.1,
        "head_dim": 8,
        "tokens_per_bin": 2,
        "token_ids": np.array([0, 7, 2, 2**40, 5]),
        "token_spans": np.array([[0, 0], [0, 1], [1, 2], [1, 2], [2, 6]], dtype=np.int32),
        "key_norm": numbers(LAYERS, KV_HEADS, TOKENS),
        "value_norm": numbers(LAYERS, KV_HEADS, TOKENS),
        "attention_received": kept("attention_received", numbers(LAYERS, HEADS, TOKENS)),
        "probe_attention": kept("probe_attention", numbers(LAYERS, HEADS, TOKENS)),
        "recent_attention": kept(
            "recent_attention", np.tril(numbers(LAYERS, HEADS, QUERIES, TOKENS), 2).transpose(2, 0, 1, 3)
        ),
        "pooled_attention": random.integers(0, 256, (LAYERS, HEADS, BINS, BINS), dtype=np.uint8),
        "pooled_scale": numbers(LAYERS, HEADS),
    }
    return Capture(**parts | changes)


def assert_same(one: Capture, other: Capture) -> None:
    for field in dataclasses.fields(Capture):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert type(a) is type(b), field.name
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        else:
            assert a == b, field.name


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_run(make(), tmp_path / "run.safetensors")


@pytest.fixture
def plain(tmp_path) -> Path:
    """The same run as the second version wrote it, each array as it is."""
    made = make()
    arrays = {name: np.ascontiguousarray(getattr(made, name)) for name in ARRAYS}
    header = json.dumps({name: getattr(made, name) for name in HEADER})
    save_file(arrays, tmp_path / "plain.safetensors", metadata={"l2kv_run": "2", "header": header})
    return tmp_path / "plain.safetensors"


@pytest.fixture
def third(saved) -> Path:
    """The same run as the third version wrote it: its shapes are beside the header."""
    with safe_open(saved, framework="numpy") as file:
        shapes = json.loads(file.metadata()["header"])["shapes"]
    return tampered(saved, fields={"shapes": None}, shapes=json.dumps(shapes), l2kv_run="3")


@pytest.fixture(params=["saved", "third", "plain"])
def written(request) -> Path:
    """A run in the versions that are read."""
    return request.getfixturevalue(request.param)


def tampered(saved: Path, *, fields=None, arrays=None, **metadata) -> Path:
    """The run with other metadata, header fields or arrays; None takes one away."""
    with safe_open(saved, framework="numpy") as file:
        old, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(old["header"]) | (fields or {})
    new = old | {"header": json.dumps({k: v for k, v in header.items() if v is not None})} | metadata
    tensors |= arrays or {}
    save_file(
        {k: v for k, v in tensors.items() if v is not None},
        saved,
        metadata={k: v for k, v in new.items() if v is not None},
    )
    return saved


def repacked(saved: Path, **arrays) -> Path:
    """The run with other arrays, compressed as its version does it."""
    with safe_open(saved, framework="numpy") as file:
        if file.metadata()["l2kv_run"] == "2":
            return tampered(saved, arrays=arrays)
        beside = "shapes" in file.metadata()
        shapes = json.loads(file.metadata()["shapes"] if beside else file.metadata()["header"])
        shapes = shapes if beside else shapes["shapes"]
    new = dict(arrays)
    for name, values in arrays.items():
        if name in shapes:
            shapes[name] = values.shape
            if name in STEPPED:
                values, new[f"{name}_ends"] = quantised(values, run_module._levels(name, values.shape))
            new[name] = deflated(values, along=run_module._ALONG.get(name))
    where = {"shapes": json.dumps(shapes)} if beside else {"fields": {"shapes": shapes}}
    return tampered(saved, arrays=new, **where)


def refusal(path: Path) -> str:
    with pytest.raises(RecordError) as refused:
        load_run(path)
    message = str(refused.value)
    assert path.name in message
    assert len(message) < 400 + len(str(path))
    return message


# Round trip


def test_a_run_comes_back_exactly(saved):
    assert_same(load_run(saved), make())


@pytest.mark.parametrize("model", PATHS)
def test_whatever_a_run_is_called_it_is_only_text(tmp_path, model):
    made = make(model=model, device=model, warnings=(model,))
    assert_same(load_run(save_run(made, tmp_path / "deep" / "er" / "run")), made)
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "er", "run"]


def test_arrays_that_are_not_contiguous_come_back_exactly(tmp_path):
    norms = np.asfortranarray(make().key_norm)
    turned = make().value_norm.transpose(2, 1, 0).copy().transpose(2, 1, 0)
    assert_same(load_run(save_run(make(key_norm=norms, value_norm=turned), tmp_path / "run")), make())


def test_a_name_as_long_as_the_system_allows_can_be_saved(tmp_path):
    assert_same(load_run(save_run(make(), tmp_path / ("x" * 255))), make())


def test_a_saved_run_has_the_rights_of_any_new_file(saved):
    (saved.parent / "plain").touch()
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


# Atomicity


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_failure_while_saving_leaves_the_old_file_and_no_other(saved, monkeypatch, step, error):
    before = saved.read_bytes()

    def fail(*_, **__):
        raise error

    real_save_file = records_module.save_file

    def half_save(arrays, path, **rest):
        real_save_file(arrays, path, **rest)
        fail()

    owner = {"save_file": records_module, "fsync": os, "replace": Path}[step]
    monkeypatch.setattr(owner, step, half_save if step == "save_file" else fail)
    with pytest.raises(RecordError if isinstance(error, OSError) else type(error)):
        save_run(make(model="new"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_run_cannot_be_saved_where_a_folder_is(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(RecordError, match=r"taken.*another place"):
        save_run(make(), tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_run_cannot_be_saved_below_a_file(saved):
    with pytest.raises(RecordError, match="cannot be written"):
        save_run(make(), saved / "run")


def test_no_beginning_of_a_file_passes_for_the_whole(saved, tmp_path):
    content, cut = saved.read_bytes(), tmp_path / "cut"
    for end in range(len(content)):
        cut.write_bytes(content[:end])
        with pytest.raises(RecordError):
            load_run(cut)
    cut.write_bytes(content)
    assert_same(load_run(cut), make())


def test_a_changed_byte_gives_a_run_or_a_message(saved, tmp_path):
    content, changed = saved.read_bytes(), tmp_path / "changed"
    for at in range(len(content)):
        changed.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        with suppress(RecordError):
            assert isinstance(load_run(changed), Capture)


# Not a run


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"\xff" * 100,
        b"{}",
        b"PK\x03\x04" + b"\0" * 50,
        b"<html></html>" * 10,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 50_000) + b"[" * 50_000,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    assert "not a run that can be read" in refusal(tmp_path / "foreign")


def test_a_pickle_of_the_name_of_a_run_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "run.safetensors").write_bytes(pickle.dumps(Bomb()))
    refusal(tmp_path / "run.safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"header": "{}"}], ids=repr)
def test_a_safetensors_file_that_is_no_run_is_refused_as_that(tmp_path, metadata):
    (tmp_path / "model.safetensors").write_bytes(save({"a": np.ones(3)}, metadata))
    assert "but not a run" in refusal(tmp_path / "model.safetensors")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "There is no file" in refusal(tmp_path / "none")
    assert "There is no file" in refusal(tmp_path)
    with pytest.raises(RecordError):
        load_run("a\0b")
    with pytest.raises(RecordError):
        load_run("x" * 5000)


def test_a_pipe_does_not_block_the_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "There is no file" in refusal(tmp_path / "pipe")


@pytest.fixture
def not_root():
    if os.geteuid() == 0:
        pytest.skip("root may read and write everything")


def test_a_file_that_may_not_be_read_is_refused_as_that(saved, not_root):
    saved.chmod(0)
    assert "Permission denied" in refusal(saved)


def test_a_run_that_may_not_be_written_is_refused_as_that(saved, not_root):
    saved.parent.chmod(0o555)
    with pytest.raises(RecordError, match="Permission denied"):
        save_run(make(), saved)
    saved.parent.chmod(0o755)
    assert_same(load_run(saved), make())


def test_a_run_of_any_version_is_read_exactly(written):
    assert_same(load_run(written), make())


def test_a_run_of_the_first_version_is_read_and_keeps_no_last_queries(plain):
    old = load_run(tampered(plain, arrays={"recent_attention": None}, l2kv_run="1"))
    none = np.zeros((0, LAYERS, HEADS, TOKENS), np.float32)
    assert_same(old, make(recent_attention=none))
    assert len(old.recent_positions) == 0 and list(make().recent_positions) == [3, 4]
    assert_same(load_run(save_run(old, plain)), old)


def test_a_run_of_one_version_has_no_part_of_another(saved, plain):
    assert "hold recent_attention" in refusal(tampered(plain, l2kv_run="1"))
    assert "recent_attention_ends" in refusal(tampered(saved, l2kv_run="2"))
    assert "recent_attention_ends" in refusal(tampered(plain, l2kv_run="3"))


def test_attention_of_a_query_to_itself_or_to_what_follows_is_refused(written):
    for query, column in ((0, 3), (0, 4), (1, 4)):
        rows = make().recent_attention.copy()
        rows[query, 1, 2, column] = 0.1
        assert "where a query sees nothing" in refusal(repacked(written, recent_attention=rows))


def test_more_queries_than_tokens_are_refused(written):
    rows = np.zeros((TOKENS + 1, LAYERS, HEADS, TOKENS), np.float32)
    assert "last queries" in refusal(repacked(written, recent_attention=rows))


@pytest.mark.parametrize("version", ["5", "0", "1.0", "", " 1", "9" * 10_000])
def test_another_version_is_refused_with_both_versions_and_what_makes_it_again(saved, version):
    message = refusal(tampered(saved, l2kv_run=version))
    assert "not a run of version 4 or before: it is of version" in message and version[:10] in message
    assert "l2kv capture" in message


# Header


@pytest.mark.parametrize("header", [None, "", "null", "[]", "5", "{", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900])
def test_a_header_that_is_no_json_object_is_refused(saved, header):
    assert "not a run that can be read" in refusal(tampered(saved, header=header))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Capture) if f.name != "stored"])
def test_a_part_that_is_missing_is_named(saved, name):
    message = refusal(tampered(saved, fields={name: None}, arrays={name: None}))
    assert f"lack {name}" in message or f"missing required field `{name}`" in message


def test_a_run_names_how_its_weights_are_stored_and_one_that_does_not_opens(saved, tmp_path):
    assert load_run(tampered(saved, fields={"stored": None})).stored == ""
    told = dataclasses.replace(load_run(saved), stored="Q4_1")
    assert load_run(save_run(told, tmp_path / "told.safetensors")).stored == "Q4_1"
    assert "stored" in refusal(tampered(saved, fields={"stored": 4}))


@pytest.mark.parametrize("name", ["extra", "self", "__class__", "token_ids", "n_layers", "levels", "ranks"])
def test_a_header_field_that_no_run_has_changes_nothing(saved, name):
    assert_same(load_run(tampered(saved, fields={name: [1, 2, 3]})), make())


@pytest.mark.parametrize("name", ["extra", "self", "model", "text"])
def test_an_array_that_no_run_has_is_named(saved, name):
    assert f"hold {name}" in refusal(tampered(saved, arrays={name: np.ones(3)}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("model", "text", "probe_label") for value in (5, [], {}, True, "\ud800")),
        ("labels", "abcde"),
        ("labels", dict.fromkeys("abcde")),
        ("labels", [1, 2, 3, 4, 5]),
        ("labels", ["a"] * 4 + ["\udfff"]),
        ("labels", ["a"] * 6),
        ("labels", []),
        ("layer_kinds", ["full", "<b>"]),
        ("layer_kinds", ["full"]),
        ("windows", [0]),
        ("windows", [0, -1]),
        ("windows", [0, "4"]),
        ("windows", 4),
        ("layer_kinds", "full"),
        ("warnings", "text"),
        ("warnings", [["a"]]),
        ("warnings", 0),
        *(("seconds", value) for value in ("1", -1, math.nan, math.inf, True, [1])),
        *((name, value) for name in ("head_dim", "tokens_per_bin") for value in (0, -1, 2.0, "2", True, math.nan, [2])),
        ("tokens_per_bin", 3),  # 5 tokens by 3 would be 2 bins
        ("tokens_per_bin", 10**30),
    ],
)
def test_a_header_field_of_a_wrong_type_or_value_is_refused(saved, name, value):
    message = refusal(tampered(saved, fields={name: value}))
    assert name in message or "JSON is malformed" in message  # which knows neither NaN nor half a character


# Arrays


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (LAYERS, KV_HEADS), (1, 1, 1, 1, 1), (0, 0, 0), (LAYERS, 0, TOKENS)], ids=str
)
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_the_wrong_shape_is_refused(plain, name, shape):
    dtype = getattr(make(), name).dtype
    assert "not a run that can be read" in refusal(tampered(plain, arrays={name: np.zeros(shape, dtype)}))


def test_a_run_of_nothing_is_refused(written):
    made = make()
    nothing = {name: getattr(made, name)[..., :0] for name in ("key_norm", "value_norm", "attention_received")}
    nothing |= {"probe_attention": made.probe_attention[..., :0], "token_ids": made.token_ids[:0]}
    nothing |= {"token_spans": made.token_spans[:0], "pooled_attention": made.pooled_attention[..., :0, :0]}
    nothing |= {"recent_attention": made.recent_attention[:0, ..., :0]}
    refusal(tampered(repacked(written, **nothing), fields={"labels": []}))


def test_kv_heads_that_do_not_divide_the_heads_are_refused(written):
    norms = np.ones((LAYERS, 3, TOKENS), dtype=np.float32)
    assert "3 kv heads" in refusal(repacked(written, key_norm=norms, value_norm=norms))


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float16, np.int32, np.uint16, np.bool_], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_the_wrong_type_is_refused_by_name(written, name, dtype):
    right = getattr(make(), name)
    if right.dtype != dtype:
        assert name in refusal(tampered(written, arrays={name: np.zeros(right.shape, dtype)}))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "C64", "F4", "nonsense"])
def test_an_array_of_a_type_that_numpy_does_not_have_is_refused(saved, dtype):
    saved.write_bytes(with_entry(saved, dtype=dtype))
    refusal(saved)


@pytest.mark.parametrize(
    "shape", [[2**60, 2, 2], [2**62, 4, 4], [10**9, 10**9, 10**9], [-1, 2, 5], ["2"], [2.0, 2, 5]], ids=str
)
def test_a_shape_that_the_file_cannot_hold_is_refused_without_making_it(saved, shape):
    saved.write_bytes(with_entry(saved, shape=shape))
    refusal(saved)


@pytest.mark.parametrize("offsets", [[0, 2**62], [2**62, 2**63], [40, 0], [-40, 0], [0, 79], [8, 88]], ids=str)
def test_offsets_that_do_not_fit_are_refused(saved, offsets):
    saved.write_bytes(with_entry(saved, data_offsets=offsets))
    refusal(saved)


def with_entry(saved: Path, **changes) -> bytes:
    """The file's bytes with another entry for `key_norm` in the table of tensors."""
    content = saved.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    table["key_norm"] |= changes
    new = json.dumps(table).encode()
    return struct.pack("<Q", len(new)) + new + content[8 + length :]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-30])
@pytest.mark.parametrize("name", [name for name in ARRAYS if getattr(make(), name).dtype == np.float32])
def test_a_value_that_no_run_has_is_refused_by_name(plain, name, value):
    values = getattr(make(), name).copy()
    values.flat[-1] = value
    assert f"{name} holds values" in refusal(tampered(plain, arrays={name: values}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-30])
@pytest.mark.parametrize("name", ["key_norm", "value_norm", "pooled_scale"])
def test_a_value_that_no_run_has_is_refused_from_a_compressed_array_too(saved, name, value):
    values = getattr(make(), name).copy()
    values.flat[-1] = value
    assert f"{name} holds values" in refusal(repacked(saved, **{name: values}))


def test_a_run_with_values_that_no_run_has_is_not_written(tmp_path):
    for value in (math.nan, math.inf, -1e-30):
        rows = make().recent_attention.copy()
        rows[0, 1, 2, 0] = value
        with pytest.raises(RecordError, match="attention holds values that no run can have"):
            save_run(make(recent_attention=rows), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("span", [(0, len(TEXT) + 1), (2, 1), (-1, 1), (2**31 - 1, 2**31 - 1)])
def test_a_span_that_is_none_of_the_text_is_refused(saved, span):
    spans = make().token_spans.copy()
    spans[-1] = span
    assert "token_spans" in refusal(tampered(saved, arrays={"token_spans": spans}))


def test_a_negative_token_is_refused(saved):
    assert "token_ids" in refusal(tampered(saved, arrays={"token_ids": np.array([0, 1, 2, 3, -1])}))


# Compressed arrays


def codes_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    values = getattr(make(), name)
    return quantised(values, run_module._levels(name, values.shape))


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("end", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_ends_of_rows_that_no_run_has_are_refused_by_name(saved, name, end, value):
    _, ends = codes_of(name)
    ends[-1, -1, ..., end] = value
    assert f"{name} holds values" in refusal(tampered(saved, arrays={f"{name}_ends": ends}))


@pytest.mark.parametrize("name", STEPPED)
def test_ends_of_rows_in_no_order_or_of_another_form_are_refused_by_name(saved, name):
    _, ends = codes_of(name)
    for wrong in (ends[..., ::-1], ends[..., [1, 0, 2, 3]], ends[..., [0, 2, 1, 3]], ends[..., [0, 1, 3, 2]]):
        assert f"{name} has ends in no order" in refusal(tampered(saved, arrays={f"{name}_ends": wrong.copy()}))
    for wrong in (ends[..., :2], ends[..., None], ends.astype(np.float64), ends[:1], ends.ravel()):
        assert f"{name} has ends of" in refusal(tampered(saved, arrays={f"{name}_ends": wrong.copy()}))


@pytest.mark.parametrize("name", STEPPED)
def test_a_code_that_stands_for_nothing_is_refused_by_name(saved, name):
    codes, _ = codes_of(name)
    codes.flat[0] = run_module._levels(name, codes.shape) + 3
    stream = deflated(codes, along=run_module._ALONG.get(name))
    assert f"{name} holds values" in refusal(tampered(saved, arrays={name: stream}))


@pytest.mark.parametrize("name", run_module._PACKED)
def test_a_stream_that_is_damaged_cut_or_followed_by_more_is_refused_by_name(saved, name):
    with safe_open(saved, framework="numpy") as file:
        stream = file.get_tensor(name)
    for wrong in (stream[:0], stream[:-1], np.append(stream, stream[:1]), stream[::-1].copy(), stream ^ np.uint8(255)):
        assert name in refusal(tampered(saved, arrays={name: wrong}))


@pytest.mark.parametrize("name", run_module._PACKED)
def test_a_stream_that_holds_more_or_less_than_its_shape_says_is_refused_by_name(third, name):
    with safe_open(third, framework="numpy") as file:
        shapes = json.loads(file.metadata()["shapes"])
    for factor in (0, 2):
        shape = [shapes[name][0] * factor, *shapes[name][1:]]
        assert f"{name} is not of shape" in refusal(tampered(third, shapes=json.dumps(shapes | {name: shape})))


@pytest.mark.parametrize("shapes", [None, 5, "{}", [], {}, {"key_norm": [1]}], ids=repr)
def test_shapes_of_another_form_are_refused(saved, shapes):
    assert "shapes" in refusal(tampered(saved, fields={"shapes": shapes}))


@pytest.mark.parametrize("shapes", [None, "", "null", "[]", "5", "{", "{}", "[" * 100_000], ids=lambda s: repr(s)[:9])
def test_shapes_that_are_no_json_object_of_all_parts_are_refused(third, shapes):
    refusal(tampered(third, shapes=shapes))


@pytest.mark.parametrize(
    "shape", [None, 5, "abc", {}, [-1, 2, 5], [-2, -2, 5], [2.0, 2, 5], ["2"], [True, 20], [None], [2**40], [1] * 5]
)
def test_a_shape_that_is_none_is_refused_by_name(third, shape):
    with safe_open(third, framework="numpy") as file:
        shapes = json.loads(file.metadata()["shapes"])
    assert "key_norm" in refusal(tampered(third, shapes=json.dumps(shapes | {"key_norm": shape})))


@pytest.mark.parametrize("shape", [[2**39] * 4, [10**9, 10, 10], [5000, 5000], [2**25]], ids=str)
def test_a_run_that_would_unpack_to_much_more_than_its_bytes_is_refused_without_unpacking(third, shape, monkeypatch):
    with safe_open(third, framework="numpy") as file:
        shapes = json.loads(file.metadata()["shapes"])
    monkeypatch.setattr(run_module, "inflated", lambda *_, **__: pytest.fail("unpacked"))
    assert "unpacked, it would take" in refusal(tampered(third, shapes=json.dumps(shapes | {"value_norm": shape})))


def test_a_run_that_would_not_fit_into_free_memory_is_refused(saved, monkeypatch):
    monkeypatch.setattr(run_module, "free_bytes", lambda device: 1000)
    assert "would take 1.1 KiB of memory, and 800 B may be used" in refusal(saved)


def test_of_a_stream_that_goes_on_no_more_is_unpacked_than_its_shape_takes(saved):
    bomb = np.frombuffer(zlib.compress(bytes(200 * 2**20), 9), np.uint8)  # 200 KiB of it
    bad = tampered(saved, arrays={"key_norm": bomb})
    tracemalloc.start()
    assert "key_norm is not of shape" in refusal(bad)
    assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    tracemalloc.stop()


# Plans

SPECS = [
    CompressionSpec(),
    CompressionSpec(keep_ratio=0.1 + 0.2, prune_after=7, skip_layers=(3, 0), policy="random", protect_last=32, seed=9),
    CompressionSpec(keep_ratio=0, protect_first=np.int64(4), skip_layers=tuple(np.arange(3))),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("text", ["", 'é 🙂 "quoted" </script>\n\0', *PATHS])
def test_a_plan_comes_back_exactly(spec, text):
    plan = Plan(text, spec, note=text)
    assert from_json(Plan, to_json(plan)) == plan
    assert to_json(from_json(Plan, to_json(plan))) == to_json(plan)


def plan(*, spec=None, **changes) -> str:
    content = json.loads(to_json(Plan("tiny", CompressionSpec(skip_layers=(1,)))))
    content["spec"] |= spec or {}
    return json.dumps(content | changes)


def test_a_plan_without_a_note_or_with_fewer_settings_gets_those_of_the_spec():
    text = json.dumps({"l2kv_plan": 1, "model": "tiny", "spec": {"keep_ratio": 0.25}})
    assert from_json(Plan, text) == Plan("tiny", CompressionSpec(keep_ratio=0.25))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a plan that can be read"),
        ("{", "not a plan"),
        ("[" * 100_000, "not a plan"),
        ('{"l2kv_plan": 1' + "0" * 5000, "not a plan"),
        *((text, "not a JSON object") for text in ("null", "[]", "5", '"x"')),
        ("NaN", "not a plan that can be read"),
        ("{}", "it has no version"),
        ('{"name": "package", "version": 1}', "it has no version"),
        ('{"l2kv_plan": 1}', "missing required field"),
        ('{"l2kv_plan": 1, "spec": {}}', "missing required field `model`"),
        (plan(l2kv_plan=2), "of version 1: it is of version 2"),
        (plan(l2kv_plan="1"), "it is of version '1'"),
        (plan(l2kv_plan="9" * 10_000), "it is of version '9"),
        *((plan(model=value), "at `$.model`") for value in (None, 5, [], {"a": 1})),
        (plan(note=5), "at `$.note`"),
    ],
    ids=lambda value: value[:30],
)
def test_a_foreign_plan_is_refused_with_the_reason(text, reason):
    with pytest.raises(RecordError) as refused:
        from_json(Plan, text)
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("spec", [None, 5, "x", [], [["keep_ratio", 0.5]]], ids=repr)
def test_a_plan_whose_spec_is_no_object_is_refused(spec):
    content = json.loads(plan()) | {"spec": spec}
    with pytest.raises(RecordError, match="not a plan"):
        from_json(Plan, json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("keep_ratio", value) for value in (math.nan, math.inf, -0.1, 1.1, "0.5", True, None, [0.5], 10**400)),
        *(("prune_after", value) for value in (-1, 1.5, "1", None, True, math.nan)),
        *(("skip_layers", value) for value in (5, "12", None, [1.0], [-1], ["1"], [[1]], {"1": 2}, [True])),
        *(("policy", value) for value in ("no_such", None, 5, ["low_norm"], "__class__")),
        ("seed", -1),
        ("protect_last", 2.0),
        ("unknown_setting", 1),
        ("self", 1),
        ("__class__", "x"),
    ],
)
def test_a_setting_that_no_spec_allows_is_refused(field, value):
    with pytest.raises(RecordError) as refused:
        from_json(Plan, plan(spec={field: value}))
    assert len(str(refused.value)) < 300
