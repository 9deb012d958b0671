"""What is loaded as a model, and what is refused: every broken or hostile folder ends in a ModelError that says why."""

import json
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from analysis.errors import ModelError
from analysis.models.load import BUNDLED_MODELS, LoadedModel, load_model, model_folder, tokenizer_and_config
from tests.support.models import build
from tests.support.paths import BUNDLED, STORIES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that loads. Its tokenizer is the bundled model's."""
    folder = tmp_path_factory.mktemp("whole")
    build("llama", vocab_size=4096).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(whole, tmp_path / "tiny")


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in weights.items() if v is not None}, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, weight_map: object) -> None:
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(ref: str | Path) -> str:
    """The message of the ModelError: short, and a sentence for a reader."""
    with pytest.raises(ModelError) as refused:
        load_model(ref, device="cpu")
    message = str(refused.value)
    assert len(message) < 700
    assert not any(
        word in message for word in ("Traceback", "\n", "site-packages", "object at 0x", "ignore_mismatched")
    )
    return message


# What loads


def test_the_bundled_model_loads_by_name_and_knows_its_tokenizer():
    loaded = load_model("books-5m", device="cpu")
    assert "books-5m" in BUNDLED_MODELS
    assert loaded.name == "books-5m"
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert len(loaded.tokenizer) == loaded.config.vocab_size == 4096


def test_a_model_tells_how_many_tokens_it_was_trained_to_read_at_once(folder):
    loaded = load_model(folder, device="cpu")
    assert loaded.positions == 512
    bloom = SimpleNamespace(config=transformers.BloomConfig())  # which does not say
    assert LoadedModel(bloom, loaded.tokenizer, "bloom").positions == sys.maxsize


@pytest.mark.parametrize("as_ref", [Path, str, lambda folder: f"  {folder}/ \n", os.path.relpath])
def test_a_folder_loads_with_the_very_weights_in_it(folder, as_ref):
    loaded = load_model(as_ref(folder), device="cpu")
    assert loaded.name == "tiny"
    for name, weight in load_file(folder / WEIGHTS).items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


def test_a_folder_in_shards_loads(folder):
    shard(folder, dict.fromkeys(load_file(folder / WEIGHTS), "shard.safetensors"))
    assert load_model(folder, device="cpu").model.num_parameters() == build("llama", vocab_size=4096).num_parameters()


def test_the_dtype_asked_for_is_the_dtype_loaded(folder):
    assert load_model(folder, device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_stories260k_loads():
    if not STORIES.is_dir():
        pytest.skip("stories260K is not on this machine")
    assert load_model(STORIES, device="cpu").config.num_hidden_layers == 5


def test_tied_weights_in_half_precision_are_not_taken_for_missing(folder):
    build("llama", vocab_size=4096, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder)
    model = load_model(folder, device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"dtype": "float16"},
        {"auto_map": {"AutoModelForCausalLM": "modeling_local.Evil"}},  # not of another repository, and not run
        {"_name_or_path": "x/y"},
        {"quantization_config": None},
    ],
    ids=str,
)
def test_a_config_without_harm_loads(folder, changes):
    (folder / "modeling_local.py").write_text("raise SystemExit('remote code was run')")
    rewrite(folder / "config.json", **changes)
    assert type(load_model(folder, device="cpu").model).__name__ == "LlamaForCausalLM"


# Names


@pytest.mark.parametrize(
    "ref",
    [
        "",
        " ",
        "/no/such/folder",
        "a/b/c",
        "../no",
        "~nobody-here/x",
        "x y",
        "a\0b",
        "é/\ud800",
        "x" * 5000,
        "<b>",
        "-x/y",
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_with_what_could_be_given(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"No such model.*books-5m.*folder.*Hugging Face"):
        load_model(ref)


@pytest.mark.parametrize("ref", ["Qwen/Qwen3-0.6B", "gpt2", "no--such/model..name"])
def test_a_hub_id_without_a_connection_is_refused_with_its_name_and_what_to_do(ref):
    message = refusal(ref)
    assert repr(ref) in message
    assert "give a local folder" in message


def test_a_file_is_no_model(folder):
    assert "No such model" in refusal(folder / WEIGHTS)


def test_a_vetted_folder_is_given_back_with_links_resolved(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert model_folder(tmp_path / "link") == folder.resolve()
    assert model_folder("books-5m") == BUNDLED


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(folder, device):
    if not device:
        assert load_model(folder, device=device)  # as if not given
    else:
        with pytest.raises(ModelError, match="tiny: its weights"):
            load_model(folder, device=device)


def test_memory_that_runs_out_on_the_way_to_the_device_is_reported(folder, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", full)
    assert "does not fit into memory" in refusal(folder)


# config.json


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b"5",
        b'"llama"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 5000,
    ],
    ids=lambda content: repr(content[:10]),
)
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 1_000_000),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 1e308),
        ("hidden_size", -48),
        ("hidden_size", float("nan")),
        ("num_attention_heads", -1),
        ("num_key_value_heads", 10**6),
        ("head_dim", float("inf")),
        ("intermediate_size", 10**12),
        ("vocab_size", 10**9),
        ("num_labels", 10**7),  # transformers takes minutes to name them all
        ("num_layers", 10**6),
        ("n_layers", 10**6),
        ("decoder_layers", 10**6),
        ("encoder_layers", 10**6),
        ("d_model", 10**6),
        ("n_heads", 10**6),
        ("vocab_size", 10**400),
    ],
)
def test_a_size_out_of_range_is_refused_by_name_with_what_was_got_and_what_is_allowed(folder, field, value):
    rewrite(folder / "config.json", **{field: value})
    message = refusal(folder)
    assert f"{field} = {value}" in message
    assert "1 to" in message


def test_a_size_out_of_range_is_found_however_deep(folder):
    rewrite(folder / "config.json", a={"b": {"text_config": {"num_hidden_layers": 10**6}}})
    assert "num_hidden_layers = 1000000" in refusal(folder)


@pytest.mark.parametrize(
    ("model_type", "field", "named"),
    [("xglm", "num_layers", "num_layers"), ("bart", "encoder_layers", "encoder_layers"), ("gpt_neo", "num_layers", "")],
)
def test_the_layers_of_a_model_are_bounded_by_whatever_name_it_gives_them(folder, model_type, field, named):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, field: 10**6, "is_decoder": True}))
    assert f"{named} = 1000000" in refusal(folder)


def test_a_size_under_a_name_that_nobody_knows_is_found_before_anything_is_built(folder, monkeypatch):
    """As if transformers took a new name for the layers."""
    monkeypatch.setitem(transformers.LlamaConfig.attribute_map, "num_hidden_layers", "storeys")
    config = json.loads((folder / "config.json").read_text())
    config["storeys"] = 10**6
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json makes num_hidden_layers 1000000, which is out of range (1 to 1024)" in refusal(folder)


@pytest.mark.parametrize("value", ["3", [3], {"a": 3}, None, True, 3.5], ids=repr)
@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_size_that_is_no_whole_number_is_refused_by_name(folder, field, value):
    rewrite(folder / "config.json", **{field: value})
    message = refusal(folder)
    assert field in message
    assert type(value).__name__ in message


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 4_000_000, "hidden_size": 65_532},
        {"intermediate_size": 1_048_576, "hidden_size": 65_532, "num_hidden_layers": 2},
        {"num_attention_heads": 1024, "head_dim": 4096, "hidden_size": 65_536},
    ],
    ids=str,
)
def test_a_config_of_far_more_weights_than_the_files_hold_is_refused_before_they_are_made_up(folder, changes):
    rewrite(folder / "config.json", **changes)
    assert "incomplete: config.json describes" in refusal(folder)


def test_a_config_of_nothing_but_its_type_does_not_make_up_a_model_of_7b(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    message = refusal(folder)
    assert "6,738,415,616 weights" in message  # Llama 7B
    assert f"{(folder / WEIGHTS).stat().st_size:,} bytes" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "evil/repo"},
        {"_attn_implementation_internal": "evil/repo@main:kernel"},
        {"attn_implementation": {"text_config": "evil/repo"}},
        {"text_config": {"inner": {"attn_implementation": "evil/repo"}}},
    ],
    ids=str,
)
def test_attention_code_of_a_repository_is_refused(folder, changes):
    rewrite(folder / "config.json", **changes)
    assert "attention code from elsewhere" in refusal(folder)


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoModelForCausalLM": "evil/repo--modeling.Evil"},
        {"AutoTokenizer": ["evil/repo--a.B", None]},
        "evil/repo--modeling.Evil",
        ["evil/repo--modeling.Evil"],
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_code_of_another_repository_is_refused(folder, auto_map, nested):
    rewrite(folder / "config.json", **({"text_config": {"auto_map": auto_map}} if nested else {"auto_map": auto_map}))
    assert "code of another repository (auto_map)" in refusal(folder)


@pytest.mark.parametrize(
    "config", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}, {}, [], "fp8", 4], ids=repr
)
def test_a_quantised_model_is_refused(folder, config):
    rewrite(folder / "config.json", quantization_config=config)
    message = refusal(folder)
    assert "quantised" in message and "need kernels that are not loaded here" in message
    if isinstance(config, dict) and config:
        assert f"({config['quant_method']})" in message


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/repo"}')
    assert "adapter" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"model_type": None, "architectures": None}, "model type"),
        ({"model_type": ["llama"]}, "config.json"),
        ({"auto_map": 5}, "config.json"),
        ({"text_config": 5}, "config.json"),
        ({"rope_parameters": {"rope_type": "no_such_rope"}}, "no_such_rope"),
        ({"hidden_act": "no_such_act"}, "no_such_act"),
        ({"layer_types": ["no_such_layer"] * 3}, "layer_type"),
        ({"transformers_weights": "../other.safetensors"}, "../other.safetensors"),
        ({"deep": json.loads('{"a":' * 900 + "1" + "}" * 900)}, "config.json"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_that_transformers_cannot_use_is_refused_with_its_reason(folder, changes, named):
    rewrite(folder / "config.json", **changes)
    assert named in refusal(folder)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
OTHER_KINDS = {
    "encoder": (transformers.BertConfig(**SMALL), "bert is not decoder-only"),
    "encoder-decoder": (transformers.T5Config(d_model=32, num_layers=1, num_heads=2), "t5 is not decoder-only"),
    "speech": (transformers.WhisperConfig(), "whisper is not decoder-only"),
    "latents": (transformers.DeepseekV3Config(**SMALL), "deepseek_v3 caches latents"),
    "no attention": (transformers.MambaConfig(hidden_size=32, num_hidden_layers=1), "mamba has no attention heads"),
}


@pytest.mark.parametrize(("config", "reason"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_another_kind_of_model_is_refused_as_that(folder, config, reason):
    config.save_pretrained(folder)
    assert reason in refusal(folder)


# Files


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
