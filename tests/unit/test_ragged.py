"""Heads that hold different numbers of pairs: their pages, and attention to all of them in one call."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2kv import CompressionSpec
from l2kv.attention import _head_by_head, _Heads, attend
from l2kv.layer import CompressedLayer

HEADS = 4
RATIOS = (0.0, 0.07, 0.5, 1.0)


def ragged(n, *, batch=1, width=8, dtype=torch.float32, seed=0, **options):
    """A layer after a prompt of n tokens, and what draws more of them: (layer, more(q) -> keys, values)."""
    generator = torch.Generator().manual_seed(seed)

    def more(q):
        return (torch.randn(batch, HEADS, q, width, generator=generator).to(dtype) for _ in range(2))

    spec = CompressionSpec(head_ratios={(0, head): ratio for head, ratio in enumerate(RATIOS)}, **options)
    layer = CompressedLayer(spec, 0)
    decode(layer, more(n))
    return layer, more


def decode(layer, pairs, query=None, scale=None):
    """One step of a model: append, attend, evict."""
    layer.update(*pairs)
    output = None
    if query is not None:
        options = {} if scale is None else {"scaling": scale}
        output, _ = attend(layer, ALL_ATTENTION_FUNCTIONS["sdpa"], None, query, None, options)
    layer.evict(query, {})
    return output


def slowly(layer, query, scale):
    """Softmax attention in float64, head by head and row by row: [B, 1, H, D]."""
    held = {head: (part.keys[:, i], part.values[:, i]) for part in layer.parts() for i, head in enumerate(part.heads)}
    rows = []
    for row in range(query.shape[0]):
        outputs = []
        for i in range(query.shape[1]):
            keys, values = (x[row].double() for x in held[i * HEADS // query.shape[1]])
            scores = (keys @ query[row, i, 0].double()) * scale
            weights = (scores - scores.max()).exp()
            outputs.append((weights[:, None] * values).sum(0) / weights.sum())
        rows.append(torch.stack(outputs))
    return torch.stack(rows)[:, None]


@pytest.mark.parametrize("dtype,off", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(
    "n,batch,group,every", [(3, 1, 1, 1), (40, 3, 2, 1), (40, 1, 1, 5), (700, 1, 3, 1), (3000, 2, 1, 4)]
)
def test_one_call_over_all_pages_is_each_heads_own_attention(n, batch, group, every, dtype, off):
    layer, more = ragged(n, batch=batch, dtype=dtype, evict_every=every)
    generator = torch.Generator().manual_seed(1)
    for scale in (None, 0.2, 3.0) * 4:  # 3: scores so far apart that parts of the sum differ by e^30
        query = torch.randn(batch, HEADS * group, 1, 8, generator=generator).to(dtype)
        before = copy.deepcopy(layer)
        pairs = list(more(1))
        got = decode(layer, pairs, query, scale)
        before.update(*pairs)
        assert layer.ragged and got.shape == (batch, 1, HEADS * group, 8) and got.dtype == dtype
        expected = slowly(before, query, 1 / math.sqrt(8) if scale is None else scale)
        assert (got.double() - expected).abs().max() < off


@pytest.mark.parametrize("every", [1, 4])
def test_what_a_gpu_runs_instead_gives_the_same(every, monkeypatch):
    # Selections by torch instead of numpy, attention head by head: run here, as a machine without a GPU never would.
    original, more = ragged(300, batch=2, evict_every=every)
    even = CompressedLayer(CompressionSpec(keep_ratio=0.3, evict_every=every), 0)
    decode(even, more(300))
    other, other_even = copy.deepcopy(original), copy.deepcopy(even)
    query = torch.randn(2, HEADS, 1, 8, generator=torch.Generator().manual_seed(1))
    steps = [list(more(q)) for q in (1, 1, 1, 7, 1, 1, 1, 1, 300, 1)]
    queries = [query if pairs[0].shape[2] == 1 else None for pairs in steps]
    expected = [decode(original, *step) for step in zip(steps, queries, strict=True)]
    for pairs in steps:
        decode(even, pairs)
    for module in ("base", "paged"):
        monkeypatch.setattr(f"l2kv.storage.{module}.host", lambda ranks: ranks)
    monkeypatch.setattr(
        "l2kv.attention._of_pages", lambda query, _, scale: _head_by_head(query, other.parts(), scale, 0.0)
    )
    for pairs, of_step, wanted in zip(steps, queries, expected, strict=True):
        got = decode(other, pairs, of_step)
        assert got is wanted is None or (got - wanted).abs().max() < 1e-6
        decode(other_even, pairs)
    for one, same in ((original, other), (even, other_even)):
        assert [held.tolist() for held in one.kept_positions()] == [held.tolist() for held in same.kept_positions()]


def test_a_copy_of_a_layer_attends_to_its_own_pairs():
    layer, more = ragged(300)
    query = torch.randn(1, HEADS, 1, 8, generator=torch.Generator().manual_seed(1))
    decode(layer, more(1), query)  # so that there are pages
    twin = copy.deepcopy(layer)
    pairs = list(more(1))
    for _ in range(5):
        decode(twin, more(1), query)
    before = copy.deepcopy(layer)
    got = decode(layer, pairs, query)
    before.update(*pairs)
    assert (got.double() - slowly(before, query, 1 / math.sqrt(8))).abs().max() < 1e-6


def test_pages_pass_between_the_modes_of_autograd():
    layer, more = ragged(300)
    query = torch.randn(1, HEADS, 1, 8, generator=torch.Generator().manual_seed(1))
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad) * 2:
        before, pairs = copy.deepcopy(layer), list(more(1))
        with mode():
            got = decode(layer, pairs, query)
        before.update(*pairs)
        assert (got.double() - slowly(before, query, 1 / math.sqrt(8))).abs().max() < 1e-6


@pytest.mark.parametrize("n", [20, 400, 4000])
def test_a_page_or_so_a_head_is_all_that_is_held_beyond_the_pairs(n):
    layer, more = ragged(n)
    query = torch.randn(1, HEADS, 1, 8)
    for _ in range(40):
        decode(layer, more(1), query)
        held = sum(layer.held_by_head)
        page = layer.pages.keys.shape[2]
        assert page <= max(16, held / HEADS / 4)
        slots = layer.nbytes / (2 * 8 * 4)
        assert held <= slots <= held * 65 / 64 + HEADS * (page + 1)


def test_tokens_are_written_in_place_most_of_the_time():
    layer, more = ragged(1000)
    query, tables = torch.randn(1, HEADS, 1, 8), []
    for _ in range(100):
        decode(layer, more(1), query)
        tables.append(layer.pages.keys.data_ptr())
    assert sum(a != b for a, b in itertools.pairwise(tables)) <= 3


def test_two_heads_far_apart_in_their_scores_do_not_drown_each_other():
    # Near +300 and near -300: what is subtracted before the exponential must be the head's own.
    layer, more = ragged(500)
    keys, values = more(1)
    query = torch.zeros(1, HEADS, 1, 8)
    query[..., 0] = 1.0
    for part in layer.parts():
        part.keys[..., 0] = 300.0 if part.heads == (3,) else -300.0
    before = copy.deepcopy(layer)
    got = decode(layer, (keys, values), query, 1.0)
    before.update(keys, values)
    assert (got.double() - slowly(before, query, 1.0)).abs().max() < 1e-5


def test_the_rows_of_a_batch_may_change_between_tokens():
    layer, more = ragged(300, batch=2)
    query = torch.randn(2, HEADS, 1, 8, generator=torch.Generator().manual_seed(1))
    decode(layer, more(1), query)
    layer.reorder_cache(torch.tensor([1, 0]))
    before, pairs = copy.deepcopy(layer), list(more(1))
    got = decode(layer, pairs, query)
    before.update(*pairs)
    assert (got.double() - slowly(before, query, 1 / math.sqrt(8))).abs().max() < 1e-6


def test_what_the_one_call_cannot_do_is_done_head_by_head():
    query = torch.randn(1, HEADS, 1, 8, generator=torch.Generator().manual_seed(1))
    for dtype, autocast in ((torch.float64, False), (torch.float32, True)):
        layer, more = ragged(60, dtype=dtype)
        for _ in range(3):
            before, pairs = copy.deepcopy(layer), list(more(1))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = decode(layer, [x.to(torch.bfloat16) for x in pairs] if autocast else pairs, query.to(dtype))
            before.update(*pairs)
            expected = slowly(before, query, 1 / math.sqrt(8))
            assert (got.double() - expected).abs().max() < (2e-2 if autocast else 1e-12)


def test_values_may_be_wider_than_keys():
    layer = CompressedLayer(CompressionSpec(head_ratios={(0, 0): 0.1}), 0)
    layer.update(torch.randn(1, HEADS, 60, 8), torch.randn(1, HEADS, 60, 16))
    layer.evict_now()
    layer.update(torch.randn(1, HEADS, 1, 8), torch.randn(1, HEADS, 1, 16))
    query = torch.randn(1, HEADS, 1, 8)
    got, _ = attend(layer, ALL_ATTENTION_FUNCTIONS["sdpa"], None, query, None, {})
    assert (got.double() - slowly(layer, query, 1 / math.sqrt(8))).abs().max() < 1e-6


@pytest.mark.parametrize("prompt", [8, 600])
def test_what_was_evicted_cannot_poison_those_who_stay(prompt):
    # Values that overflowed, evicted at once: their slots are empty now, and 0 times infinity is no number.
    layer = CompressedLayer(CompressionSpec(keep_ratio=0.5, head_ratios={(0, 0): 0.4, (0, 1): 0.3}), 0)
    generator = torch.Generator().manual_seed(0)
    for q in (prompt, 8, *[1] * 8):
        keys, values, query = (torch.randn(1, HEADS, q, 8, generator=generator) for _ in range(3))
        if q == 8:
            keys[:, :, :4], values[:, :, :4] = 100.0, torch.inf
        layer.update(keys, values)
        if q == 1:
            got, _ = attend(layer, ALL_ATTENTION_FUNCTIONS["sdpa"], None, query, None, {})
            assert got.isfinite().all()
        layer.evict(query, {})


def test_an_attention_layer_may_have_no_sinks_where_others_have():
    module = SimpleNamespace(sinks=None, layer_idx=3)
    assert _Heads(module, (0,), 2).sinks is None and _Heads(module, (0,), 2).layer_idx == 3
    module.sinks = torch.arange(6.0)
    assert _Heads(module, (1,), 2).sinks.tolist() == [3, 4, 5]
