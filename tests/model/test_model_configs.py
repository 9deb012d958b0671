"""Configs that are refused: each ends in a ModelError that says which value and why, before a model is made up."""

import json

import pytest
import transformers

from tests.support.model_folders import WEIGHTS, refusal, rewrite


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
    assert "code from another repository (auto_map)" in refusal(folder)


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
