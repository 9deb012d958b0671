"""A decoding step over kv heads that hold different numbers of pairs: append, attend, evict. Knows no specs.

What a head holds is a run of slots (`Table`), cut into chunks of one size. Each chunk is attended to by a program of
its own, so that a long head keeps no other waiting, and the chunks of a head are put together by their log-sum-exp, as
in flash decoding (Dao et al., 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html). Nothing here waits for the host:
the numbers of pairs held are read from the device, so that a step can be recorded in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2kv.heads import numbers_on
from l2kv.storage.base import Table

_PROGRAMS = 2  # for each multiprocessor: as many as run at a time, measured on an H100
_SHORTEST, _LONGEST = 128, 2048  # slots of a chunk
_BLOCK = 64  # slots that are read at a time
_WARPS, _STAGES = 4, 3
_SCAN = 1024  # ranks that are read at a time
_LOG2_E = 1.4426950408889634


class Chunks(NamedTuple):
    """Division of a table's slots into chunks of `size`. On the device, int32."""

    size: int
    starts: Tensor  # [Hkv], first slot of each head
    heads: Tensor  # [P]
    firsts: Tensor  # [P], first slot of each chunk within its head
    bounds: Tensor  # [Hkv + 1], the chunks of head h are from bounds[h] to bounds[h + 1]


def divide(table: Table, size: int | None = None) -> Chunks:
    """Divide a table into chunks: by default of a `size` that gives all multiprocessors work."""
    device = table.keys.device
    if size is None:
        slots = sum(table.rooms) * table.keys.shape[0] // (_PROGRAMS * _multiprocessors(device))
        size = max(_SHORTEST, min(_LONGEST, 1 << max(slots - 1, 0).bit_length()))
    return _divided(table.rooms, table.shared, size, device)


@lru_cache(maxsize=256)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=256)
def _divided(rooms: tuple[int, ...], shared: bool, size: int, device: torch.device) -> Chunks:
    numbers = [-(-room // size) for room in rooms]
    heads = [head for head, n in enumerate(numbers) for _ in range(n)]
    firsts = [i * size for n in numbers for i in range(n)]
    starts = [0, *accumulate(rooms)][:-1] if shared else [0] * len(rooms)
    return Chunks(size, *(numbers_on(device, tuple(x)) for x in (starts, heads, firsts, [0, *accumulate(numbers)])))


def attend(
    query: Tensor,
    table: Table,
    held: Tensor,
    chunks: Chunks,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    extra: int = 0,
) -> Tensor:
    """Compute the attention of one token's queries [B, H, D] to all pairs held: [B, H, D].

    Args:
        query: query heads h * G to h * G + G - 1 share kv head h.
        table: the pairs; keys and values may differ in width.
        held: number of pairs that each kv head holds, int32 [Hkv].
        chunks: from `divide`.
        scale: number that scores are multiplied by.
        softcap: bound of the scores (Gemma 2), or None.
        sinks: a logit for each query head [H] that takes attention and gives nothing (gpt-oss), or None.
        extra: number of pairs of each head beyond `held`: those of a step that is not counted yet.
    """
    keys, values = table.keys, table.values
    (batch, heads, width), value_width = query.shape, values.shape[-1]
    n_chunks, group = len(chunks.heads), heads // len(table.rooms)
    query = query.contiguous()
    sums = query.new_empty((batch, n_chunks, group, value_width), dtype=torch.float32)
    log_sums = query.new_empty((batch, n_chunks, group), dtype=torch.float32)
    output = query.new_empty((batch, heads, value_width))
    _attend_to_chunk[(n_chunks, batch)](
        query, keys, values, chunks.starts, held, chunks.heads, chunks.firsts, sums, log_sums,
        keys.stride(0), _head_stride(keys, table), keys.stride(2),
        values.stride(0), _head_stride(values, table), values.stride(2),
        n_chunks, heads, scale, softcap or 0.0, extra,
        GROUP=group, WIDTH=width, VALUE_WIDTH=value_width, CHUNK=chunks.size, BLOCK=_BLOCK, CAPPED=softcap is not None,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)), WIDTH_PADDED=max(16, triton.next_power_of_2(width)),
        VALUES_PADDED=max(16, triton.next_power_of_2(value_width)),
        PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    _join_chunks[(heads, batch)](
        sums, log_sums, chunks.bounds, held, output if sinks is None else sinks, output, n_chunks, heads, extra,
        GROUP=group, VALUE_WIDTH=value_width, CHUNK=chunks.size, BLOCK=32, SINKS=sinks is not None,
        VALUES_PADDED=triton.next_power_of_2(value_width), num_warps=4,
    )  # fmt: skip
    return output


def append(
    table: Table, held: Tensor, chunks: Chunks, keys: Tensor, values: Tensor, scores: Tensor | None, seen: Tensor
) -> None:
    """Write one pair [B, Hkv, 1, D] to the end of each head of each row, and where ranks are kept, its rank.

    `held` is not counted up: it is the same for all rows.

    Args:
        scores: scores by which the pairs are ranked, float32 [B, Hkv, 1]; needed where the table has ranks.
        seen: number of tokens seen, this one included, int64 [1].
    """
    ranked = table.ranks is not None
    ranks, scores = (table.ranks, scores) if ranked else (seen, seen)  # any tensors: they are not looked at
    assert ranks is not None and scores is not None
    _append[(len(table.rooms), keys.shape[0])](
        table.keys, table.values, ranks, keys, values, scores, seen, chunks.starts, held,
        table.keys.stride(0), _head_stride(table.keys, table), table.keys.stride(2),
        table.values.stride(0), _head_stride(table.values, table), table.values.stride(2),
        ranks.stride(0), _head_stride(ranks, table) if ranked else 0,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        scores.stride(0), scores.stride(1) if ranked else 0,
        WIDTH=keys.shape[-1], VALUE_WIDTH=values.shape[-1], RANKED=ranked,
        PADDED=triton.next_power_of_2(max(keys.shape[-1], values.shape[-1])), num_warps=1,
    )  # fmt: skip


def evict(
    table: Table, held: Tensor, kept: Tensor, chunks: Chunks, seen: Tensor, *, first: int, last: int, extra: int = 0
) -> None:
    """Evict the pairs of lowest rank until each head holds `kept` [Hkv] of its `held` pairs, and `extra` more.

    The last pair of a head takes the place of an evicted one, as in `Storage`.

    Args:
        seen: number of tokens seen, int64 [1].
        first, last: number of tokens that are protected at both ends of these.
    """
    assert table.ranks is not None
    _evict[(len(table.rooms), table.keys.shape[0])](
        table.keys, table.values, table.ranks, chunks.starts, held, kept, seen,
        table.keys.stride(0), _head_stride(table.keys, table), table.keys.stride(2),
        table.values.stride(0), _head_stride(table.values, table), table.values.stride(2),
        table.ranks.stride(0), _head_stride(table.ranks, table), first, last, extra,
        WIDTH=table.keys.shape[-1], VALUE_WIDTH=table.values.shape[-1],
        PADDED=triton.next_power_of_2(max(table.keys.shape[-1], table.values.shape[-1])), BLOCK=_SCAN, num_warps=8,
    )  # fmt: skip


def _head_stride(buffer: Tensor, table: Table) -> int:
    return 0 if table.shared else buffer.stride(1)


@triton.jit
def _attend_to_chunk(
    query, keys, values, starts, held, chunk_heads, chunk_firsts, sums, log_sums,
    key_row, key_head, key_slot, value_row, value_head, value_slot,
    n_chunks, n_heads, scale, softcap, extra,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, GROUP_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr, VALUES_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.load(chunk_heads + chunk)
    first = tl.load(chunk_firsts + chunk)
    end = tl.minimum(first + CHUNK, tl.load(held + head) + extra)
    start = tl.load(starts + head).to(tl.int64)
    keys += row * key_row + head * key_head + start * key_slot
    values += row * value_row + head * value_head + start * value_slot
    of_group = tl.arange(0, GROUP_PADDED)
    channels, value_channels = tl.arange(0, WIDTH_PADDED), tl.arange(0, VALUES_PADDED)
    query_at = (row * n_heads + head * GROUP + of_group) * WIDTH
    in_group = of_group < GROUP
    of_query = tl.load(
        query + query_at[:, None] + channels[None, :], mask=in_group[:, None] & (channels < WIDTH)[None, :], other=0.0
    )
    highest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, VALUES_PADDED], tl.float32)
    for block in range(first, end, BLOCK):
        slots = block + tl.arange(0, BLOCK)
        filled = slots < end
        of_keys = tl.load(
            keys + slots[None, :] * key_slot + channels[:, None],
            mask=filled[None, :] & (channels < WIDTH)[:, None],
            other=0.0,
        )
        scores = tl.dot(of_query, of_keys, input_precision=PRECISION) * scale
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        scores = tl.where(filled[None, :], scores * 1.4426950408889634, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - now[:, None])
        before = tl.exp2(highest - now)
        of_values = tl.load(
            values + slots[:, None] * value_slot + value_channels[None, :],
            mask=filled[:, None] & (value_channels < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        total = total * before + tl.sum(shares, 1)
        mixed = mixed * before[:, None] + tl.dot(shares.to(of_values.dtype), of_values, input_precision=PRECISION)
        highest = now
    at = (row * n_chunks + chunk) * GROUP + of_group
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    tl.store(log_sums + at, tl.where(nothing, float("-inf"), highest + tl.log2(total)), in_group)
    tl.store(
        sums + at[:, None] * VALUE_WIDTH + value_channels[None, :],
        mixed / total[:, None],
        mask=in_group[:, None] & (value_channels < VALUE_WIDTH)[None, :],
    )


@triton.jit
def _join_chunks(
    sums, log_sums, bounds, held, sinks, output, n_chunks, n_heads, extra,
    GROUP: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr,
    VALUES_PADDED: tl.constexpr,
):  # fmt: skip
    query_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = query_head // GROUP
    first = tl.load(bounds + head)
    n = (tl.load(held + head) + extra + CHUNK - 1) // CHUNK  # chunks that hold anything
    channels = tl.arange(0, VALUES_PADDED)
    inside = channels < VALUE_WIDTH
    if SINKS:
        highest = tl.load(sinks + query_head).to(tl.float32) * 1.4426950408889634
        total = tl.full([], 1.0, tl.float32)
    else:
        highest = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([VALUES_PADDED], tl.float32)
    for block in range(0, n, BLOCK):
        some = block + tl.arange(0, BLOCK)
        at = (row * n_chunks + first + some) * GROUP + query_head % GROUP
        parts = tl.load(log_sums + at, mask=some < n, other=float("-inf"))
        now = tl.maximum(highest, tl.max(parts, 0))
        shares = tl.exp2(parts - now)
        of_parts = tl.load(
            sums + at[:, None] * VALUE_WIDTH + channels[None, :], mask=(some < n)[:, None] & inside[None, :], other=0.0
        )
        before = tl.exp2(highest - now)
        total = total * before + tl.sum(shares, 0)
        mixed = mixed * before + tl.sum(shares[:, None] * of_parts, 0)
        highest = now
    to = output + (row * n_heads + query_head) * VALUE_WIDTH + channels
    tl.store(to, mixed / total, mask=inside)


@triton.jit
def _append(
    keys, values, ranks, new_keys, new_values, scores, seen, starts, held,
    key_row, key_head, key_slot, value_row, value_head, value_slot, rank_row, rank_head,
    new_key_row, new_key_head, new_value_row, new_value_head, score_row, score_head,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, RANKED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = (tl.load(starts + head) + tl.load(held + head)).to(tl.int64)
    channels = tl.arange(0, PADDED)
    key = tl.load(new_keys + row * new_key_row + head * new_key_head + channels, mask=channels < WIDTH)
    tl.store(keys + row * key_row + head * key_head + slot * key_slot + channels, key, mask=channels < WIDTH)
    value = tl.load(new_values + row * new_value_row + head * new_value_head + channels, mask=channels < VALUE_WIDTH)
    tl.store(
        values + row * value_row + head * value_head + slot * value_slot + channels, value, mask=channels < VALUE_WIDTH
    )
    if RANKED:  # as `l2kv.ranks.rank`
        score = tl.load(scores + row * score_row + head * score_head)
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        rank = (ordered << 32) + (0x100000000 - tl.load(seen))
        tl.store(ranks + row * rank_row + head * rank_head + slot, rank)


@triton.jit
def _evict(
    keys, values, ranks, starts, held, kept, seen,
    key_row, key_head, key_slot, value_row, value_head, value_slot, rank_row, rank_head, first, last, extra,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(starts + head).to(tl.int64)
    keys += row * key_row + head * key_head + start * key_slot
    values += row * value_row + head * value_head + start * value_slot
    ranks += row * rank_row + head * rank_head + start
    channels = tl.arange(0, PADDED)
    recent = tl.load(seen) - last  # positions from here on are protected
    n = tl.load(held + head) + extra
    fewer = tl.minimum(tl.load(kept + head), n)
    within = tl.arange(0, BLOCK)
    for _ in range(fewer, n):
        lowest = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)  # of the slots that each thread looks at
        at = tl.full([BLOCK], -1, tl.int32)
        for block in range(0, n, BLOCK):
            slots = block + within
            of_block = tl.load(ranks + slots, mask=slots < n, other=0x7FFFFFFFFFFFFFFF)
            position = 0xFFFFFFFF - (of_block & 0xFFFFFFFF)
            candidate = (position >= first) & (position < recent) & (of_block < lowest)
            lowest = tl.where(candidate, of_block, lowest)
            at = tl.where(candidate, slots, at)
        hole = tl.max(tl.where(lowest == tl.min(lowest, 0), at, -1), 0)
        n -= 1
        if (hole >= 0) & (hole < n):
            key = tl.load(keys + n * key_slot + channels, mask=channels < WIDTH)
            tl.store(keys + hole * key_slot + channels, key, mask=channels < WIDTH)
            value = tl.load(values + n * value_slot + channels, mask=channels < VALUE_WIDTH)
            tl.store(values + hole * value_slot + channels, value, mask=channels < VALUE_WIDTH)
            tl.store(ranks + hole, tl.load(ranks + n))
        tl.debug_barrier()  # the next one looks at what this one moved
