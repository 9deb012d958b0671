"""Models that look at images: their language part is compressed, with or without an image; towers are left alone."""

from contextlib import contextmanager

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    DynamicCache,
)
from transformers.masking_utils import sdpa_mask

from analysis import ModelError
from analysis.models.vet import read_config
from l2kv import CompressedCache, CompressionSpec, compressible
from l2kv.layer import CompressedLayer
from tests.support.causal_models import WINDOW
from tests.support.causal_oracle import masked_forward
from tests.support.models import TINY

IMAGE = 150  # the token
TEXT = {name: value for name, value in TINY.items() if name != "pad_token_id"} | {"pad_token_id": 0}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SQUARE = _TOWER | {"image_size": 28, "patch_size": 14}
_GRID = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 14}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_PLACES = {"image_token_id": IMAGE, "video_token_id": 153, "vision_start_token_id": 151, "vision_end_token_id": 152}
_PIXELS = {"pixel_values": (1, 3, 28, 28)}
_PATCHES = {"pixel_values": (16, 3 * 2 * 14 * 14)}


def _llava(vision, text):
    return {
        "text_config": TEXT | {"model_type": text},
        "vision_config": _SQUARE | {"model_type": vision},
        "image_token_index": IMAGE,
    }


def _qwen(**vision):
    return {"text_config": TEXT | {"rope_parameters": _ROPE}, "vision_config": _GRID | vision, **_PLACES}


MODELS = {
    "llava, CLIP": ("llava", _llava("clip_vision_model", "llama"), 4, _PIXELS),
    "llava, SigLIP": (
        "llava",
        _llava("siglip_vision_model", "qwen2") | {"vision_feature_select_strategy": "full"},
        4,
        _PIXELS,
    ),
    "smolvlm": (
        "smolvlm",
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": _SQUARE, "image_token_id": IMAGE}
        | {"scale_factor": 1},
        4,
        {"pixel_values": (1, 1, 3, 28, 28)},
    ),
    "gemma3": (
        "gemma3",
        {"text_config": TEXT | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}}
        | {"vision_config": _SQUARE | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}
        | {"image_token_index": IMAGE, "boi_token_index": 151, "eoi_token_index": 152},
        4,
        _PIXELS,
    ),
    "qwen2_vl": (
        "qwen2_vl",
        _qwen(embed_dim=32, mlp_ratio=2)
        | {"vision_config": _GRID | {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 48}},
        4,
        _PATCHES,
    ),
    "qwen2_5_vl": ("qwen2_5_vl", _qwen(out_hidden_size=48, window_size=56, fullatt_block_indexes=[1]), 4, _PATCHES),
    "qwen3_vl": (
        "qwen3_vl",
        _qwen(out_hidden_size=48, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        4,
        _PATCHES,
    ),
    "internvl": (
        "internvl",
        {"text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE, "image_seq_length": 1}
        | {"vision_config": _TOWER | {"image_size": [28, 28], "patch_size": [14, 14]}},
        1,
        _PIXELS,
    ),
}
CHUNKS = (16, *[1] * 8)
HALF = CompressionSpec(keep_ratio=0.5)


def build(name):
    """(model, inputs of an image of some tokens, how many)."""
    model_type, settings, n, shapes = MODELS[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**settings)
    text = config.get_text_config(decoder=True)
    if getattr(text, "sliding_window", None):
        text.sliding_window = WINDOW
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for weight_name, weight in model.named_parameters():
        if "k_norm" in weight_name:
            torch.nn.init.uniform_(weight, 0.2, 2.0)
    inputs = {key: torch.randn(shape) for key, shape in shapes.items()}
    if "qwen" in model_type:
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    return model, inputs, n


def words(n, *, image=0):
    """Token ids [1, n], none twice, with an image of so many tokens after the third."""
    ids = 3 + torch.randperm(140, generator=torch.Generator().manual_seed(1))[None, :n]
    ids[0, 3 : 3 + image] = IMAGE
    return ids


def kinds(name, ids):
    """Which tokens are of an image, for the models that ask."""
    asked = {"gemma3": "token_type_ids"} | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "mm_token_type_ids")
    return {asked[name]: (ids == IMAGE).int()} if name in asked else {}


@contextmanager
def language_attends(model, attention):
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    AttentionInterface.register("oracle", attention)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    text._attn_implementation = "oracle"
    try:
        yield
    finally:
        text._attn_implementation = before


def decode(name, model, ids, cache, inputs):
    """Logits; the image comes with the first chunk."""
    logits = []
    for chunk in ids.split(list(CHUNKS), dim=1):
        with torch.no_grad():
            output = model(chunk, past_key_values=cache, use_cache=True, **inputs, **kinds(name, chunk))
        logits.append(output.logits)
        inputs = {}
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "spec", [HALF, CompressionSpec(keep_ratio=0.5, head_ratios={(2, 0): 0.3})], ids=["alike", "ragged"]
)
@pytest.mark.parametrize("seeing", [False, True], ids=["text alone", "an image"])
@pytest.mark.parametrize("name", MODELS)
def test_the_language_part_decodes_as_its_masked_forward_pass(name, seeing, spec):
    model, inputs, n = build(name)
    ids = words(sum(CHUNKS), image=n if seeing else 0)
    inputs = inputs if seeing else {}
    cache = CompressedCache(model.config, spec)
    with compressible(model):
        logits = decode(name, model, ids, cache, inputs)
    evicting = [i for i, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)]
    expected, kept = masked_forward(
        model, ids, spec, CHUNKS, evicting, put_in=language_attends, **inputs, **kinds(name, ids)
    )
    assert {i: [head[0].tolist() for head in cache.kept_positions(i)] for i in evicting} == kept
    torch.testing.assert_close(logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_an_image_in_a_prepared_model_changes_nothing_for_a_plain_cache_nor_for_one_that_keeps_all(name, attention):
    model, inputs, n = build(name)
    model.set_attn_implementation(attention)
    ids = words(sum(CHUNKS), image=n)
    expected = decode(name, model, ids, DynamicCache(config=model.config), inputs)
    with compressible(model):
        for cache in (
            DynamicCache(config=model.config),
            CompressedCache(model.config, CompressionSpec(keep_ratio=1.0)),
        ):
            torch.testing.assert_close(decode(name, model, ids, cache, inputs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_text_is_generated_about_an_image(name):
    model, inputs, n = build(name)
    ids = words(16, image=n)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **inputs, **kinds(name, ids)}
    expected = model.generate(input_ids=ids, **settings)
    with compressible(model):
        whole, half = (CompressedCache(model.config, spec) for spec in (CompressionSpec(keep_ratio=1.0), HALF))
        assert torch.equal(model.generate(input_ids=ids, past_key_values=whole, **settings), expected)
        model.generate(input_ids=ids, past_key_values=half, **settings)
    assert half.held[1:] == (10, 10)


@pytest.mark.parametrize("name", ["llava, CLIP", "gemma3"])
def test_rows_of_text_and_image_may_be_padded_on_the_left(name):
    model, inputs, n = build(name)
    ids = words(16, image=n).repeat(2, 1)
    ids[1, 3:7] = words(16)[0, 3:7]
    ids[1, :3] = 0
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[1, :3] = 0

    def logits(cache):
        with torch.no_grad():
            first = model(ids, attention_mask=mask[:, :16], past_key_values=cache, **inputs, **kinds(name, ids))
            then = [
                model(words(t)[:, -1:].repeat(2, 1), attention_mask=mask[:, :t], past_key_values=cache)
                for t in (17, 18)
            ]
        given = torch.cat([first.logits, *(each.logits for each in then)], dim=1)
        return given[0], given[1, 3:]

    with compressible(model):
        expected = logits(DynamicCache(config=model.config))
        for one, other in zip(
            logits(CompressedCache(model.config, CompressionSpec(keep_ratio=1.0))), expected, strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        half = CompressedCache(model.config, HALF)
        assert all(given.isfinite().all() for given in logits(half)) and max(half.held) <= 18


def test_a_folder_of_a_multimodal_model_is_said_to_be_one(tmp_path):
    model, *_ = build("qwen2_5_vl")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the model is multimodal \\(qwen2_5_vl"):
        read_config(tmp_path / "config.json", "the model")
