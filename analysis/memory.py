"""Bytes: of caches by arithmetic, of a capture by estimate, and what is free. Reads configs; runs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from analysis.errors import OutOfMemoryError

if TYPE_CHECKING:
    from analysis.models import LoadedModel

BLOCK = 256  # queries whose attention a capture holds at a time
MAX_BINS = 128  # of its pooled attention map, a side
_SHARE_OF_FREE = 0.8  # the rest is for others, and for the estimate being one


def cache_bytes(config, n_tokens: int, *, bytes_per_number: int, keep_ratio: float = 1.0, skip_layers=()) -> int:
    """Bytes of keys and values after `n_tokens`, by arithmetic, when all but `skip_layers` keep a share of them."""
    from l2kv.spec import share

    layers, _, kv_heads, head_dim = shape_of(config)
    skipped = len(set(skip_layers) & set(range(layers)))
    pairs = skipped * n_tokens + (layers - skipped) * share(keep_ratio, n_tokens)
    return pairs * 2 * kv_heads * head_dim * bytes_per_number


def shape_of(config) -> tuple[int, int, int, int]:
    """(L, H, Hkv, D) of a decoder's config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, heads, kv_heads, head_dim


def capture_bytes(config, n_tokens: int, *, bytes_per_number: int) -> int:
    """About what a capture takes beyond the model's weights."""
    layers, heads, kv_heads, _ = shape_of(config)
    cache = cache_bytes(config, n_tokens, bytes_per_number=bytes_per_number)
    blocks = 4 * heads * min(BLOCK, n_tokens) * n_tokens * 4  # scores, probabilities, and the sums over them
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = n_tokens * (6 * config.hidden_size + 3 * inner) * bytes_per_number
    results = layers * (2 * heads + 2 * kv_heads) * n_tokens * 4 + layers * heads * MAX_BINS**2
    return cache + blocks + activations + results


def free_bytes(device) -> int:
    """Memory that is free on a torch device."""
    if getattr(device, "type", device) == "cuda":
        import torch

        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    return psutil.virtual_memory().available


def check_fits(loaded: LoadedModel, n_tokens: int) -> int:
    """The estimate for a capture of `n_tokens`. Raises OutOfMemoryError, naming the length that would fit."""
    size, allowed = loaded.model.dtype.itemsize, int(free_bytes(loaded.device) * _SHARE_OF_FREE)

    def needed(n: int) -> int:
        return capture_bytes(loaded.config, n, bytes_per_number=size)

    if needed(n_tokens) <= allowed:
        return needed(n_tokens)
    fits, too_long = 0, n_tokens
    while too_long - fits > 1:  # the estimate grows with n
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if needed(middle) <= allowed else (fits, middle)
    raise OutOfMemoryError(
        f"A text of {n_tokens:,} tokens would take about {human_bytes(needed(n_tokens))} beyond the model, and "
        f"{human_bytes(allowed)} may be used. Shorten it to about {fits:,} tokens."
    )


def human_bytes(n: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError
