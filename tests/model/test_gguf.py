"""GGUF files as models: the very weights and config that the original had, for each architecture that is read.

Files are written by `tests.support.gguf_files` as llama.cpp's converter does; the oracle is the original model, its
matrices replaced by what gguf's own dequantisation leaves of them.
"""

import copy
import json
import logging
import os
from pathlib import Path

import gguf
import jinja2
import numpy as np
import pytest
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.errors import ModelError, OutOfMemoryError
from analysis.models import gguf_models
from analysis.models import load as load_module
from analysis.models.gguf import _TYPES, ARCHITECTURES, read_gguf
from analysis.models.load import load_model, loading_note, model_folder, tokenizer_and_config
from analysis.models.sizes import model_size, weights_bytes
from app import engine
from l2kv.config import CacheShape
from tests.support.gguf_files import TOKENS, gguf_architecture, stored_weight, write_gguf
from tests.support.models import tokens
from tests.support.paths import BUNDLED, ROOT

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q4_K, Q6_K = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for attention that is not uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e5}),
    "llama of wide heads": transformers.LlamaConfig(**SIZES, head_dim=32),  # as Mistral Nemo
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "qwen2": transformers.Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e6}),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7}, head_dim=32, query_pre_attn_scalar=32, sliding_window=8,
        rope_parameters=GEMMA3_ROPE,
    ),
    "phi3": transformers.Phi3Config(**SIZES),
    "qwen2 of experts": transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "qwen3 of experts": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=32, norm_topk_prob=True
    ),
    "starcoder2": transformers.Starcoder2Config(**SIZES),
}  # fmt: skip


def random_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model in float32, its biases and norms random too: untrained they would be 0 and 1, and hide a mistake."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 0.1, 0.2)
    return model.requires_grad_(False)


def as_stored(model: transformers.PreTrainedModel, kind: GGMLQuantizationType) -> transformers.PreTrainedModel:
    """A copy of a model with the weights that a file of it holds."""
    result = copy.deepcopy(model)
    for name, weight in result.named_parameters():
        weight.data = stored_weight(model, name, weight.data, kind)
    return result


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, n: int = 24) -> torch.Tensor:
    return model(tokens(model, n)).logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A file of a Llama that loads."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model(CONFIGS["llama"]), F16)


def refusal(ref: str | Path) -> str:
    with pytest.raises(ModelError) as refused:
        load_model(ref, device="cpu")
    message = str(refused.value)
    assert len(message) < 700 and "\n" not in message and "Traceback" not in message
    return message


# What loads


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_loads_as_the_very_model_that_was_written_to_it(tmp_path, name, kind):
    original = as_stored(model := random_model(CONFIGS[name]), kind)
    loaded = load_model(write_gguf(tmp_path / "x.gguf", model, kind), device="cpu")
    want, got = original.state_dict(), loaded.model.state_dict()
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key])] == []
    assert torch.equal(logits(loaded.model), logits(original))
    assert loaded.stored == {F32: "float32", F16: "float16", BF16: "bfloat16", Q8_0: "Q8_0"}[kind]
    assert loaded.dtype == "float32" and not loaded.model.training and loaded.name == "x"


def test_every_architecture_that_is_read_is_compared_with_its_original():
    assert {gguf_architecture(random_model(config)) for config in CONFIGS.values()} == set(ARCHITECTURES)


def test_the_shape_of_its_cache_is_the_originals(tmp_path):
    for config in CONFIGS.values():
        path = write_gguf(tmp_path / "x.gguf", random_model(config), F16)
        assert model_size(path).shape == CacheShape.of(config, 2)


def random_blocks(rows: int, kind: GGMLQuantizationType, scale_at: int) -> np.ndarray:
    """Rows of one block each, [rows, bytes]: any bytes are weights, if the scale is a small number."""
    content = np.random.default_rng(0).integers(0, 256, (rows, GGML_QUANT_SIZES[kind][1]), np.uint8)
    content[:, scale_at : scale_at + 2] = np.array([0.01], np.float16).view(np.uint8)
    if kind == Q4_K:
        content[:, 2:4] = content[:, :2]  # the scale of its minima
    return content


def test_a_mix_of_types_is_dequantised_and_named_by_the_one_of_most_bytes(tmp_path):
    """As in a Q4_K_M: most in Q4_K, some in Q6_K."""
    model = random_model(transformers.LlamaConfig(**SIZES | {"hidden_size": 256, "num_hidden_layers": 1}))
    sixth = random_blocks(128, Q6_K, 208), Q6_K
    fourth = {f"blk.0.ffn_{name}.weight": (random_blocks(96, Q4_K, 0), Q4_K) for name in ("gate", "up")}
    fourth |= {"token_embd.weight": (random_blocks(128, Q4_K, 0), Q4_K)}
    path = write_gguf(tmp_path / "x.gguf", model, Q8_0, blocks=fourth | {"output.weight": sixth})
    gguf_file = read_gguf(path)
    nbytes = {kind: sum(t.nbytes for t in gguf_file.tensors if t.type == kind) for kind in ("Q8_0", "Q4_K", "Q6_K")}
    assert gguf_file.stored == max(nbytes, key=nbytes.get) == "Q8_0"
    weights = load_model(path, device="cpu").model.state_dict()
    for name, (content, kind) in {
        "lm_head": sixth,
        "model.layers.0.mlp.up_proj": fourth["blk.0.ffn_up.weight"],
    }.items():
        assert torch.equal(weights[f"{name}.weight"], torch.from_numpy(gguf.dequantize(content, kind)))


def test_a_dtype_may_be_asked_for(tiny, tmp_path):
    model = random_model(CONFIGS["llama"])
    as_stored(model, F16).save_pretrained(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = load_model(tiny, device="cpu", dtype=torch.bfloat16)
    assert (loaded.dtype, loaded.stored) == ("bfloat16", "float16")
    assert torch.equal(logits(loaded.model), logits(original))


def test_what_loads_is_a_model_like_any_other(tiny, tmp_path):
    """It can be saved, which transformers' own way from GGUF refuses, and is loaded again from there."""
    loaded = load_model(tiny, device="cpu")
    assert not hasattr(loaded.model.config, "quantization_config") and not hasattr(loaded.model, "hf_quantizer")
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(again.model), logits(loaded.model)) and again.stored == "float32"
    assert again.tokenizer("the end")["input_ids"] == loaded.tokenizer("the end")["input_ids"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_weights_are_those_of_transformers_own_way(tmp_path, name):
    told = {"metadata": {".vocab_size": 128}, "tokenizer": {"padding_token_id": 0}}  # their defaults do not fit
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS[name]), Q8_0, **told)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).state_dict()
    ours = load_model(path, device="cpu").model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# Rotary embeddings that are scaled: transformers' own way from GGUF forgets them


def llama3_divisors(head_dim: int, factor: float = 8.0, theta: float = 5e5) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs.weight for Llama 3.1."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_recognised_by_its_divisors(tmp_path, factor):
    model = random_model(transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {"factor": factor}))
    path = write_gguf(tmp_path / "x.gguf", model, weights={"rope_freqs.weight": llama3_divisors(16, factor)})
    loaded = load_model(path, device="cpu")
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(loaded.model), logits(model))
    unscaled = random_model(transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e5}))
    assert not torch.allclose(logits(loaded.model), logits(unscaled))


@pytest.mark.parametrize("divisors", [np.full(8, 2.0), np.ones(4), np.full(8, np.nan), np.zeros(8)], ids=str)
def test_divisors_of_another_origin_are_refused(tmp_path, divisors):
    model = random_model(transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3))
    path = write_gguf(tmp_path / "x.gguf", model, weights={"rope_freqs.weight": divisors.astype(np.float32)})
    assert "x: its rotary embedding" in refusal(path) or "its header cannot be used" in refusal(path)


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
        ),
        ({"rope_type": "default"}, {"type": "none"}),
    ],
    ids=lambda value: str(value)[:24],
)
def test_linear_and_yarn_scaling_are_taken_over(tmp_path, rope, told):
    model = random_model(transformers.Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e4} | rope))
    metadata = {f".rope.scaling.{key}": value for key, value in told.items()}
    loaded = load_model(write_gguf(tmp_path / "x.gguf", model, metadata=metadata), device="cpu")
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_phi_3s_long_and_short_factors_are_taken_over(tmp_path, attention_factor):
    factors = {"long": np.linspace(1, 30, 8).astype(np.float32), "short": np.linspace(1, 2, 8).astype(np.float32)}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {f"{name}_factor": [float(x) for x in values] for name, values in factors.items()}
    if attention_factor:
        rope["attention_factor"] = attention_factor
    config = transformers.Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=16)
    model = random_model(config)
    path = write_gguf(
        tmp_path / "x.gguf",
        model,
        weights={f"rope_factors_{name}.weight": values for name, values in factors.items()},
        metadata={".rope.scaling.original_context_length": 16, ".rope.scaling.attn_factor": attention_factor},
    )
    loaded = load_model(path, device="cpu")
    for n in (12, 40):  # shorter than the original context, and longer
        assert torch.equal(logits(loaded.model, n), logits(model, n))


def test_phi_4_minis_partly_rotated_heads_are_taken_over(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    model = random_model(transformers.Phi3Config(**SIZES, rope_parameters=rope))
    loaded = load_model(write_gguf(tmp_path / "x.gguf", model), device="cpu")
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize(
    "metadata",
    [
        {".rope.scaling.type": "linear"},
        {".rope.scaling.type": "yarn", ".rope.scaling.factor": 2.0},
        {".rope.scaling.type": "magic"},
        {".rope.scaling.type": "longrope"},
        {".rope.dimension_count": 8},
        {".attention.value_length": 8},
        {".attention.scale": 0.5},
        {".rope.scaling.type": 5},
        {".expert_count": 8},
        {".attention.sliding_window": 8},
        {".final_logit_softcapping": 30.0},
        {".logit_scale": 0.0625},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_what_would_make_another_model_of_it_is_refused_and_not_passed_over(tmp_path, metadata):
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), metadata=metadata)
    assert "not reproduced from GGUF. Give the model in safetensors." in refusal(path)


def test_a_window_of_phi_3_and_a_pattern_of_windows_are_taken_over(tmp_path):
    phi = random_model(transformers.Phi3Config(**SIZES, sliding_window=8))
    path = write_gguf(tmp_path / "phi.gguf", phi, metadata={".attention.sliding_window": 8})
    assert torch.equal(logits(load_model(path, device="cpu").model), logits(phi))
    kinds = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    gemma = random_model(transformers.Gemma3TextConfig(**CONFIGS["gemma3"].to_dict() | {"layer_types": kinds}))
    told = [kind == "sliding_attention" for kind in kinds]
    path = write_gguf(tmp_path / "gemma.gguf", gemma, metadata={".attention.sliding_window_pattern": told})
    loaded = load_model(path, device="cpu")
    assert loaded.config.layer_types == kinds and torch.equal(logits(loaded.model), logits(gemma))


@pytest.mark.parametrize("value", ["x", -1, [1, 2], ["a"], True], ids=repr)
@pytest.mark.parametrize(
    "key",
    [
        "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "attention.sliding_window",
        "attention.key_length", "attention.sliding_window_pattern", "rope.freq_base_swa", "attn_logit_softcapping",
        "context_length",
        "attention.layer_norm_rms_epsilon", "rope.scaling.original_context_length",
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_or_has_no_effect(tmp_path, key, value):
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["gemma3"]), metadata={f".{key}": value})
    try:
        tokenizer_and_config(path)
    except ModelError as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)


# Weights that are missing, of the wrong shape, or have no place


def test_a_weight_that_is_missing_is_named(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), drop=("blk.1.ffn_up.weight",))
    assert "x is incomplete" in refusal(path)
    big = random_model(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    spare = {"output.weight": np.zeros((128, 64), np.float32)}  # as many weights as were dropped, or more
    path = write_gguf(tmp_path / "x.gguf", big, drop=("blk.1.ffn_up.weight", "output_norm.weight"), weights=spare)
    assert "x is incomplete" in refusal(path)


def test_a_norm_that_is_missing_is_named_though_there_are_weights_enough(tmp_path):
    model = random_model(CONFIGS["llama"])
    path = write_gguf(
        tmp_path / "x.gguf",
        model,
        drop=("output_norm.weight",),
        weights={"rope_freqs.weight": llama3_divisors(16, theta=1e4)},
    )
    assert "incomplete" in refusal(path)


def test_weights_that_have_no_place_are_refused(tmp_path):
    """A Llama with biases would load without them, and be another model."""
    biases = {f"blk.{i}.attn_q.bias": np.ones(64, np.float32) for i in (0, 1)}
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), weights=biases)
    message = refusal(path)
    assert "2 of its weights have no place" in message and "blk.0.attn_q.bias" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [("blk.0.ffn_up.weight", (95, 64)), ("blk.0.attn_norm.weight", (65,)), ("output.weight", (64, 128))],
)
def test_a_weight_of_the_wrong_shape_is_refused(tmp_path, name, shape):
    spare = {name: np.ones(shape, np.float32), "rope_freqs.weight": llama3_divisors(16, theta=1e4)}
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), weights=spare)
    message = refusal(path)
    assert "incomplete" in message or str(shape) in message


# Tokenizers


def test_the_bundled_models_tokenizer_survives(tmp_path, models):
    content = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(content["vocab"], key=content["vocab"].get)
    told = {
        "pre": "smollm",  # digits apart, as there
        "tokens": vocabulary,
        "merges": [" ".join(pair) for pair in content["merges"]],
        "token_type": [3, 3] + [1] * (len(vocabulary) - 2),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "unknown_token_id": None,
        "add_bos_token": True,
    }
    path = write_gguf(tmp_path / "books.gguf", models("books-5m"), BF16, tokenizer=told)
    loaded, original = load_model(path, device="cpu"), AutoTokenizer.from_pretrained(BUNDLED)
    for text in ("It was the best of times in 1859.", "x", "  two\n\n\tlines — naïve 日本 <s> 12,345.6", ""):
        assert loaded.tokenizer(text)["input_ids"] == original(text)["input_ids"]
        assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == original.decode(
            original(text)["input_ids"]
        )
    assert torch.equal(logits(loaded.model), logits(models("books-5m")))
    assert loaded.stored == "bfloat16"


def test_a_sentencepiece_vocabulary_of_scores_is_rebuilt(tmp_path):
    pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "n"]
    told = {
        "model": "llama", "pre": "default", "merges": None,
        "tokens": ["<unk>", "<s>", "</s>", *pieces],
        "scores": [0.0] * 3 + [-float(x) for x in (9, 9, 9, 9, 1, 2, 3, 9)],
        "token_type": [2, 3, 3] + [1] * len(pieces),
    }  # fmt: skip
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    tokenizer, config = tokenizer_and_config(path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("then")["input_ids"]) == ["<s>", "▁the", "n"]
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize("pre", ["no-such-rule", "default", None])
def test_a_rule_of_splitting_that_is_not_known_is_refused(tmp_path, pre):
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer={"pre": pre})
    message = refusal(path)
    assert repr(pre) in message and "tokenizer.ggml.pre" in message


@pytest.mark.parametrize("kind", [3, 4], ids=["control", "user-defined"])
def test_special_tokens_outside_the_alphabet_of_bytes_keep_their_places(tmp_path, kind):
    """DeepSeek's: transformers' own way adds them anew, behind the vocabulary."""
    told = {
        "tokens": [*TOKENS[:1], "<｜begin▁of｜>", *TOKENS[2:]],
        "token_type": [3, kind, 3, *[1] * (len(TOKENS) - 3)],
    }
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    tokenizer, _ = tokenizer_and_config(path)
    assert len(tokenizer) == len(TOKENS) and tokenizer.bos_token_id == 1
    assert tokenizer("the<｜begin▁of｜>the")["input_ids"] == [TOKENS.index("the"), 1, TOKENS.index("the")]


def test_special_tokens_that_are_no_tokens_are_refused(tmp_path):
    told = {"tokens": [*TOKENS[:1], "日<s>", *TOKENS[2:]], "token_type": [1] * len(TOKENS)}
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    assert "its special tokens are not in its vocabulary" in refusal(path)


def test_a_chat_template_is_data_and_runs_in_a_sandbox(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    model = random_model(CONFIGS["llama"])
    path = write_gguf(tmp_path / "x.gguf", model, metadata={"tokenizer.chat_template": template})
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = load_model(path, device="cpu").tokenizer
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user]hi"
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    path = write_gguf(tmp_path / "x.gguf", model, metadata={"tokenizer.chat_template": evil})
    tokenizer = load_model(path, device="cpu").tokenizer  # loading runs nothing
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "told",
    [
        {"merges": ["t h", "no pair"]},
        {"merges": ["th"]},
        {"tokens": ["<unk>", "<s>", "</s>", "t", "h"], "merges": ["t h"], "token_type": [1] * 5},  # Rust panics
    ],
    ids=str,
)
def test_a_tokenizer_that_transformers_cannot_build_is_refused_as_that(tmp_path, told):
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    assert "x: its tokenizer cannot be used" in refusal(path)


# Which file is meant


def test_a_folder_with_one_gguf_file_is_that_file(tiny, tmp_path):
    for name in ("README.md", "config.json", "tokenizer_config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{nothing that is read")  # what lies beside the file has no say
    (tmp_path / "my model.Q8_0.gguf").symlink_to(tiny)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.name == "my model.Q8_0"
    assert model_folder(tmp_path) == tmp_path / "my model.Q8_0.gguf"


def test_a_folder_with_several_asks_for_one_by_its_path(tiny, tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).symlink_to(tiny)
    message = refusal(tmp_path)
    assert "holds 2 GGUF files (a.gguf, b.gguf). Give the path of one of them." in message
    assert load_model(tmp_path / "b.gguf", device="cpu").name == "b"


def test_safetensors_come_before_gguf(tiny, tmp_path):
    model = random_model(CONFIGS["llama"], seed=1)
    model.save_pretrained(tmp_path)
    load_model(tiny, device="cpu").tokenizer.save_pretrained(tmp_path)
    (tmp_path / "x.gguf").symlink_to(tiny)
    assert torch.equal(logits(load_model(tmp_path, device="cpu").model), logits(model))


def test_a_blob_of_ollama_is_known_by_its_first_bytes(tiny, tmp_path):
    blob = tmp_path / ("sha256-" + "5a" * 32)
    blob.symlink_to(tiny)
    assert load_model(blob, device="cpu").name == "sha256-5a5a5a5a5a5a"


@pytest.mark.parametrize("ref", ["missing.gguf", "no/such.gguf", "/no/such/folder/x.gguf", "https://x/y.gguf"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(ref):
    assert "No such model" in refusal(ref)


def test_a_pipe_of_that_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    assert "No such model" in refusal(tmp_path / "x.gguf")


# Memory


def test_what_it_takes_is_told_first(tiny, caplog):
    with caplog.at_level(logging.WARNING, "analysis.models.load"):
        load_model(tiny, device="cpu")
    note = loading_note(tiny, device="cpu")
    assert note in caplog.text
    assert note.startswith("tiny is stored as float16") and "dequantised to float32: loading takes about" in note
    assert loading_note("books-5m") == ""


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (0.9, "In half the precision it would fit: load_model(..., dtype=torch.bfloat16)."),
        (0.1, "A model of about 7,800 weights would fit."),
    ],
)
def test_a_file_that_would_not_fit_is_refused_before_its_weights_are_read(tiny, monkeypatch, free, advice):
    file = read_gguf(tiny)
    needed = gguf_models.dequantising_bytes(file, 4)
    monkeypatch.setattr(load_module, "usable_bytes", lambda device: int(needed * free))
    monkeypatch.setattr(gguf_models, "_dequantised", None)
    with pytest.raises(OutOfMemoryError) as refused:
        load_model(tiny, device="cpu")
    assert (
        advice in str(refused.value) and "may be used" in str(refused.value) and "tiny is stored" in str(refused.value)
    )


def test_a_gpu_must_hold_the_weights_too(tiny, monkeypatch):
    monkeypatch.setattr(load_module, "usable_bytes", lambda device: 2**40 if str(device) == "cpu" else 1000)
    with pytest.raises(OutOfMemoryError, match="1000 B on cuda"):
        load_model(tiny, device="cuda")


def test_a_file_that_changes_while_it_is_loaded_is_refused(tiny, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny.read_bytes())
    monkeypatch.setattr(load_module, "_check_room", lambda *_: path.write_bytes(tiny.read_bytes()[:-5000]))
    assert "x: its weights cannot be used" in refusal(path)


# Sizes, and the app


def test_its_size_is_that_of_the_weights_as_they_are_stored(tiny):
    size = model_size(tiny)
    stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tiny).tensors)
    assert size.weights_bytes == weights_bytes(tiny) == stored
    assert (size.name, size.counted, size.config.num_hidden_layers) == ("tiny", False, 2)


def test_files_in_allowed_folders_are_offered_by_the_app(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("L2KV_MODEL_DIRS", raising=False)
    (tmp_path / "models" / "maker").mkdir(parents=True)
    for file in ("a.gguf", "maker/b.gguf", "maker/c.txt"):
        (tmp_path / "models" / file).write_bytes(tiny.read_bytes())
    with pytest.raises(ModelError, match="L2KV_MODEL_DIRS"):
        engine.check_allowed(str(tiny))
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path / "models"))
    offered = [Path(ref).relative_to(tmp_path).as_posix() for ref in engine.allowed_models() if "/" in ref]
    assert offered == ["models/a.gguf", "models/maker/b.gguf"]
    for file in ("a.gguf", "maker/b.gguf"):
        assert engine.check_allowed(str(tmp_path / "models" / file)) == str(tmp_path / "models" / file)
    (tmp_path / "models" / "out.gguf").symlink_to(tiny)
    with pytest.raises(ModelError, match="L2KV_MODEL_DIRS"):
        engine.check_allowed(str(tmp_path / "models" / "out.gguf"))
    tokenizer, config = engine.Engine().tokenizer_and_config(str(tmp_path / "models" / "a.gguf"))
    assert config.num_hidden_layers == 2 and tokenizer("the")["input_ids"] == [TOKENS.index("the")]


def test_the_app_runs_a_file_and_names_how_it_is_stored_computed_and_cached(tiny, monkeypatch):
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tiny.parent))
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60)
    app.session_state["model_choice"] = str(tiny)
    app._page_hash = calc_hash("capture")  # switch_page knows only pages that are files
    app.run()
    app.text_area(key="text").set_value("the end of the thing").run()
    assert any("tokens**, about" in element.value for element in app.markdown)  # counted before the model is loaded
    app.button(key="run_capture").click().run()
    assert not app.exception and not app.error
    status = [element.value.replace("\\", "") for element in app.caption]
    assert any("tiny in memory, stored as float16, computed and cached in float32 on cpu" in line for line in status)


def test_types_and_their_blocks_are_those_of_gguf_itself():
    for number, (name, block, nbytes) in _TYPES.items():
        kind = GGMLQuantizationType(number)
        assert GGML_QUANT_SIZES[kind] == (block, nbytes)
        assert kind.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(name, name)
        zeros = np.zeros((2, nbytes), np.uint8)
        assert gguf.dequantize(zeros, kind).shape == (2, block)  # so it can be dequantised
