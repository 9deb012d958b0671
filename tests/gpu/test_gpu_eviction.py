"""Memory that an eviction gives back, by torch's own count of it."""

import gc

import pytest
import torch
from transformers import DynamicCache

from l2kv import CompressedCache, CompressionSpec, compressible
from l2kv.cache import cache_nbytes
from l2kv.decoding import prefill
from tests.support.models import build, tokens

LENGTH, LAYERS, KV_HEADS, HEAD_DIM = 16384, 3, 2, 64


def requested(device) -> int:
    """Bytes of all tensors, before the allocator rounds them."""
    gc.collect()
    return torch.cuda.memory_stats(device)["requested_bytes.all.current"]


@pytest.mark.parametrize("plan", [None, {(0, 0): 0.75, (1, 1): 0.125}], ids=["dense", "by head"])
def test_an_eviction_frees_what_the_cache_says(cuda, plan):
    model = build("llama", head_dim=HEAD_DIM, vocab_size=20_000, max_position_embeddings=20_000)
    model.to(cuda, torch.bfloat16)
    ids, sizes, allocated = tokens(model, LENGTH).to(cuda), {}, {}
    specs = {"full": None, "evicted": CompressionSpec(keep_ratio=0.25, head_ratios=plan)}
    with torch.inference_mode(), compressible(model):
        prefill(model, ids, DynamicCache(config=model.config))  # once, so that workspaces are there
        for name, spec in specs.items():
            before, rounded = requested(cuda), torch.cuda.memory_allocated(cuda)
            cache = DynamicCache(config=model.config) if spec is None else CompressedCache(model.config, spec)
            prefill(model, ids, cache)
            torch.cuda.synchronize(cuda)
            sizes[name] = cache_nbytes(cache)
            ranks = 0 if spec is None else 8 * sizes[name] // (2 * HEAD_DIM * 2)  # one for each pair
            small = 64 * 1024 * LAYERS  # page tables, indices
            assert 0 <= requested(cuda) - before - sizes[name] - ranks < small
            allocated[name] = torch.cuda.memory_allocated(cuda) - rounded
            del cache
    assert sizes["full"] == 2 * LAYERS * KV_HEADS * HEAD_DIM * LENGTH * 2
    freed, told = allocated["full"] - allocated["evicted"], sizes["full"] - sizes["evicted"]
    per_buffer = 2**20 * 3 * LAYERS  # up to 1 MiB of a large block is not split off
    assert abs(freed - told) < per_buffer
    assert freed > 0.5 * sizes["full"]
