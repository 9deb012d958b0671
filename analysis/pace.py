"""How long a model takes on this machine, told before it is loaded: by earlier runs, else roughly by its size.

Runs no model. `evaluation.work.estimate` times a loaded one, and knows what it is to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from analysis.captures import Capture
from analysis.evaluation.lm import Lengths
from analysis.words import duration
from l2kv.config import CacheShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Measured on two cores of a CPU, with models of 5 and 135 million weights.
_PAIR = 300  # multiplications that take as long as a query and a key of one head do in a capture
_AFTER = 5  # tokens of a prompt that take as long as one that is predicted after it, in a batch
_ALONE = 40  # likewise, where one text is written with one cache
_SIDE, _ROWS, _TRIES = 1024, 128, 10  # of the products that the machine is timed with, a millisecond each


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a model takes."""

    token: float
    """Seconds of a token in a pass over a text."""
    pair: float
    """Seconds that a capture takes beyond that for a query and a key, in all heads."""
    by: str
    """What it is told by: "by earlier runs"."""

    @classmethod
    def rough(cls, of: Capture | PretrainedConfig) -> Pace:
        """Pace by the size of a model, of which a run or the config is at hand, and this machine's multiplications."""
        return _at(_multiplication(), of, "a rough figure by the model's size and this machine's CPU")

    @classmethod
    def of(cls, runs: Iterable[Capture]) -> Pace | None:
        """Pace of the quickest of some runs of one model, as the first after a start is slow; None without one."""
        paces = [_of(run) for run in runs if run.seconds]
        return min(paces, key=lambda pace: pace.token, default=None)

    def capture(self, n_tokens: int) -> float:
        """Seconds of the capture of a text."""
        return n_tokens * self.token + n_tokens**2 * self.pair

    def predictions(self, texts: int, passes: int, lengths: Lengths) -> float:
        """Seconds of capturing prompts, and of predicting what follows them with many caches.

        Args:
            texts: number of prompts; each is read once more, for all caches.
            passes: number of captures and continuations.
        """
        after = (passes - texts) * lengths.new_tokens * _AFTER
        return texts * self.capture(lengths.prompt_tokens) + (texts * lengths.prompt_tokens + after) * self.token

    def generations(self, caches: int, prompt_tokens: int, new_tokens: int) -> float:
        """Seconds of reading a prompt and writing after it, with some caches one after the other."""
        return caches * (prompt_tokens + new_tokens * _ALONE) * self.token

    def told(self, seconds: float) -> str:
        """Write a time and what it is told by: "about 2 min, by earlier runs"."""
        return f"about {duration(max(seconds, 1))}, {self.by}"


def _at(multiplication: float, of: Capture | PretrainedConfig, by: str) -> Pace:
    """Pace where a multiplication takes so many seconds; a layer of hidden states of w numbers has about 12 w^2."""
    if isinstance(of, Capture):
        layers, heads, width = of.n_layers, of.n_heads, of.n_heads * of.head_dim
    else:
        layers, heads, width = of.num_hidden_layers, CacheShape.of(of, 1).n_heads, of.hidden_size
    return Pace(12 * layers * width**2 * multiplication, _PAIR * layers * heads * multiplication, by)


def _of(run: Capture) -> Pace:
    at_one = _at(1.0, run, "by earlier runs")
    share = run.seconds / at_one.capture(run.n_tokens)
    return replace(at_one, token=at_one.token * share, pair=at_one.pair * share)


@cache
def _multiplication() -> float:
    """Seconds of a multiplication and addition in a product of matrices: the least of some tries, as others run."""
    rows, square = np.ones((_ROWS, _SIDE), np.float32), np.ones((_SIDE, _SIDE), np.float32)

    def once() -> float:
        started = perf_counter()
        rows @ square
        return perf_counter() - started

    return min(once() for _ in range(_TRIES)) / (_ROWS * _SIDE**2)
