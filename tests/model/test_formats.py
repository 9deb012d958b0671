"""Decoding over pairs of fewer bits and channels, against a masked full forward whose pairs are rounded by hand."""

from dataclasses import replace
from functools import cache

import pytest

from l2kv import CompressedCache, CompressionSpec
from tests.support.architecture_oracle import evicting_layers, masked_forward
from tests.support.architectures import ARCHITECTURES
from tests.support.decoding import IN_CHUNKS, ONE_BY_ONE, decode
from tests.support.models import tokens

COMPRESSED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is None]
FORMATS = {
    "8-bit keys": {"key_bits": 8},
    "4-bit values": {"value_bits": 4},
    "8 and 4 bits, recent tokens exact": {"key_bits": 8, "value_bits": 4, "protect_last": 6},
    "narrow keys": {"key_channels": 0.6},
    "narrow keys, recent tokens exact": {"key_channels": 0.6, "protect_last": 6},
    "narrow 8-bit keys, 4-bit values": {"key_channels": 0.6, "key_bits": 8, "value_bits": 4, "protect_last": 3},
}
ALL_AT_ONCE = FORMATS["narrow 8-bit keys, 4-bit values"]


@cache
def built(name):
    """The model, built once."""
    return ARCHITECTURES[name].model()


def uniform(model):
    return CompressionSpec(keep_ratio=0.5)


def per_head(model):
    """A kv head of the first layer that evicts keeps less than all others."""
    return CompressionSpec(keep_ratio=0.6, head_ratios={(layer, 0): 0.3 for layer in evicting_layers(model)[:1]})


def assert_decoding_is_the_full_forward_over_rounded_pairs(model, spec, chunks):
    ids, compressed = tokens(model, sum(chunks)), CompressedCache(model.config, spec)
    logits = decode(model, ids, chunks, compressed)
    expected, kept = masked_forward(model, ids, chunks, spec)
    assert {i: [head[0].tolist() for head in compressed.kept_positions(i)] for i in evicting_layers(model)} == kept
    # A number half way between two levels may fall either way, and then a few logits are off by a little.
    off = (logits - expected).abs()
    assert off.max() < 1e-2 and (off > 2e-4).float().mean() < 0.2


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("shares", [uniform, per_head])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["Llama", "Gemma 3 (text)", "gpt-oss"])
def test_decoding_is_a_full_forward_over_pairs_rounded_by_hand(name, form, shares, chunks):
    model = built(name)
    assert_decoding_is_the_full_forward_over_rounded_pairs(model, replace(shares(model), **FORMATS[form]), chunks)


@pytest.mark.parametrize("name", COMPRESSED)
def test_so_it_is_in_every_architecture(name):
    model = built(name)
    assert_decoding_is_the_full_forward_over_rounded_pairs(model, replace(per_head(model), **ALL_AT_ONCE), IN_CHUNKS)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "gpt-oss"])
def test_so_it_is_beside_eager_attention(name):
    model = built(name)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        spec = replace(per_head(model), **ALL_AT_ONCE)
        assert_decoding_is_the_full_forward_over_rounded_pairs(model, spec, IN_CHUNKS)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("name", ["Granite", "Gemma 2", "gpt-oss"])
def test_a_policy_that_goes_by_attention_goes_by_that_to_rounded_keys(name):
    model = built(name)
    spec = replace(per_head(model), policy="accumulated", **ALL_AT_ONCE)
    assert_decoding_is_the_full_forward_over_rounded_pairs(model, spec, IN_CHUNKS)


def test_rounding_is_felt():
    """Or an oracle that rounds nothing might agree with a cache that rounds nothing either."""
    model = built("Llama")
    ids = tokens(model, sum(IN_CHUNKS))
    exact, _ = masked_forward(model, ids, IN_CHUNKS, CompressionSpec(keep_ratio=1.0))
    for form in FORMATS.values():
        rounded, _ = masked_forward(model, ids, IN_CHUNKS, CompressionSpec(keep_ratio=1.0, **form))
        assert (exact - rounded).abs().max() > 0.03
