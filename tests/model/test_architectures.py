"""Compressed decoding of every architecture against a full forward pass with the evicted masked, or a refusal."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from transformers import DynamicCache

from l2kv import CompressedCache, CompressionSpec, UnsupportedModelError
from l2kv.layer import CompressedLayer
from tests.support.architectures import ARCHITECTURES, compress
from tests.support.decoding import IN_CHUNKS, ONE_BY_ONE, decode
from tests.support.models import tokens
from tests.support.oracle import attending, replay, target

COMPRESSED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is None]
REFUSED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is not None]


@cache
def built(name):
    """The model, built once."""
    return ARCHITECTURES[name].model()


def evicting_layers(model):
    layers = CompressedCache(model.config, CompressionSpec()).layers
    return [i for i, layer in enumerate(layers) if isinstance(layer, CompressedLayer)]


def masked_forward(model, ids, chunks, spec):
    """Logits [1, T, V] and kept[layer][kv head] -> positions: `tests.support.oracle.masked_forward` of one row, for
    attention with a soft cap (Gemma 2), with sinks (gpt-oss), and with windows, where nothing is evicted and all that
    is further away is hidden.
    """
    evicting, kept, keys_of = evicting_layers(model), {}, {}

    def attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **_):
        kv_heads, total, width = key.shape[1:]
        group = query.shape[1] // kv_heads
        width_scaling = width**-0.5 if scaling is None else scaling
        scores = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2) * width_scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        odds = scores[0].exp().unflatten(0, (kv_heads, group))  # [Hkv, G, T, T]
        sinks = torch.zeros(kv_heads, group) if s_aux is None else s_aux.exp().view(kv_heads, group)
        distance = torch.arange(total)[:, None] - torch.arange(total)
        seen = [(distance >= 0) & (distance < (sliding_window or total))] * kv_heads
        layer = next((i for i, keys in keys_of.items() if torch.equal(keys, key)), module.layer_idx)  # it may borrow
        keys_of[layer] = key
        if layer in evicting:
            assert sliding_window is None
            ranked = (-key[0].pow(2).sum(-1).sqrt()).tolist()
            if spec.policy == "accumulated":
                ranked = [received(odds[h], sinks[h]) for h in range(kv_heads)]
            replayed = [replay(ranked[h], chunks, keep_ratio=target(spec, layer, h)[0]) for h in range(kv_heads)]
            seen = [torch.tensor(visible) for visible, _ in replayed]
            kept[layer] = [held for _, held in replayed]
        odds = odds * torch.stack(seen)[:, None]
        weights = odds / (odds.sum(-1, keepdim=True) + sinks[..., None, None])
        return (weights @ value[0, :, None]).flatten(0, 1).transpose(0, 1)[None], None

    with attending(model, attention), torch.no_grad():
        return model(ids, use_cache=False).logits, kept


def received(odds, sinks):
    """Scores for `replay`: the attention that each token held has got so far from the queries [G, T, T] of one head."""
    total, start = torch.zeros(odds.shape[-1]), 0

    def scores(held, seen):
        nonlocal start
        for query in range(start, seen):  # what is held now is what they saw, but for those to come
            keys = [p for p in held if p <= query]
            total[keys] += (odds[:, query, keys] / (odds[:, query, keys].sum(-1) + sinks)[:, None]).sum(0)
        start = seen
        return total.tolist()

    return scores


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
