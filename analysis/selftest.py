"""Self-test: a synthetic run with metrics known beforehand, and the metrics measured on it. Knows no model.

Layers 0, 1 and 2 have exactly Γ = -1, 0 and +1 in every head, for every query: the attention of a query falls with the
rank of the norm among the tokens before it, or is the same at both ends of the norms, or rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.captures import Capture
from analysis.metrics import PROBES, by_query, metrics

SYNTHETIC = "synthetic"
"""What such a run has for the name of its model."""
GAMMA = (-1.0, 0.0, 1.0)  # of each layer
TOLERANCE = 1e-6  # attention is float32
_TOKENS, _GROUP, _QUERIES = 97, 2, 16
_MASS = 0.9  # of a query's attention; it pays the rest to itself
# Of a token's place from the favoured end, 1..n: how the attention is spread, each head's.
_PROFILES: tuple[Callable[[np.ndarray, int], np.ndarray], ...] = (
    lambda place, n: place**-4.0,  # where the first token stands at that end it takes nearly all: a sink
    lambda place, n: 1 / place,
    lambda place, n: n + 1 - place,
    lambda place, n: np.exp(-8 * place / n),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """Expected value of one metric in one layer, and the measured value farthest from it over heads and queries."""

    probe: str
    metric: str
    layer: int
    known: float
    measured: float

    @property
    def error(self) -> float:
        """Distance from the expected value; infinite where nothing was measured."""
        return math.inf if math.isnan(self.measured) else abs(self.measured - self.known)


@dataclass(frozen=True, slots=True)
class Check:
    """Readings of the synthetic run."""

    readings: tuple[Reading, ...]

    @property
    def error(self) -> float:
        """Largest error of all readings."""
        return max(reading.error for reading in self.readings)

    @property
    def passed(self) -> bool:
        """True when all readings are close enough to the expected values."""
        return self.error <= TOLERANCE

    def __str__(self) -> str:
        verdict = "The self-test passed" if self.passed else "The self-test FAILED"
        return f"{verdict}: at most {self.error:.1e} from the known numbers, {TOLERANCE:.0e} is allowed."


def is_synthetic(capture: Capture) -> bool:
    """Tell whether a run is the synthetic one."""
    return capture.model == capture.architecture == SYNTHETIC and capture.n_layers == len(GAMMA)


def synthetic_run() -> Capture:
    """Make the synthetic run: 3 layers, 4 query heads on 2 kv heads, 97 tokens.

    Each head spreads its attention differently. `attention_received` is spread like a query's, so its Γ is known, too.
    """
    layers, heads, n = len(GAMMA), len(_PROFILES), _TOKENS
    norm = np.stack([_norms(seed, gamma) for seed, gamma in enumerate(GAMMA)])
    by_head = np.repeat(norm, _GROUP, axis=1)
    maps = np.zeros((layers, heads, n, n), np.float32)  # of the text's queries, with their own column
    for query in range(n):
        maps[..., query, :query] = _attention(by_head[..., :query])
        maps[..., query, query] = 1 - _MASS if query else 1
    probe = _attention(by_head)
    scale = maps.max(axis=(2, 3))
    words = (SYNTHETIC, *(f"t{i}" for i in range(1, n)))
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    return Capture(
        model=SYNTHETIC,
        architecture=SYNTHETIC,
        device="none",
        dtype="float32",
        text=" ".join(words),
        labels=words,
        probe_label=SYNTHETIC,
        layer_kinds=("full",) * layers,
        windows=(0,) * layers,
        warnings=(),
        seconds=0.0,
        head_dim=8,
        tokens_per_bin=1,
        token_ids=np.arange(n),
        token_spans=np.stack([ends - [len(word) for word in words], ends], axis=1).astype(np.int32),
        key_norm=norm,
        value_norm=np.ones_like(norm),
        attention_received=probe,
        probe_attention=probe,
        recent_attention=np.stack([np.tril(maps, -1)[..., query, :] for query in range(n - _QUERIES, n)]),
        pooled_attention=np.round(255 * np.sqrt(maps / scale[..., None, None])).astype(np.uint8),
        pooled_scale=scale,
    )


def check(capture: Capture) -> Check:
    """Measure Γ, normalised ALR and Spearman's ρ on the synthetic run, by every probe and by each of the last queries.

    Raises:
        ValueError: this is another run.
    """
    if not is_synthetic(capture):
        raise ValueError(f"only the synthetic run has numbers that are known; got one of {capture.model}")
    readings = []
    for probe in PROBES:
        for metric, known in (("gamma", 0), ("normalised_alr", 1), ("spearman", 0)):
            whole = metrics(capture, probe, names=[metric]).values
            found = np.concatenate([whole, by_query(capture, metric)]) if probe == "last queries" else whole
            for layer, gamma in enumerate(GAMMA):
                values = found[:, layer].ravel()
                worst = np.nan if np.isnan(values).any() else values[np.argmax(abs(values - gamma - known))]
                readings.append(Reading(probe, metric, layer, gamma + known, float(worst)))
    return Check(tuple(readings))


def _norms(seed: int, gamma: float) -> np.ndarray:
    """[Hkv, T] float32, no two alike, in any order but for the first token: lowest, in the middle, or highest."""
    random = np.random.default_rng(seed)
    norms = np.stack([random.permutation(_TOKENS - 1) for _ in range(len(_PROFILES) // _GROUP)])
    first = np.full((len(norms), 1), (_TOKENS - 2 + gamma * _TOKENS) / 2)
    return (10 + np.concatenate([first, norms], axis=1) / 8).astype(np.float32)


def _attention(norm: np.ndarray) -> np.ndarray:
    """The attention [L, H, n] of a query to the tokens before it."""
    n = norm.shape[-1]
    rank = 1 + norm.argsort(axis=-1).argsort(axis=-1)
    place = np.stack([rank[0], np.minimum(rank[1], n + 1 - rank[1]), n + 1 - rank[2]]).astype(np.float64)
    shares = np.stack([profile(place[:, head], n) for head, profile in enumerate(_PROFILES)], axis=1)
    return (_MASS * shares / np.maximum(shares.sum(axis=-1, keepdims=True), 1e-300)).astype(np.float32)
