"""Memory: estimates for a capture, and bytes that are free. Reads configs; runs nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import psutil

from analysis.errors import OutOfMemoryError
from l2kv.config import CacheShape

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1}
"""Bytes of a number, by what caches may be in."""

BLOCK = 128  # queries whose attention a capture holds at a time
MAX_BINS = 128  # of its pooled attention map, a side
LAST_QUERIES = 16  # whose rows it keeps
RECENT_BYTES = 256 * 2**20  # that they may take
_SHARE_OF_FREE = 0.8  # the rest is for others, and for the estimate being one


def capture_bytes(config: PretrainedConfig, n_tokens: int, *, itemsize: int, last_queries: int = LAST_QUERIES) -> int:
    """Estimate the memory of a capture beyond the model's weights; `last_queries` as in `capture`."""
    shape = CacheShape.of(config, itemsize)
    heads, kv_heads = shape.n_heads, shape.n_kv_heads
    blocks = 4 * heads * min(BLOCK, n_tokens) * n_tokens * 4  # scores, probabilities, and the sums over them
    inner = np.max(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)  # Gemma 3n: one per layer
    activations = n_tokens * (6 * config.hidden_size + 3 * inner) * itemsize
    results = config.num_hidden_layers * ((2 * heads + 2 * kv_heads) * n_tokens * 4 + heads * MAX_BINS**2)
    recent = min(last_queries * config.num_hidden_layers * heads * n_tokens * 4, RECENT_BYTES)
    return int(shape.nbytes(n_tokens) + blocks + activations + results + recent)


def free_bytes(device: torch.device | str) -> int:
    """Number of bytes free on a torch device."""
    if getattr(device, "type", device) == "cuda":
        import torch

        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    return psutil.virtual_memory().available


def usable_bytes(device: torch.device | str) -> int:
    """Number of bytes that may be used on a torch device: the rest of the free memory is left to others."""
    return int(free_bytes(device) * _SHARE_OF_FREE)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn running out of memory inside the block into an OutOfMemoryError, and free what was begun."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "not enough memory", "can't allocate memory")  # CUDA's and the CPU allocator's
        if not isinstance(error, MemoryError) and not any(w in str(error).lower() for w in words):
            raise
    # Outside the except block: the error's traceback held the tensors, and must be gone before they can be freed.
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemoryError("Memory ran out, and what was begun has been freed. Try a shorter text or a smaller model.")
