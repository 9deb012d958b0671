"""GGUF files as models: the very weights and config that the original had, for each architecture that is read.

Files are written by `tests.support.gguf_files` as llama.cpp's converter does; the oracle is the original model, its
matrices replaced by what gguf's own dequantisation leaves of them.
"""

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoModelForCausalLM

from analysis.errors import ModelError
from analysis.models.gguf import _TYPES, ARCHITECTURES, read_gguf
from analysis.models.load import load_model, tokenizer_and_config
from analysis.models.sizes import model_size
from l2kv.config import CacheShape
from tests.support.gguf_files import gguf_architecture, write_gguf
from tests.support.gguf_models import CONFIGS, LLAMA3, SIZES, as_stored, logits, random_model, refusal

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q8_0, Q4_K, Q6_K = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K


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


def test_a_dtype_may_be_asked_for(gguf_file, tmp_path):
    model = random_model(CONFIGS["llama"])
    as_stored(model, F16).save_pretrained(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = load_model(gguf_file, device="cpu", dtype=torch.bfloat16)
    assert (loaded.dtype, loaded.stored) == ("bfloat16", "float16")
    assert torch.equal(logits(loaded.model), logits(original))


def test_what_loads_is_a_model_like_any_other(gguf_file, tmp_path):
    """It can be saved, which transformers' own way from GGUF refuses, and is loaded again from there."""
    loaded = load_model(gguf_file, device="cpu")
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


def test_types_and_their_blocks_are_those_of_gguf_itself():
    for number, (name, block, nbytes) in _TYPES.items():
        kind = GGMLQuantizationType(number)
        assert GGML_QUANT_SIZES[kind] == (block, nbytes)
        assert kind.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(name, name)
        zeros = np.zeros((2, nbytes), np.uint8)
        assert gguf.dequantize(zeros, kind).shape == (2, block)  # so it can be dequantised
