"""Formats of stored vectors: what is lost, in how many bytes, and layers that hold pairs in them."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2kv import CompressionSpec, SpecError
from l2kv.attention import attend
from l2kv.layer import CompressedLayer
from l2kv.storage.formats import Format, fitted, weightiest_channels
from tests.support.architecture_oracle import by_hand, heaviest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY = {"key_bits": 4, "value_bits": 8, "key_channels": 0.5}


def vectors(n=50, width=9, dtype=torch.float32, seed=0):
    """Random vectors [2, 3, n, width]; in channel 2 they are large, and in channel 4 far from 0."""
    x = torch.randn(2, 3, n, width, generator=torch.Generator().manual_seed(seed))
    x[..., 2] *= 30
    x[..., 4] += 20
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_number_is_off_by_half_a_step_of_its_vector_at_most(bits, dtype):
    x = vectors(dtype=dtype)
    off = (Format(dtype, 9, bits).decode(Format(dtype, 9, bits).encode(x)) - x.float()).abs()
    step = (x.float().amax(-1) - x.float().amin(-1)) / (2**bits - 1)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * 2**bits  # of the step, which is stored so
    assert (off <= step[..., None] * (0.501 + rounding)).all()


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("bits", [8, 4])
def test_vectors_are_rounded_as_by_hand_by_the_range_that_their_channels_had(bits, width):
    x, later = vectors(width=width), vectors(width=width, seed=1)
    form = fitted(Format(torch.float32, width, bits), x, torch.ones(2, 3, 50, dtype=torch.bool))
    for new in (x, later):
        decoded = form.decode(form.encode(new))
        for row in range(2):
            for head in range(3):
                both = torch.cat([x[row, head], new[row, head]])
                expected = by_hand(both, bits, range(50))[50:]
                torch.testing.assert_close(decoded[row, head], expected, atol=1e-4, rtol=0)


def test_a_channel_of_outliers_does_not_coarsen_the_others():
    x = vectors()
    plain = Format(torch.float32, 9, 4)
    evened = fitted(plain, x, torch.ones(2, 3, 50, dtype=torch.bool))
    off = [(form.decode(form.encode(x)) - x).abs()[..., 0].mean() for form in (plain, evened)]
    assert off[0] > 5 * off[1]


@pytest.mark.parametrize("bits,width,expected", [(8, 9, 9 + 8), (4, 8, 4 + 8), (4, 9, 5 + 8), (4, 1, 1 + 8)])
def test_a_row_takes_its_bits_and_two_numbers(bits, width, expected):
    rows = Format(torch.float32, width, bits).encode(vectors(width=9)[..., :width])
    assert rows.dtype == torch.uint8 and rows.shape[-1] == expected


@pytest.mark.parametrize("constant", [0.0, -3.5, 1e30])
def test_a_vector_of_one_number_is_exact(constant):
    x = torch.full((1, 1, 2, 6), constant)
    for bits in (8, 4):
        assert torch.equal(Format(torch.float32, 6, bits).decode(Format(torch.float32, 6, bits).encode(x)), x)


def test_channels_that_did_not_differ_at_first_may_differ_later():
    first, later = torch.ones(1, 1, 3, 6), torch.tensor([[[[1.0, 2, 3, 4, 5, 6]]]])
    form = fitted(Format(torch.float32, 6, 8), first, torch.ones(1, 1, 3, dtype=torch.bool))
    torch.testing.assert_close(form.decode(form.encode(later)), later, atol=0.02, rtol=0)


def test_padding_has_no_say_in_a_format():
    x, of_text = vectors(), torch.ones(2, 3, 50, dtype=torch.bool)
    of_text[1, :, :20] = False
    x[1, :, :20] = 1e4
    form = fitted(Format(torch.float32, 9, 8), x, of_text)
    alone = fitted(Format(torch.float32, 9, 8), x[1:, :, 20:], of_text[1:, :, 20:])
    assert torch.equal(form.centre[1:], alone.centre) and torch.equal(form.reach[1:], alone.reach)
    nothing = fitted(Format(torch.float32, 9, 8), x, torch.zeros_like(of_text))
    assert torch.equal(nothing.centre, torch.zeros_like(nothing.centre)) and (nothing.reach == 1).all()


def test_the_channels_that_stay_are_those_of_the_largest_products_of_queries_and_keys():
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(2, n, 20, 9, generator=generator) * torch.rand(9, generator=generator) for n in (6, 3))
    shown = torch.ones(2, 20, dtype=torch.bool), torch.ones(2, 3, 20, dtype=torch.bool)
    shown[0][1, :7], shown[1][1, :, :7] = False, False  # padding
    chosen = weightiest_channels(queries, keys, shown, 4)
    for row, start in ((0, 0), (1, 7)):
        for head in range(3):
            of_group = queries[row, 2 * head : 2 * head + 2, start:].flatten(0, 1).tolist()
            assert chosen[row, head].tolist() == heaviest(of_group, keys[row, head, start:].tolist(), 4 / 9)


# Layers


def fed(spec, *, n=60, steps=8, dtype=torch.float32, width=16):
    """A layer after a prompt and some tokens, and the generator of what came."""
    layer, generator = CompressedLayer(spec, 0), torch.Generator().manual_seed(0)
    for q in (n, *[1] * steps):
        keys, values, query = (torch.randn(2, h, q, width, generator=generator).to(dtype) for h in (3, 3, 6))
        layer.update(keys, values)
        layer.evict(query, {})
    return layer, generator


@pytest.mark.parametrize("form", [{"key_bits": 8}, {"value_bits": 4}, {"key_channels": 0.3}, EVERY], ids=str)
@pytest.mark.parametrize("shares", [{"keep_ratio": 0.5}, {"head_ratios": {(0, 1): 0.2}}], ids=str)
def test_bytes_are_those_of_the_tensors_that_are_there(form, shares):
    spec = CompressionSpec(protect_last=5, **shares, **form)
    layer, _ = fed(spec)
    tensors = {
        id(x): x
        for part in layer.parts()
        for of_format in part.formats
        for x in (*part.rows, *part.latest, *of_format.shared)
        if x is not None
    }
    assert layer.used_nbytes == sum(x.nbytes for x in tensors.values())
    assert layer.nbytes <= layer.used_nbytes * 1.5  # slack
    plain, _ = fed(replace(spec, key_bits=None, value_bits=None, key_channels=1.0))
    assert layer.used_nbytes < plain.used_nbytes


@pytest.mark.parametrize("policy", ["low_norm", "keydiff", "accumulated", "window", "q_hitter"])
@pytest.mark.parametrize("shares", [{"keep_ratio": 0.5}, {"head_ratios": {(0, 1): 0.2}, "evict_every": 3}], ids=str)
@pytest.mark.parametrize("last", [0, 5])
def test_the_latest_are_there_as_they_came(policy, shares, last):
    spec = CompressionSpec(protect_last=last, policy=policy, **shares, **EVERY)
    layer, generator = fed(spec)
    came = torch.randn(2, 3, 7, 16, generator=generator), torch.randn(2, 3, 7, 16, generator=generator)
    query = torch.randn(2, 6, 7, 16, generator=generator)
    layer.update(*came)
    layer.evict(query, {})
    for part in layer.parts():
        for had, held in zip(came, part.latest, strict=True):
            assert torch.equal(held, had[:, list(part.heads), 7 - last :])
        assert held.untyped_storage().nbytes() <= max(1, last) * 2 * 3 * 16 * 4


def test_rows_of_a_batch_may_change_places():
    layer, generator = fed(CompressionSpec(keep_ratio=0.5, protect_last=3, **EVERY))
    other = copy.deepcopy(layer)
    other.reorder_cache(torch.tensor([1, 0]))
    keys, values, query = (torch.randn(2, h, 1, 16, generator=generator) for h in (3, 3, 6))
    for one, order in ((layer, [0, 1]), (other, [1, 0])):
        one.update(keys[order], values[order])
    outputs = [
        attend(one, ALL_ATTENTION_FUNCTIONS["sdpa"], torch.nn.Module(), query[order], None, {})[0][order]
        for one, order in ((layer, [0, 1]), (other, [1, 0]))
    ]
    torch.testing.assert_close(*outputs)


def largest_allocation(work):
    """Bytes of the largest tensor that is made while `work()` runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    return max(event.cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("shares", [{"keep_ratio": 0.9}, {"head_ratios": {(0, 1): 0.8}, "keep_ratio": 0.9}], ids=str)
def test_keys_of_few_channels_are_never_widened(shares, monkeypatch):
    """A step over narrow keys and values in 4 bits makes no tensor of half the size of a part's full-width keys."""
    monkeypatch.setattr("l2kv.probabilities._CAST", 2 * 3 * 40 * 200)
    spec = CompressionSpec(protect_last=4, key_channels=0.25, value_bits=4, **shares)
    layer, generator = fed(spec, n=4000, steps=1, width=64)
    keys, values, query = (torch.randn(2, h, 1, 64, generator=generator) for h in (3, 3, 6))

    def step():
        layer.update(keys, values)
        attend(layer, ALL_ATTENTION_FUNCTIONS["sdpa"], torch.nn.Module(), query, None, {})
        layer.evict(query, {})

    step()  # the first after the prompt moves to buffers with slack
    full_width = 2 * len(layer.parts()[0].heads) * layer.held * 64 * 4
    assert largest_allocation(step) < full_width / 2


def test_values_in_few_bits_are_decoded_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr("l2kv.probabilities._CAST", 2 * 3 * 40 * 200)
    layer, generator = fed(CompressionSpec(keep_ratio=1.0, key_bits=4, value_bits=4), n=4000, steps=1, width=64)
    query = torch.randn(2, 6, 1, 64, generator=generator)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    largest = largest_allocation(lambda: attend(layer, sdpa, torch.nn.Module(), query, None, {}))
    assert largest < 2 * 3 * layer.held * 64 * 4 / 4


@pytest.mark.parametrize(
    "field,value", [("key_bits", 2), ("value_bits", 16), ("key_bits", True), ("key_channels", 0.0), ("key_channels", 2)]
)
def test_a_format_that_there_is_not_is_refused_by_name_and_value(field, value):
    with pytest.raises(SpecError, match=field):
        CompressionSpec(**{field: value})
