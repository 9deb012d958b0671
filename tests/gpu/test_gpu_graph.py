"""Kernels and recorded steps on a GPU, against the torch code on the same GPU."""

import pytest
import torch

from l2kv import CompressedCache, CompressionSpec, compressible
from l2kv.decoding import decode_one_token, prefill
from l2kv.graphed import DecodingGraph
from l2kv.heads import numbers_on
from l2kv.kernels import ragged
from l2kv.storage.base import Table
from tests.support.models import build

STEPS = 12
SPECS = {
    "uniform": CompressionSpec(keep_ratio=0.5),
    "ends": CompressionSpec(keep_ratio=0.3, protect_first=2, protect_last=8, policy="high_norm"),
    "random": CompressionSpec(keep_ratio=0.4, policy="random", seed=3),
    "signed": CompressionSpec(keep_ratio=0.4, policy="signed_norm", directions=(("low", "high"),) * 3),
    "streaming": CompressionSpec(keep_ratio=0.4, policy="streaming"),
    "skipped": CompressionSpec(keep_ratio=0.5, skip_layers=(0,)),
    "seldom": CompressionSpec(keep_ratio=0.5, evict_every=3),
    "whole": CompressionSpec(keep_ratio=1.0),
    "plan": CompressionSpec(keep_ratio=0.4, head_ratios={(0, 0): 0.2, (0, 1): 0.9}, protect_last=4),
}


@pytest.mark.parametrize("dtype,off", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("group,width", [(4, 128), (3, 64), (1, 80)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_kernel_is_each_heads_own_softmax(cuda, shared, group, width, dtype, off):
    torch.manual_seed(0)
    rooms = (4000, 70, 1300, 2500) if shared else (4000,) * 4
    held = (3999, 1, 700, 2500)
    keys, values = ([torch.randn(2, room, width, device=cuda, dtype=dtype) for room in rooms] for _ in range(2))
    table = Table(*((torch.cat(x, 1)[:, None] if shared else torch.stack(x, 1)) for x in (keys, values)), None, rooms)
    query = torch.randn(2, 4 * group, width, device=cuda, dtype=dtype)
    got = ragged.attend(query, table, numbers_on(cuda, held), ragged.divide(table), scale=width**-0.5)
    for head, n in enumerate(held):
        of_head = query[:, head * group : (head + 1) * group].double()
        scores = of_head @ keys[head][:, :n].double().mT * width**-0.5
        expected = scores.softmax(-1) @ values[head][:, :n].double()
        assert (got[:, head * group : (head + 1) * group].double() - expected).abs().max() < off


def decoded(model, spec, by_graph):
    torch.manual_seed(1)
    cache = CompressedCache(model.config, spec)
    with compressible(model), torch.inference_mode():
        ids = torch.randint(3, model.config.vocab_size, (2, 301), device=model.device)
        prefill(model, ids[:, :-1], cache)
        token, tokens = ids[:, -1:], []
        if by_graph:
            with DecodingGraph(model, cache, steps=STEPS + 2) as graph:
                for _ in range(STEPS):
                    token = graph.step(token)
                    tokens.append(token)
        else:
            for _ in range(STEPS):
                token = decode_one_token(model, token, cache)
                tokens.append(token)
        for _ in range(3):  # and goes on by itself
            token = decode_one_token(model, token, cache)
            tokens.append(token)
    return cache, torch.cat(tokens, dim=1)


@pytest.mark.parametrize("name", SPECS)
def test_a_recorded_step_decodes_and_evicts_as_the_cache_does_by_itself(cuda, name, monkeypatch):
    model = build("llama", head_dim=16).to(cuda)
    got, tokens = decoded(model, SPECS[name], by_graph=True)
    monkeypatch.setenv("L2KV_KERNELS", "torch")
    expected, its_tokens = decoded(model, SPECS[name], by_graph=False)
    assert torch.equal(tokens, its_tokens)
    assert got.held_by_head == expected.held_by_head
    for layer in range(len(expected.layers)):
        pairs = zip(got.kept_positions(layer), expected.kept_positions(layer), strict=True)
        assert all(torch.equal(of_graph, of_cache) for of_graph, of_cache in pairs)
