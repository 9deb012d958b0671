"""Prefill, eviction and decoding by torch's flash attention alone, in memory that grows with the text's length."""

import gc

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2kv import CompressedCache, CompressionSpec, compressible
from l2kv.decoding import decode_one_token, prefill
from tests.support.models import build, tokens

PLANS = {"dense": None, "by head": {(0, 0): 0.9, (1, 1): 0.1}}


def model_on(device):
    return build("llama", head_dim=64, vocab_size=40_000, max_position_embeddings=40_000).to(device, torch.bfloat16)


@pytest.mark.parametrize("plan", PLANS)
def test_flash_attention_serves_prefill_eviction_and_decoding(device, plan):
    """The context manager leaves torch no other kernel: it raises where flash attention cannot be used."""
    model, spec = model_on(device), CompressionSpec(keep_ratio=0.5, head_ratios=PLANS[plan])
    ids, written = tokens(model, 257).to(device), []
    for backends in ([SDPBackend.FLASH_ATTENTION], [SDPBackend.MATH]):
        cache, token = CompressedCache(model.config, spec), ids[:, -1:]
        with torch.inference_mode(), compressible(model), sdpa_kernel(backends):
            prefill(model, ids[:, :-1], cache)
            for _ in range(4):
                token = decode_one_token(model, token, cache)
                written.append(token.item())
        assert max(cache.held_by_head[2]) < 257 * 0.6
    assert len(written) == 8


def test_a_mask_that_flash_attention_cannot_read_is_refused_by_it(cuda):
    """So the test above would fail if a prompt went with a mask."""
    pairs = torch.randn(1, 2, 32, 64, device=cuda, dtype=torch.bfloat16)
    mask = torch.ones(32, 32, device=cuda, dtype=torch.bool).tril()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(RuntimeError):
        torch.nn.functional.scaled_dot_product_attention(pairs, pairs, pairs, attn_mask=mask)


def test_memory_grows_with_the_text_not_with_its_square(cuda):
    model, peaks = model_on(cuda), []
    for length in (16, 8192, 16384, 32768):  # the first warms up
        ids = tokens(model, length).to(cuda)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.5))
        with torch.inference_mode(), compressible(model):
            prefill(model, ids, cache)
        del cache
        peaks.append(torch.cuda.max_memory_allocated() - before)
    _, short, middle, long = peaks
    assert middle < 2.3 * short and long < 2.3 * middle
    assert long < 32768**2 / 2  # not even a byte for each pair of tokens
