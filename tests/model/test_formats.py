"""Decoding over pairs of fewer bits and channels, against a masked full forward whose pairs are rounded by hand."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer

from l2kv import CacheShape, CompressedCache, CompressionSpec, SpecError, compressible, l2_compress
from l2kv.cache import cache_nbytes
from l2kv.together import CachesTogether
from tests.support.architecture_oracle import by_hand, evicting_layers, masked_forward
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


def assert_close_but_for_ties(logits, expected):
    """A number half way between two levels may fall either way, and then a few logits are off by a little."""
    off = (logits - expected).abs()
    assert off.max() < 1e-2 and (off > 2e-4).float().mean() < 0.2


def assert_decoding_is_the_full_forward_over_rounded_pairs(model, spec, chunks):
    ids, compressed = tokens(model, sum(chunks)), CompressedCache(model.config, spec)
    logits = decode(model, ids, chunks, compressed)
    expected, kept = masked_forward(model, ids, chunks, spec)
    assert {i: [head[0].tolist() for head in compressed.kept_positions(i)] for i in evicting_layers(model)} == kept
    assert_close_but_for_ties(logits, expected)


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


def test_a_skipped_layer_stores_all_in_full():
    model = built("Llama")
    spec = CompressionSpec(keep_ratio=0.5, skip_layers=(1,), **ALL_AT_ONCE)
    assert_decoding_is_the_full_forward_over_rounded_pairs(model, spec, IN_CHUNKS)


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


# The other duties of a cache


def test_bytes_are_those_that_the_shape_foretells(tiny):
    for options in ({"keep_ratio": 0.5}, {"head_ratios": {(0, 1): 0.2, (2, 0): 0.9}}, {"skip_layers": (1,)}):
        for form in FORMATS.values():
            spec = CompressionSpec(**options, **form)
            cache, shape = CompressedCache(tiny.config, spec), CacheShape.of(tiny.config, itemsize=4)
            decode(tiny, tokens(tiny, 40), [40], cache)
            assert cache_nbytes(cache, slack=False) == shape.nbytes(40, spec)


@pytest.mark.parametrize("form", FORMATS)
def test_rows_go_on_as_if_they_were_alone(tiny, form):
    spec = CompressionSpec(budget=9, **FORMATS[form])
    ids = torch.cat([tokens(tiny, 30, seed=seed) for seed in (1, 2)])
    together = CompressedCache(tiny.config, spec)
    logits = decode(tiny, ids, [24, 1, 1, 3, 1], together)
    for row in range(2):
        alone = decode(tiny, ids[row : row + 1], [24, 1, 1, 3, 1], CompressedCache(tiny.config, spec))
        assert_close_but_for_ties(logits[row : row + 1], alone)


@pytest.mark.parametrize("form", FORMATS)
def test_a_padded_row_goes_on_as_if_it_were_alone(tiny, form):
    spec, ids, padding = CompressionSpec(budget=9, **FORMATS[form]), tokens(tiny, 30, seed=1), 8
    padded = torch.cat([torch.full((1, padding), 1), ids], dim=1)
    longer = torch.cat([padded, tokens(tiny, 30 + padding, seed=2)])
    mask = torch.ones_like(longer)
    mask[0, :padding] = 0
    cache, start, logits = CompressedCache(tiny.config, spec), 0, []
    position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with compressible(tiny), torch.no_grad():
        for chunk in (24 + padding, 1, 1, 3, 1):
            new, start = slice(start, start + chunk), start + chunk
            logits.append(
                tiny(
                    longer[:, new],
                    attention_mask=mask[:, :start],
                    position_ids=position_ids[:, new],
                    past_key_values=cache,
                ).logits
            )
    alone = decode(tiny, ids, [24, 1, 1, 3, 1], CompressedCache(tiny.config, spec))
    assert_close_but_for_ties(torch.cat(logits, dim=1)[:1, padding:], alone)


def test_beams_are_reordered_with_their_formats(tiny):
    ids, spec = tokens(tiny, 16), CompressionSpec(keep_ratio=0.5, **ALL_AT_ONCE)
    with compressible(tiny):
        out = tiny.generate(
            ids,
            past_key_values=CompressedCache(tiny.config, spec),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=8,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        logits, _ = masked_forward(tiny, sequence[None, :-1], (16, *[1] * 7), spec)
        alone = logits[0, 15:].log_softmax(-1).gather(1, sequence[16:, None]).sum()
        assert score.item() == pytest.approx(alone.item(), abs=1e-2)


def test_chunked_prefill_of_generate_is_decoding_in_chunks(tiny):
    ids, spec = tokens(tiny, 20), CompressionSpec(keep_ratio=0.4, **ALL_AT_ONCE)
    with compressible(tiny):
        cache = CompressedCache(tiny.config, spec)
        out = tiny.generate(ids, past_key_values=cache, prefill_chunk_size=7, max_new_tokens=4, do_sample=False)
    expected, _ = masked_forward(tiny, out, (7, 7, 6, 1, 1, 1, 1), spec)
    assert out[0, 20:].tolist() == expected[0, 19:-1].argmax(-1).tolist()


@pytest.mark.parametrize("decode_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("prefill_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_cache_passes_between_the_modes_of_autograd(tiny, prefill_mode, decode_mode):
    ids, cache = tokens(tiny, 24), CompressedCache(tiny.config, CompressionSpec(keep_ratio=0.6, **ALL_AT_ONCE))
    with compressible(tiny):
        with prefill_mode():
            tiny(ids[:, :20], past_key_values=cache)
        with decode_mode():
            for i in range(20, 24):
                logits = tiny(ids[:, i : i + 1], past_key_values=cache).logits
    expected, _ = masked_forward(tiny, ids, (20, 1, 1, 1, 1), cache.spec)
    assert_close_but_for_ties(logits[:, -1].detach(), expected[:, -1])
    copy.deepcopy(cache)  # refused where a tensor has a history


@pytest.mark.parametrize("options", [{}, {"skip_layers": (0,)}, {"head_ratios": {(1, 1): 0.2}}], ids=str)
def test_a_cache_from_a_full_one_is_as_if_the_prompt_had_been_run_into_it(tiny, options):
    spec, ids = CompressionSpec(keep_ratio=0.4, key_bits=8, value_bits=4, protect_last=3, **options), tokens(tiny, 40)
    full, live = DynamicCache(config=tiny.config), CompressedCache(tiny.config, spec)
    with torch.no_grad(), compressible(tiny):
        tiny(ids[:, :20], past_key_values=full)
        tiny(ids[:, :20], past_key_values=live)
        made = CompressedCache.from_full(full, tiny.config, spec)
        assert made.nbytes <= live.nbytes
        for step in range(20, 40):
            one, other = (tiny(ids[:, step : step + 1], past_key_values=cache).logits for cache in (made, live))
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("policy", ["low_norm", "accumulated", "window"])
def test_one_pass_over_a_prompt_records_the_queries_that_channels_go_by(tiny, policy):
    spec, ids = CompressionSpec(keep_ratio=0.4, policy=policy, **ALL_AT_ONCE), tokens(tiny, 40)
    full, live = CompressedCache.recording(tiny.config, [spec]), CompressedCache(tiny.config, spec)
    with torch.no_grad(), compressible(tiny):
        tiny(ids[:, :36], past_key_values=full)
        tiny(ids[:, :36], past_key_values=live)
        made = CompressedCache.from_full(full, tiny.config, spec)
        for step in range(36, 40):
            one, other = (tiny(ids[:, step : step + 1], past_key_values=cache).logits for cache in (made, live))
            torch.testing.assert_close(one, other)


def test_caches_of_several_formats_run_as_one_batch(tiny):
    specs = [CompressionSpec(keep_ratio=0.5, **form) for form in FORMATS.values()]
    ids, alone, together = tokens(tiny, 30), [], []
    for spec in specs:
        together.append(CompressedCache(tiny.config, spec))
        decode(tiny, ids[:, :20], [20], together[-1])
        alone.append(decode(tiny, ids, [20, 1, 4, *[1] * 5], CompressedCache(tiny.config, spec))[:, 20:])
    joint = CachesTogether(together, [1] * len(specs))
    logits = decode(tiny, ids[:, 20:].expand(len(specs), -1), [1, 4, *[1] * 5], joint)
    assert_close_but_for_ties(logits, torch.cat(alone))


def test_what_a_full_or_a_rounded_cache_cannot_give_is_refused(tiny):
    full = DynamicCache(config=tiny.config)
    with pytest.raises(SpecError, match=r"key_channels of 0\.6 needs more than a cache: run the prompt"):
        CompressedCache.from_full(full, tiny.config, CompressionSpec(key_channels=0.6))
    cache = CompressedCache(tiny.config, CompressionSpec(keep_ratio=1.0, key_bits=8))
    decode(tiny, tokens(tiny, 20), [20], cache)
    with pytest.raises(TypeError, match="Compress the full cache"):
        l2_compress(cache, keep_ratio=0.5)


class RoundedByHand(QuantizedLayer):
    """transformers' quantised layer, whose pairs are rounded by hand when they come, and a second time as they are."""

    def __init__(self, bits):
        super().__init__(nbits=bits, axis_key=0, axis_value=0, residual_length=0)

    def _quantize(self, tensor, axis):
        heads = tensor.flatten(0, 1)
        return torch.stack([by_hand(vectors, self.nbits) for vectors in heads]).view_as(tensor)

    def _dequantize(self, rounded):
        return rounded


def test_transformers_own_quantised_cache_gives_the_same_where_values_alone_are_rounded(tiny):
    """Its keys stay as they are here; a token is rounded once it has been attended to, as ours are."""
    ids, spec = tokens(tiny, 30), CompressionSpec(keep_ratio=1.0, value_bits=8)

    class ValuesAlone(RoundedByHand):
        def _quantize(self, tensor, axis):
            return tensor if axis == "keys" else super()._quantize(tensor, axis)

    layers = []
    for _ in range(tiny.config.num_hidden_layers):
        layers.append(ValuesAlone(8))
        layers[-1].axis_key = "keys"
    theirs, start, logits = Cache(layers=layers), 0, []
    with torch.no_grad():
        for chunk in (20, *[1] * 10):
            logits.append(tiny(ids[:, start : start + chunk], past_key_values=theirs).logits)
            start += chunk
    ours = decode(tiny, ids, (20, *[1] * 10), CompressedCache(tiny.config, spec))
    assert_close_but_for_ties(ours, torch.cat(logits, dim=1))
    plain = decode(tiny, ids, (20, *[1] * 10), CompressedCache(tiny.config, CompressionSpec(keep_ratio=1.0)))
    assert (ours - plain).abs().max() > 0.03
