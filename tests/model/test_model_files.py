"""Files of a model folder that are missing, broken, hostile or too large: each ends in a ModelError that says why."""

import json
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import torch

from analysis.errors import ModelError
from analysis.models.load import load_model, tokenizer_and_config
from tests.support.model_folders import INDEX, NORM, WEIGHTS, refusal, rewrite, rewrite_weights, shard


def test_a_folder_without_a_config_is_no_model_folder(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


def test_a_folder_that_may_not_be_read_is_refused_as_that(folder, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert "cannot be read ([Errno 13] Permission denied)" in refusal(folder)


def test_a_config_that_would_block_the_reader_is_not_read(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_other_formats_of_weights_are_named_and_not_opened(folder, file):
    class Bomb:
        def __reduce__(self):
            return (folder.rmdir, ())

    (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb()))
    message = refusal(folder)
    assert "no .safetensors weights" in message
    assert file in message


def test_a_folder_of_the_name_of_the_weights_is_no_weights(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert "no .safetensors weights" in refusal(folder)


@pytest.mark.parametrize(
    "target", ["../whole/model.safetensors", "/etc/passwd", "..", ".", "", "config.json", "a.bin", "a\0"]
)
def test_an_index_that_points_elsewhere_is_refused_with_where(folder, target):
    shard(folder, {NORM: target})
    message = refusal(folder)
    assert "points outside its folder" in message
    assert repr(target) in message


def test_an_index_of_another_name_is_vetted_too(folder):
    shard(folder, {NORM: "../whole/model.safetensors"})
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    rewrite(folder / "config.json", transformers_weights="mine.safetensors.index.json")
    assert "points outside its folder" in refusal(folder)


def test_a_shard_that_is_missing_is_named(folder):
    shard(folder, {NORM: "shard.safetensors", "lm_head.weight": "second.safetensors"})
    assert "incomplete: second.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize(
    "weight_map", [None, [], "x", {NORM: 5}, {NORM: ["shard.safetensors"]}, {NORM: None}], ids=repr
)
def test_an_index_of_the_wrong_form_is_refused(folder, weight_map):
    shard(folder, weight_map)
    assert INDEX in refusal(folder)


def test_an_empty_index_is_refused(folder):
    shard(folder, {})
    assert "tiny" in refusal(folder)


@pytest.mark.parametrize("end", [0, 4, 8, 100, 20_000, -4])
def test_weights_that_were_cut_off_are_refused(folder, end):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:end])
    assert "tiny" in refusal(folder)


@pytest.mark.parametrize("head", [b"\xff" * 8, b"\0" * 8, b"PK\x03\x04\0\0\0\0", b"\x80\x04\x95\0\0\0\0\0"])
def test_weights_with_another_head_are_refused(folder, head):
    (folder / WEIGHTS).write_bytes(head + (folder / WEIGHTS).read_bytes()[8:])
    assert "its weights cannot be used" in refusal(folder)


def test_weights_that_are_missing_are_counted_and_the_first_is_named(folder):
    rewrite_weights(folder, model__norm__weight=None, model__layers__1__mlp__up_proj__weight=None)
    assert "2 weights are missing, the first is model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_a_weight_of_the_wrong_shape_is_refused_with_both_shapes(folder):
    rewrite_weights(folder, model__norm__weight=torch.ones(47))
    message = refusal(folder)
    assert NORM in message
    assert "(47,)" in message
    assert "(48,)" in message


def test_a_config_of_another_shape_than_the_weights_is_refused(folder):
    rewrite(folder / "config.json", num_key_value_heads=1)
    message = refusal(folder)
    assert "model.layers.0.self_attn.k_proj.weight" in message
    assert "(16, 48)" in message  # 2 kv heads of 8, as stored
    assert "(8, 48)" in message


def test_a_missing_tokenizer_is_refused_as_that(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "its tokenizer cannot be used" in refusal(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"version": "1.0", "added_tokens": []}', "[" * 100_000]
)
def test_a_corrupt_tokenizer_is_refused_as_that(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "its tokenizer cannot be used" in refusal(folder)


def test_code_named_by_the_tokenizer_is_not_run(folder):
    rewrite(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    assert len(load_model(folder, device="cpu").tokenizer) == 4096


# Files that would take forever to parse, and a tokenizer of nothing

PARSED = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]


@pytest.mark.parametrize("name", PARSED)
def test_very_many_keys_are_refused_by_their_bytes_before_they_are_parsed(folder, name):
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | {f"key {i}": i for i in range(300_000)}))
    started = time.perf_counter()
    assert re.search(rf"its {name} has [\d,]+ bytes, and [14],[\d,]+ at most are read", refusal(folder))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", INDEX, "merges.txt", "chat_template.jinja"])
def test_a_file_of_more_bytes_than_any_vocabulary_is_refused_and_not_read(folder, name):
    with (folder / name).open("wb") as file:
        file.truncate(2**28 + 1)  # which takes no room on the disk
    assert f"its {name} has 268,435,457 bytes" in refusal(folder)


@pytest.mark.parametrize("name", PARSED[:2])
def test_what_real_models_have_of_keys_loads_soon(folder, name):
    labels = {str(i): f"LABEL_{i}" for i in range(9999)}
    rewrite(folder / name, id2label=labels, label2id={label: int(i) for i, label in labels.items()})
    started = time.perf_counter()
    load_model(folder, device="cpu")
    assert time.perf_counter() - started < 20


def without_vocabulary(content: dict, model: dict) -> dict:
    return content | {"model": model, "added_tokens": [], "post_processor": None}


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "WordLevel", "vocab": {}, "unk_token": "?"},
        {"type": "WordPiece", "vocab": {}, "unk_token": "?", "continuing_subword_prefix": "#",
         "max_input_chars_per_word": 9},
        {"type": "Unigram", "vocab": [["x", 0.0]], "unk_id": None},
    ],
    ids=lambda model: model["type"],
)  # fmt: skip
def test_a_tokenizer_without_a_vocabulary_is_refused_as_that(folder, model):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(without_vocabulary(content, model)))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "tokenizer" in refusal(folder)
    with pytest.raises(ModelError, match="tokenizer"):
        tokenizer_and_config(folder)
