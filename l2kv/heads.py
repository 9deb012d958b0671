"""Selections of kv heads and of their query heads. Query heads h*G to h*G + G - 1 share kv head h."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from l2kv.hooks import Repeats


def of_kv_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Select kv heads: [B, Hkv, ...] -> [B, h, ...], a view where they are neighbours."""
    if heads == tuple(range(x.shape[1])):
        return x
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1]
    return x[:, list(heads)]


def of_query_heads(query: Tensor, heads: tuple[int, ...], kv_heads: int) -> Tensor:
    """Select the query heads of some kv heads: [B, H, ...] -> [B, h * G, ...]."""
    return of_kv_heads(query.unflatten(1, (kv_heads, -1)), heads).flatten(1, 2)


def options_of_heads(options: Mapping[str, Any], heads: tuple[int, ...], kv_heads: int) -> dict[str, Any]:
    """Select the options of an attention call for these heads: sinks are one logit per query head."""
    sinks = options.get("s_aux")
    if sinks is None:
        return dict(options)
    return {**options, "s_aux": of_query_heads(sinks[None], heads, kv_heads)[0]}


def in_groups(query: Tensor, repeats: Repeats, kv_heads: int) -> Tensor:
    """Order query heads [B, H, ...] so that those which share a kv head are neighbours."""
    if not repeats.in_turn:
        return query
    grouped: Tensor = query.unflatten(1, (repeats.times, kv_heads, -1)).transpose(1, 2).flatten(1, 3)
    return grouped


def in_model_order(output: Tensor, repeats: Repeats, kv_heads: int) -> Tensor:
    """Order the output of attention, [B, q, H, D], as the model does: the inverse of `in_groups`."""
    if not repeats.in_turn:
        return output
    ordered: Tensor = output.unflatten(2, (kv_heads, repeats.times, -1)).transpose(2, 3).flatten(2, 4)
    return ordered.contiguous()


@lru_cache(maxsize=1024)
def numbers_on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Make an int32 tensor of numbers on a device, once: nothing waits for the host where it was made before."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)
