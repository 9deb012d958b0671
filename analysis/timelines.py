"""`Timeline`: the record of a generation over a compressed cache, and of what keeping some tokens would have changed.

It knows when each kv head evicted each token, what the token had received before, and what the continuation cost.
Knows numpy; knows no torch and no plots. `analysis.generations` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import exp
from typing import Annotated

import numpy as np

from analysis import records
from analysis.evaluation.task import Sample
from l2kv.spec import CompressionSpec

LAST_QUERIES = 32
"""Queries at the end of the context whose attention counts."""
MOST_ROWS = 64
"""Rows of `Timeline.attention`: neighbouring steps of a longer generation share one."""
CONTEXT, COMPRESSED, QUESTION = range(3)
"""The first steps: the context is read, then compressed, then the question is read. Each further one reads a token."""


def timeline_bytes(heads: int, tokens: int) -> int:
    """Number of bytes, at most, of the arrays of a recording of so many kv heads and tokens: 4 MB of 90 and 4,000."""
    return tokens * (8 * heads + 4 * MOST_ROWS + 16)


@records.record("timeline", version=1, title="a recorded generation")
@dataclass(frozen=True, eq=False)
class Timeline:
    """A generation over a compressed cache. K kv heads, T tokens (N of them predicted), S steps, R rows of steps.

    The tokens are those of the context, of the question and of the continuation; heads are those of layers that may
    evict. A step is what happens between two evictions: see `CONTEXT`.
    """

    model: str  # its name
    weights: str  # digest of weights and vocabulary
    device: str
    dtype: str  # that it was computed and cached in
    spec: CompressionSpec
    n_context: int
    n_question: int
    given: bool  # the continuation was given; else it is what the model wrote
    context_seconds: float  # time that reading and compressing the context took
    seconds: float  # time of all that followed
    labels: tuple[str, ...]  # T, what to call each token
    layers: tuple[int, ...]  # K, the layer of each head
    heads: tuple[int, ...]  # K, its number there
    steps_per_row: int  # steps that share a row of `attention`, whose first begins with the step `COMPRESSED`
    token_ids: Annotated[np.ndarray, "int64 T"]
    seen: Annotated[np.ndarray, "int32 S"]  # number of tokens read, at each step
    evicted: Annotated[np.ndarray, "int32 K T"]  # step from which on the head does not hold it; 0: never evicted
    received: Annotated[np.ndarray, "float32 K T"]  # attention, summed over steps while held: see `mean_attention`
    attention: Annotated[np.ndarray, "float32 R T"]  # the same by step, mean over all heads, pooled over steps
    nats: Annotated[np.ndarray, "float32 N"]  # NLL of each token of the continuation

    def __post_init__(self) -> None:
        records.check_shapes(self)
        kinds, length, steps = self.evicted.shape[0], len(self.token_ids), len(self.seen)
        continued = length - self.n_context - self.n_question
        if (
            min(self.n_context, self.n_question, continued, kinds, self.steps_per_row) < 1
            or len(self.nats) != continued
        ):
            raise ValueError(f"there is no generation of {length} tokens after {self.n_context} + {self.n_question}")
        if len(self.labels) != length or {len(self.layers), len(self.heads)} != {kinds}:
            raise ValueError(f"labels, layers or heads do not fit {length} tokens in {kinds} heads")
        if len(set(zip(self.layers, self.heads, strict=True))) < kinds or not all(0 <= h < kinds for h in self.heads):
            raise ValueError("no two heads are the same, and none is numbered beyond all of them")
        read = [self.n_context] * 2 + [self.n_context + self.n_question + i for i in range(continued + 1)]
        if self.seen.tolist() != read or len(self.attention) != -(-(steps - 1) // self.steps_per_row):
            raise ValueError("its steps are not those of such a generation")
        if ((self.evicted != 0) & ((self.evicted < np.maximum(self.arrived, 1)) | (self.evicted >= steps))).any():
            raise ValueError("a token cannot be evicted before it is read, or after the end")
        if (self.token_ids < 0).any():
            raise ValueError("token ids cannot be negative")
        if not (0 <= self.context_seconds < np.inf and 0 <= self.seconds < np.inf):
            raise ValueError("times must be finite and not negative")
        if not (all(np.isfinite(a).all() and (a >= 0).all() for a in (self.received, self.attention))):
            raise ValueError("attention must be finite and not negative")

    @property
    def n_heads(self) -> int:
        """Number of kv heads that may evict, K."""
        return len(self.heads)

    @cached_property
    def arrived(self) -> np.ndarray:
        """Step at which each token is read, int64 [T]: 0 in the context."""
        arrived = np.searchsorted(self.seen, np.arange(len(self.labels)), side="right")
        return np.where(np.arange(len(self.labels)) < self.n_context, CONTEXT, arrived)

    def held(self, step: int) -> np.ndarray:
        """Number of heads that hold each token at a step, int64 [T]; 0 for what is not read yet."""
        holding = ((self.evicted == 0) | (self.evicted > step)).sum(axis=0)
        return np.where(self.arrived <= step, holding, 0)

    def evicted_after(self, token: int) -> np.ndarray:
        """Number of tokens read when each head evicted a token, float64 [K]; NaN where it never did."""
        step = self.evicted[:, token]
        return np.where(step == 0, np.nan, self.seen[step])

    def history(self, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of tokens read, attention to a token (the mean over all heads) and heads that hold it, by step.

        From the step at which it is read on, and from the step `COMPRESSED`.
        """
        steps = np.arange(max(int(self.arrived[token]), COMPRESSED), len(self.seen))
        evicted = self.evicted[:, token]
        holding = (evicted == 0).sum() + (evicted[:, None] > steps).sum(axis=0)
        return self.seen[steps], self.attention[(steps - COMPRESSED) // self.steps_per_row, token], holding

    @cached_property
    def evictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All evictions, by step: (step, token, number of heads that evict it there), int64 each."""
        _, token = np.nonzero(self.evicted)
        both = np.stack([self.evicted[self.evicted != 0], token])
        (step, token), heads = np.unique(both, axis=1, return_counts=True)
        return step, token, heads

    @cached_property
    def mean_attention(self) -> np.ndarray:
        """Mean attention that each head paid to each token per step while it held it, float64 [K, T].

        A step's attention is the mean over its queries (of the context: the last `LAST_QUERIES`) and over the query
        heads that share the kv head, without a token's attention to itself.
        """
        last = np.where(self.evicted == 0, len(self.seen) - 1, self.evicted)  # it is attended to, and then evicted
        steps = last - np.maximum(self.arrived, COMPRESSED) + 1
        return self.received / np.maximum(steps, 1)

    def missed(self, most: int = 10) -> np.ndarray:
        """Positions of evicted tokens that are most worth asking `what_if` about, int64 [<= most].

        By the highest mean attention of any head while it held the token, times the number of heads that evicted it: a
        token that one head reads and others have lost, as the digits of a passkey. A cheap shortlist, not a measurement
        of what evicting them cost.
        """
        worth = self.mean_attention.max(axis=0) * (self.evicted != 0).sum(axis=0)
        order = np.argsort(-worth, kind="stable")[:most]
        return order[worth[order] > 0]

    @property
    def sample(self) -> Sample:
        """The sample as `evaluate` takes it, with the continuation as its target."""
        context, question, target = np.split(self.token_ids, [self.n_context, self.n_context + self.n_question])
        return Sample("recorded", context, question, target)


@records.record("what_if", version=1, title="an answer to what if tokens had stayed")
@dataclass(frozen=True, slots=True)
class WhatIf:
    """The continuation's NLL with tokens pinned, and without, in nats."""

    pinned: tuple[int, ...]
    with_them: tuple[float, ...]
    without: tuple[float, ...]
    pairs: int
    """Number of pairs more that are held in the end: the heads that had evicted them."""

    @property
    def change(self) -> float:
        """Change of the mean NLL, in nats/token; below 0 the continuation is likelier with them."""
        return float(np.mean(self.with_them) - np.mean(self.without))

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity with them, over that without."""
        return exp(self.change)
