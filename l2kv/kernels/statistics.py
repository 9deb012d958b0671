"""Attention statistics of a causal prompt by two Triton kernels that write no score to memory.

The first walks the keys of each query for the log-sum-exp of its row of scores, as flash attention does. The second
walks the queries of each key, works the scores out again, and sums their probabilities. Knows no captures and no
caches; `l2kv.probabilities` is the torch code for all that is not a plain causal prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2kv.probabilities import attention_scale

_LOG2_E = math.log2(math.e)


def attention_statistics(
    query: Tensor, key: Tensor, *, width: int, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum up the attention probabilities of a prompt, in which each query sees the keys up to its own.

    Float32 from the products on, and the same numbers at every run. Beside the results, memory for [H, P, n] is taken.

    Args:
        query: queries [1, H, n, D]; heads h*G to h*G + G - 1 share kv head h.
        key: keys [1, Hkv, n, D].
        width: number of tokens in a bin; P bins, of which the last may be shorter.
        options: as for `attention_probabilities`.

    Returns:
        Sums over the queries of what each key receives [H, n], sums over each cell of bins [H, P, P] (queries by keys),
        and log-sum-exp of each query's scores [H, n]; all float32.
    """
    _, heads, n, head_dim = query.shape
    bins = -(-n // width)
    dtype = torch.promote_types(query.dtype, key.dtype)
    query, key = query[0].to(dtype), key[0].to(dtype)
    scale, cap = _scale(query, options)
    sinks = options.get("s_aux")
    blocks = _Blocks.of(query, width)
    common = {
        "n": n,
        "group": heads // key.shape[0],
        "scale": scale,
        "cap": cap,
        "HEAD_DIM": head_dim,
        "WIDE": max(16, triton.next_power_of_2(head_dim)),
        "CAPPED": options.get("softcap") is not None,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    log_sums = query.new_empty((heads, n), dtype=torch.float32)
    rows = query.new_zeros((heads, bins, bins * width), dtype=torch.float32)  # what a bin of queries gives to each key
    tiles = triton.cdiv(n, blocks.tile), heads
    with torch.cuda.device_of(query):
        _log_sums_kernel[tiles](
            query,
            key,
            log_sums if sinks is None else sinks.float().contiguous(),
            log_sums,
            *query.stride(),
            *key.stride(),
            SINKS=sinks is not None,
            QUERIES=blocks.tile,
            KEYS=blocks.keys,
            **common,
        )
        _rows_kernel[tiles](
            query,
            key,
            log_sums,
            rows,
            *query.stride(),
            *key.stride(),
            bins,
            width,
            KEYS=blocks.tile,
            QUERIES=blocks.queries,
            ENDS=triton.cdiv(blocks.queries, width),
            **common,
        )
    return rows.sum(dim=1)[:, :n], rows.unflatten(2, (bins, width)).sum(dim=3), log_sums


def _scale(query: Tensor, options: Mapping[str, Any]) -> tuple[float, float]:
    """Factors that make products of query and key scores in units of log 2, see `_scores`."""
    scaling, softcap = attention_scale(query, options), options.get("softcap")
    if softcap is None:
        return scaling * _LOG2_E, 1.0
    return 2 * _LOG2_E * scaling / softcap, softcap * _LOG2_E


class _Blocks(NamedTuple):
    """Sizes of what a program holds and of what it walks."""

    tile: int  # queries of the first kernel's programs, keys of the second's
    keys: int  # that the first walks at a time
    queries: int  # that the second walks at a time
    warps: int
    stages: int

    @classmethod
    def of(cls, query: Tensor, width: int) -> _Blocks:
        """Choose sizes that leave room for two programs on a multiprocessor, one's products beside another's sums."""
        if query.element_size() > 2:  # no tensor cores: products take registers, which more warps have
            tile, step, warps, stages = 64, 32, 8, 2
        elif query.shape[-1] <= 128:
            tile, step, warps, stages = 128, 64, 4, 3
        else:
            tile, step, warps, stages = 64, 32, 4, 2
        # A block of queries that is no wider than a bin goes into one bin or two.
        return cls(tile, step, queries=max(16, min(step, 1 << width.bit_length() - 1)), warps=warps, stages=stages)


@triton.jit
def _scores(products, scale, cap, CAPPED: tl.constexpr):
    """Scores times log2(e), of products of queries and keys; soft-capped ones here, others by `scale` later on."""
    if CAPPED:  # cap * tanh(x), by exp2(2 * log2(e) * x)
        products = cap - 2.0 * cap / (tl.exp2(products * scale) + 1.0)
    return products


@triton.jit
def _log_sums_of(
    largest,
    total,
    query,
    keys,
    positions,
    columns,
    first,
    last,
    n,
    key_token,
    key_number,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Go on over keys first..last with the largest score and the sum of each query at `positions`."""
    unit = scale
    if CAPPED:
        unit = 1.0
    within = tl.arange(0, KEYS)
    offsets = within[:, None] * key_token + columns[None, :] * key_number
    for start in range(first, last, KEYS):
        seen = start + within
        key = tl.load(keys + offsets, mask=(seen < n)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        scores = _scores(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, CAPPED)
        if DIAGONAL:
            scores = tl.where(seen[None, :] <= positions[:, None], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * unit)
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(scores * unit - larger[:, None]), 1)
        largest = larger
        keys += KEYS * key_token
    return largest, total


@triton.jit
def _log_sums_kernel(
    query,
    key,
    sinks,
    log_sums,
    query_head,
    query_token,
    query_number,
    key_head,
    key_token,
    key_number,
    n,
    group,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that have most to do begin
    head = tl.program_id(1)
    first = tile * QUERIES
    positions = first + tl.arange(0, QUERIES)
    columns = tl.arange(0, WIDE)
    rows = query + head.to(tl.int64) * query_head + positions.to(tl.int64)[:, None] * query_token
    inside = (positions < n)[:, None] & (columns < HEAD_DIM)[None, :]
    queries = tl.load(rows + columns[None, :] * query_number, mask=inside, other=0.0)
    keys = key + (head // group).to(tl.int64) * key_head
    if SINKS:
        largest = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + head) * 1.4426950408889634
        total = tl.zeros([QUERIES], tl.float32) + 1.0
    else:
        largest = tl.zeros([QUERIES], tl.float32) - float("inf")
        total = tl.zeros([QUERIES], tl.float32)
    largest, total = _log_sums_of(
        largest, total, queries, keys, positions, columns, 0, first, n, key_token, key_number, scale, cap,
        HEAD_DIM, KEYS, CAPPED, False,
    )  # fmt: skip
    last = tl.minimum(first + QUERIES, n)
    keys += first.to(tl.int64) * key_token
    largest, total = _log_sums_of(
        largest, total, queries, keys, positions, columns, first, last, n, key_token, key_number, scale, cap,
        HEAD_DIM, KEYS, CAPPED, True,
    )  # fmt: skip
    sums = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(log_sums + head.to(tl.int64) * n + positions, sums, mask=positions < n)


@triton.jit
def _rows_of(
    sums,
    at,
    queries,
    log_sums,
    rows,
    key,
    positions,
    columns,
    first,
    last,
    n,
    bins,
    width,
    pitch,
    query_token,
    query_number,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    ENDS: tl.constexpr,
    CAPPED: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Go on over queries first..last with the sums of the bin `at`; bins that end are written to `rows`."""
    unit = scale
    if CAPPED:
        unit = 1.0
    within = tl.arange(0, QUERIES)
    offsets = within[:, None] * query_token + columns[None, :] * query_number
    for start in range(first, last, QUERIES):
        seeing = start + within
        query = tl.load(queries + offsets, mask=(seeing < n)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        log_sum = tl.load(log_sums + seeing, mask=seeing < n, other=float("inf")) * 1.4426950408889634
        scores = _scores(tl.dot(key, tl.trans(query), input_precision="ieee"), scale, cap, CAPPED)
        given = tl.exp2(scores * unit - log_sum[None, :])  # 0 of a query beyond the last
        if DIAGONAL:
            given = tl.where(positions[:, None] <= seeing[None, :], given, 0.0)
        for _ in tl.static_range(ENDS):  # bins that end within the block
            end = (at + 1) * width
            if end < start + QUERIES:
                before = (seeing < end)[None, :]
                sums += tl.sum(tl.where(before, given, 0.0), 1)
                tl.store(rows + at * pitch + positions, sums, mask=positions < tl.where(at < bins, n, 0))
                given = tl.where(before, 0.0, given)
                sums = tl.zeros_like(sums)
                at += 1
        sums += tl.sum(given, 1)
        if (at + 1) * width == start + QUERIES:
            tl.store(rows + at * pitch + positions, sums, mask=positions < tl.where(at < bins, n, 0))
            sums = tl.zeros_like(sums)
            at += 1
        queries += QUERIES * query_token
    return sums, at


@triton.jit
def _rows_kernel(
    query,
    key,
    log_sums,
    rows,
    query_head,
    query_token,
    query_number,
    key_head,
    key_token,
    key_number,
    bins,
    width,
    n,
    group,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    ENDS: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first = tile * KEYS
    positions = first + tl.arange(0, KEYS)
    columns = tl.arange(0, WIDE)
    held = key + (head // group).to(tl.int64) * key_head + positions.to(tl.int64)[:, None] * key_token
    inside = (positions < n)[:, None] & (columns < HEAD_DIM)[None, :]
    keys = tl.load(held + columns[None, :] * key_number, mask=inside, other=0.0)
    queries = query + head.to(tl.int64) * query_head + first.to(tl.int64) * query_token
    pitch = bins * width
    log_sums = log_sums + head.to(tl.int64) * n
    rows = rows + head.to(tl.int64) * bins * pitch
    sums = tl.zeros([KEYS], tl.float32)
    at = first // width
    last = tl.minimum(first + KEYS, n)
    sums, at = _rows_of(
        sums, at, queries, log_sums, rows, keys, positions, columns, first, last, n, bins, width, pitch,
        query_token, query_number, scale, cap, HEAD_DIM, QUERIES, ENDS, CAPPED, True,
    )  # fmt: skip
    queries += KEYS * query_token
    sums, at = _rows_of(
        sums, at, queries, log_sums, rows, keys, positions, columns, first + KEYS, n, n, bins, width, pitch,
        query_token, query_number, scale, cap, HEAD_DIM, QUERIES, ENDS, CAPPED, False,
    )  # fmt: skip
    tl.store(rows + at * pitch + positions, sums, mask=positions < tl.where(at < bins, n, 0))
