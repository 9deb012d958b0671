"""The kernels of a decoding step, in Triton's interpreter, against a slow loop and against decoding without them."""

import math

import pytest
import torch

from l2kv import CompressedCache, CompressionSpec, compressible
from l2kv.decoding import decode_one_token, prefill
from l2kv.graphed import DecodingGraph
from l2kv.hooks import attention_hook
from l2kv.kernels import ragged
from l2kv.storage.base import Table

ROOMS = (40, 200, 64, 300)
HELD = (3, 190, 64, 257)


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; tests/gpu runs the kernels")
    monkeypatch.setenv("L2KV_KERNELS", "triton")


def slowly(query, pairs, scale, softcap, sinks):
    """Softmax attention in float64, one query at a time."""
    rows = []
    for row, of_row in enumerate(query.double()):
        for head, one in enumerate(of_row):
            keys, values = (x[row].double() for x in pairs[head * len(pairs) // len(of_row)])
            scores = [sum(a * b for a, b in zip(key, one, strict=True)) * scale for key in keys.tolist()]
            if softcap:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            weights = [math.exp(score) for score in scores]
            total = sum(weights) + (math.exp(sinks[head]) if sinks is not None else 0.0)
            rows.append(sum(w * value for w, value in zip(weights, values, strict=True)) / total)
    return torch.stack(rows).view(*query.shape[:2], -1)


@pytest.mark.parametrize("softcap,with_sinks", [(None, False), (2.0, True)])
@pytest.mark.parametrize("group,width", [(1, 16), (3, 24)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype,off", [(torch.float32, 1e-5), (torch.float16, 3e-3)])
def test_heads_that_hold_different_numbers_get_their_own_softmax(dtype, off, shared, group, width, softcap, with_sinks):
    torch.manual_seed(0)
    rooms = ROOMS if shared else (max(ROOMS),) * len(ROOMS)
    keys, values = ([torch.randn(2, room, width).to(dtype) for room in rooms] for _ in range(2))
    table = Table(*((torch.cat(x, 1)[:, None] if shared else torch.stack(x, 1)) for x in (keys, values)), None, rooms)
    query = torch.randn(2, 4 * group, width).to(dtype)
    sinks = torch.randn(4 * group) if with_sinks else None
    held = torch.tensor(HELD, dtype=torch.int32)
    got = ragged.attend(
        query, table, held, ragged.divide(table, 128), scale=0.3, softcap=softcap, sinks=sinks
    )  # chunks of 128: some heads have several, the last of them partly filled
    pairs = [(k[:, :n], v[:, :n]) for k, v, n in zip(keys, values, HELD, strict=True)]
    assert (got.double() - slowly(query, pairs, 0.3, softcap, sinks)).abs().max() < off


PLAN = CompressionSpec(head_ratios={(0, 0): 0.2, (0, 1): 0.9, (1, 0): 0.5}, keep_ratio=0.4, protect_last=4)
SPECS = {
    "uniform": CompressionSpec(keep_ratio=0.5),
    "ends": CompressionSpec(keep_ratio=0.3, protect_first=2, protect_last=8, policy="high_norm"),
    "skipped": CompressionSpec(keep_ratio=0.5, skip_layers=(0,)),
    "budget": CompressionSpec(budget=20, policy="random", seed=3),
    "seldom": CompressionSpec(keep_ratio=0.5, evict_every=3),
    "later": CompressionSpec(keep_ratio=0.25, prune_after=44),
    "whole": CompressionSpec(keep_ratio=1.0),
    "plan": PLAN,
}


def held_and_tokens(model, spec, steps, decode):
    torch.manual_seed(1)
    cache = CompressedCache(model.config, spec)
    with compressible(model), torch.inference_mode():
        ids = torch.randint(3, model.config.vocab_size, (2, 41))
        prefill(model, ids[:, :-1], cache)
        tokens = decode(cache, ids[:, -1:], steps)
    return cache, tokens


def plainly(model):
    def decode(cache, token, steps):
        tokens = []
        for _ in range(steps):
            token = decode_one_token(model, token, cache)
            tokens.append(token)
        return torch.cat(tokens, dim=1)

    return decode


def by_graph(model):
    def decode(cache, token, steps):
        tokens = []
        with DecodingGraph(model, cache, steps=steps + 2) as graph:
            for _ in range(steps):
                token = graph.step(token)
                tokens.append(token)
        return torch.cat(tokens, dim=1)

    return decode


@pytest.mark.parametrize("name", SPECS)
def test_a_graph_decodes_and_evicts_as_a_cache_does_by_itself(models, name, monkeypatch):
    model, steps = models("llama"), 9
    got, its_tokens = held_and_tokens(model, SPECS[name], steps, by_graph(model))
    monkeypatch.setenv("L2KV_KERNELS", "torch")
    expected, tokens = held_and_tokens(model, SPECS[name], steps, plainly(model))
    assert torch.equal(its_tokens, tokens)
    assert got.held_by_head == expected.held_by_head and got.get_seq_length() == expected.get_seq_length()
    for layer in range(len(expected.layers)):
        pairs = zip(got.kept_positions(layer), expected.kept_positions(layer), strict=True)
        assert all(torch.equal(of_graph, of_cache) for of_graph, of_cache in pairs)
    with compressible(model), torch.inference_mode():  # and goes on as if nothing had been
        assert torch.equal(*(plainly(model)(cache, tokens[:, -1:], 5) for cache in (got, expected)))
    assert got.held_by_head == expected.held_by_head


def test_a_graph_refuses_what_it_cannot_record(models):
    model = models("llama")
    with compressible(model), torch.inference_mode():
        cache = CompressedCache(model.config, CompressionSpec(policy="keydiff"))
        with pytest.raises(ValueError, match="it is empty"):
            DecodingGraph(model, cache, steps=3)
        prefill(model, torch.arange(3, 30)[None], cache)
        with pytest.raises(ValueError, match="keydiff ranks pairs by more"):
            DecodingGraph(model, cache, steps=3)


def test_a_graph_that_takes_no_step_leaves_the_cache_as_it_was(models):
    model = models("llama")
    caches = [CompressedCache(model.config, PLAN) for _ in range(2)]
    with compressible(model), torch.inference_mode():
        for cache in caches:
            prefill(model, torch.arange(3, 60)[None], cache)
        with DecodingGraph(model, caches[0], steps=7):
            pass
        assert torch.equal(*(plainly(model)(cache, torch.tensor([[5]]), 4) for cache in caches))
    assert caches[0].held_by_head == caches[1].held_by_head


def test_a_kernel_does_not_pass_over_another_hook(models):
    """One that is put around a prepared model sees every call, as without kernels."""
    model, calls = models("llama"), []

    def count(inner, module, query, *others, **options):
        calls.append(query.shape[2])
        return inner(module, query, *others, **options)

    cache = CompressedCache(model.config, CompressionSpec())
    with torch.inference_mode(), attention_hook(model, count), compressible(model):
        prefill(model, torch.arange(3, 30)[None], cache)
        decode_one_token(model, torch.tensor([[5]]), cache)
    assert calls == [27] * len(cache.layers) + [1] * len(cache.layers)


def test_a_graph_takes_no_more_steps_than_it_has_room_for(models):
    model = models("llama")
    with compressible(model), torch.inference_mode():
        cache = CompressedCache(model.config, CompressionSpec())
        prefill(model, torch.arange(3, 30)[None], cache)
        with DecodingGraph(model, cache, steps=1) as graph:
            token = graph.step(torch.tensor([[5]]))
            with pytest.raises(ValueError, match="made for 1 steps"):
                graph.step(token)


def test_a_graph_is_refused_where_kernels_are_off(models, monkeypatch):
    model = models("llama")
    monkeypatch.setenv("L2KV_KERNELS", "torch")
    with compressible(model), torch.inference_mode():
        cache = CompressedCache(model.config, CompressionSpec())
        prefill(model, torch.arange(3, 30)[None], cache)
        with pytest.raises(RuntimeError, match="kernels, which are off for the device cpu"):
            DecodingGraph(model, cache, steps=1)
