"""Recorded generations that no model made: of any size, with tokens that mean harm."""

import numpy as np

from analysis.timelines import MOST_ROWS, Timeline
from l2kv import CompressionSpec

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "\N{RIGHT-TO-LEFT OVERRIDE}evil",
    "\n",
    "$x$ ![a](b)",
    " the",
    "🙂 1/4",
    "</script><script>alert(2)</script>",
)


def invented(context=40, question=3, continuation=6, *, layers=4, kv_heads=2, labels=HOSTILE, seed=0):
    """In each head six of ten tokens are evicted, most of them when the context is compressed; the first never is."""
    random, total, heads = np.random.default_rng(seed), context + question + continuation, layers * kv_heads
    seen = np.array([context] * 2 + [context + question + i for i in range(continuation + 1)], np.int32)
    steps, positions = len(seen), np.arange(total)
    arrived = np.where(positions < context, 0, np.searchsorted(seen, positions, side="right"))
    at = np.where(
        (positions < context) & (random.random((heads, total)) < 0.7),
        1,
        random.integers(np.maximum(arrived, 1), steps, (heads, total)),
    )
    evicted = np.where(random.random((heads, total)) < 0.6, at, 0).astype(np.int32)
    evicted[:, 0] = 0
    per_row = -(-(steps - 1) // MOST_ROWS)
    return Timeline(
        model="books-5m",
        weights="0" * 64,
        device="cpu",
        dtype="float32",
        spec=CompressionSpec(keep_ratio=0.5, protect_last=32),
        n_context=context,
        n_question=question,
        given=True,
        context_seconds=1.0,
        seconds=2.0,
        labels=tuple(labels[i % len(labels)] for i in range(total)),
        layers=tuple(head // kv_heads for head in range(heads)),
        heads=tuple(head % kv_heads for head in range(heads)),
        steps_per_row=per_row,
        token_ids=positions.astype(np.int64),
        seen=seen,
        evicted=evicted,
        received=random.random((heads, total), dtype=np.float32) / total,
        attention=random.random((-(-(steps - 1) // per_row), total), dtype=np.float32) / total,
        nats=random.random(continuation, dtype=np.float32) * 5,
    )
