"""Recorded generations that no model made, with tokens that mean harm; and what a recorded one must say, by a loop."""

import numpy as np
import torch

from analysis.timelines import MOST_ROWS, Timeline
from l2kv import CompressedCache, CompressionSpec, compressible

TEXT = "The old man looked at the sea, and the sea looked back at him. He had not caught a fish in forty days. " * 2
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


def fed_one_by_one(loaded, timeline, spec):
    """[step][head] -> positions held, and the NLL of each token of the continuation: a loop over a cache."""
    context, question, target = np.split(
        torch.from_numpy(timeline.token_ids)[None], np.cumsum([timeline.n_context, timeline.n_question]), axis=1
    )
    pieces = [context, question, *(target[:, i : i + 1] for i in range(target.shape[1]))]
    cache, held, nats = CompressedCache(loaded.config, spec), [], []
    with compressible(loaded.model), torch.no_grad():
        for i, piece in enumerate(pieces):
            logits = loaded.model(piece, past_key_values=cache, use_cache=True).logits[0, -1]
            held.append([set(h[0].tolist()) for layer in range(len(cache)) for h in cache.kept_positions(layer)])
            if 1 <= i <= target.shape[1]:
                nats.append(-torch.log_softmax(logits.double(), dim=-1)[target[0, i - 1]].item())
    return held, nats
