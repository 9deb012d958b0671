"""Compressed decoding on a GPU against a full forward pass in which each query sees what was held when it was fed."""

import pytest
import torch

from l2kv import POLICIES, CompressedCache, CompressionSpec
from l2kv.policies import Pairs
from tests.support.decoding import IN_CHUNKS, ONE_BY_ONE, decode, kept_sets
from tests.support.models import build, tokens
from tests.support.oracle import masked_forward

PLANS = {"dense": None, "by head": {(0, 0): 0.9, (1, 1): 0.2, (2, 0): 0.3, (2, 1): 0.7}}


def model_on(device, dtype):
    return build("llama", head_dim=16).to(device, dtype)


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("plan", PLANS)
def test_decoding_in_float32_is_a_full_forward_with_the_evicted_masked(device, plan, chunks):
    model = model_on(device, torch.float32)
    ids = tokens(model, sum(chunks), batch=2).to(device)
    cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.5, head_ratios=PLANS[plan]))
    logits = decode(model, ids, chunks, cache)
    expected, kept = masked_forward(model, ids, chunks, cache.spec)
    assert kept_sets(cache) == kept
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
def test_decoding_in_bfloat16_is_as_near_as_bfloat16_gets(device, plan):
    # Random eviction goes by positions: keys that differ in their last bit, as they do in bfloat16, evict the same.
    model, exact = model_on(device, torch.bfloat16), model_on(device, torch.bfloat16).float()
    ids = tokens(model, sum(ONE_BY_ONE), batch=2).to(device)
    spec = CompressionSpec(keep_ratio=0.5, head_ratios=PLANS[plan], policy="random", seed=3)

    def scores(layer, keys):
        positions = torch.arange(keys.shape[1], device=keys.device)
        return POLICIES["random"].score(Pairs(keys[None], keys[None], positions, layer, (0, 1), spec.seed))

    def probabilities(logits):
        return logits.float().softmax(-1)

    cache = CompressedCache(model.config, spec)
    found = probabilities(decode(model, ids, ONE_BY_ONE, cache))
    expected, kept = masked_forward(model, ids, ONE_BY_ONE, spec, scores)
    truth, _ = masked_forward(exact, ids, ONE_BY_ONE, spec, scores)
    full = probabilities(exact(ids).logits)
    assert kept_sets(cache) == kept
    error = (found - probabilities(expected)).abs().mean()
    of_dtype = (probabilities(expected) - probabilities(truth)).abs().mean()
    of_eviction = (full - probabilities(truth)).abs().mean()
    assert error < 2e-3
    assert error < 1.5 * of_dtype + 1e-6 < of_eviction
