"""Compressed decoding of every architecture against a full forward pass with the evicted masked, or a refusal."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from transformers import DynamicCache

from l2kv import CompressedCache, CompressionSpec, UnsupportedModelError
from tests.support.architecture_oracle import evicting_layers, masked_forward
from tests.support.architectures import ARCHITECTURES, compress
from tests.support.decoding import IN_CHUNKS, ONE_BY_ONE, decode
from tests.support.models import tokens

COMPRESSED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is None]
REFUSED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is not None]


@cache
def built(name):
    """The model, built once."""
    return ARCHITECTURES[name].model()


def uniform(model):
    return CompressionSpec(keep_ratio=0.4)


def per_head(model):
    """Neighbouring kv heads keep different shares, and every third the same."""
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(model, 2), past_key_values=plain)
    return CompressionSpec(
        head_ratios={
            (i, h): (0.3, 0.8, 0.1)[(i + h) % 3]
            for i in evicting_layers(model)
            for h in range(plain.layers[i].keys.shape[1])
        }
    )


def assert_compressed_decoding_is_the_masked_forward(model, spec, chunks):
    ids, compressed = tokens(model, sum(chunks)), CompressedCache(model.config, spec)
    logits = decode(model, ids, chunks, compressed)
    expected, kept = masked_forward(model, ids, chunks, spec)
    assert {i: [head[0].tolist() for head in compressed.kept_positions(i)] for i in evicting_layers(model)} == kept
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("shares", [uniform, per_head])
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_decoding_is_a_full_forward_with_the_evicted_masked(name, shares, chunks):
    model = built(name)
    assert_compressed_decoding_is_the_masked_forward(model, shares(model), chunks)


@pytest.mark.parametrize("name", COMPRESSED)
def test_so_it_is_through_the_models_eager_attention(name):
    model = built(name)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        assert_compressed_decoding_is_the_masked_forward(model, per_head(model), IN_CHUNKS)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("name", ["Granite", "Gemma 2", "gpt-oss"])
def test_a_policy_that_goes_by_attention_sees_its_scaling_its_soft_cap_and_its_sinks(name):
    model = built(name)
    spec = replace(per_head(model), policy="accumulated")
    assert_compressed_decoding_is_the_masked_forward(model, spec, IN_CHUNKS)


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_oracle_that_evicts_nothing_is_the_model_itself(name):
    """Or an oracle without the soft cap, the sinks or the window might agree with a cache that lost them too."""
    model = built(name)
    ids = tokens(model, 24)
    expected, _ = masked_forward(model, ids, (24,), CompressionSpec(keep_ratio=1.0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", COMPRESSED)
def test_layers_with_a_window_are_left_alone_and_no_others(name):
    model = built(name)
    evicting, compressed = evicting_layers(model), compress(model)
    assert len(compressed.layers) - len(evicting) == ARCHITECTURES[name].left
    for i in evicting:
        assert {head.shape[-1] for head in compressed.kept_positions(i)} == {compressed.get_seq_length() // 2}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compressed_is_refused_with_the_reason(name):
    model = built(name)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=ARCHITECTURES[name].refused):
        compress(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name,layer", [("GPT-BigCode (one kv head)", 0), ("Gemma 4 (text)", 1)])
def test_a_kv_head_that_the_layer_has_not_is_refused(name, layer):
    with pytest.raises(ValueError, match=f"kv head 1 of layer {layer}, but its kv heads are 0 to 0"):
        CompressedCache(ARCHITECTURES[name].config(), CompressionSpec(head_ratios={(layer, 1): 0.5}))


@pytest.mark.parametrize("config_class", ["RwkvConfig", "xLSTMConfig", "DeepseekV4Config", "BltConfig"])
def test_a_model_with_a_cache_of_its_own_is_refused_and_not_stumbled_over(config_class):
    with pytest.raises(UnsupportedModelError, match=r"no cache of plain layers|no attention heads|without a key"):
        CompressedCache(getattr(transformers, config_class)(), CompressionSpec())
