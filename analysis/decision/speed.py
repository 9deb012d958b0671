"""Speed of decoding with the full cache and with a compressed one, measured, beside what memory traffic allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from analysis.demo.presets import bundled_prose
from analysis.errors import OutOfMemoryError, SettingsError
from analysis.models.memory import usable_bytes
from analysis.progress import Progress, unheard
from analysis.records import record
from analysis.words import human_bytes
from l2kv.config import CacheShape
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from transformers import Cache

    from analysis.models.load import LoadedModel

WARM_UP, STEPS, RUNS = 3, 12, 5


@record("speed", version=1, title="a measurement of speed", again="l2kv verdict")
@dataclass(frozen=True, slots=True)
class Speed:
    """Times of a decoding step of one batch, in runs that took turns between the two caches."""

    model: str
    weights: str
    """Digest of the model's weights, as in `Results`."""
    device: str
    dtype: str
    threads: int
    spec: CompressionSpec
    n_tokens: int
    """Tokens of each sequence when decoding began."""
    batch: int
    """Number of sequences."""
    read_nbytes: int
    """Bytes of the weights that a step reads."""
    full_nbytes: int
    """Bytes of the batch's keys and values in the full cache, before decoding."""
    kept_nbytes: int
    full_seconds: tuple[float, ...]
    """Median step of each run with the full cache."""
    kept_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.full_seconds) != len(self.kept_seconds) or not self.full_seconds:
            raise ValueError("both caches must be timed in equally many runs, one or more")
        if not min(*self.full_seconds, *self.kept_seconds, self.batch, self.read_nbytes + self.full_nbytes) > 0:
            raise ValueError("times, batch and bytes must be positive")

    @property
    def full_rate(self) -> float:
        """Tokens per second of the batch with the full cache, by the median run."""
        return self.batch / median(self.full_seconds)

    @property
    def kept_rate(self) -> float:
        """Tokens per second of the batch with the compressed cache."""
        return self.batch / median(self.kept_seconds)

    @property
    def speedup(self) -> float:
        """Ratio of the two rates."""
        return self.kept_rate / self.full_rate

    @property
    def spread(self) -> tuple[float, float]:
        """Least and largest speedup of the runs, each against the run of the full cache beside it."""
        ratios = [full / kept for full, kept in zip(self.full_seconds, self.kept_seconds, strict=True)]
        return min(ratios), max(ratios)

    @property
    def bound(self) -> float:
        """Speedup if a step took the time to read weights and cache once: what a machine bound by memory can gain."""
        return (self.read_nbytes + self.full_nbytes) / (self.read_nbytes + self.kept_nbytes)

    def __str__(self) -> str:
        low, high = self.spread
        return (
            f"{self.kept_rate:.1f} tokens/s, the full cache {self.full_rate:.1f}: × {self.speedup:.2f} ({low:.2f} to "
            f"{high:.2f} in {len(self.full_seconds)} runs); reading weights and cache once allows × {self.bound:.2f}. "
            f"{self.batch} at a time, {self.n_tokens:,} tokens, {self.dtype} on {self.device}."
        )


def measure_speed(
    loaded: LoadedModel,
    spec: CompressionSpec,
    *,
    n_tokens: int,
    batch: int = 1,
    steps: int = STEPS,
    runs: int = RUNS,
    progress: Progress = unheard,
) -> Speed:
    """Time decoding with the full cache and with a compressed one.

    One prompt is run once; its cache is repeated for the batch, and compressed. Then runs of some steps take turns
    between the two, so that a machine that slows down slows both; a run's first steps are not timed.

    Args:
        n_tokens: tokens of the prompt, of prose.
        batch: number of sequences decoded at once.
        steps: timed steps of a run; the median counts.
        progress: counts runs, and is called at every step.

    Raises:
        SettingsError: a number is below 1, or the prompt is shorter than 2 tokens.
        TextError: the prompt is more than the model can take.
        OutOfMemoryError: the caches do not fit the memory that is free.
        ModelError: the model cannot be compressed.
    """
    import torch

    from analysis.evaluation.run import Machine
    from analysis.preview import prepared
    from analysis.recorder import check_length
    from analysis.texts.tokens import Tokens, tokenize
    from l2kv.cache import CompressedCache, cache_nbytes
    from l2kv.decoding import decode_one_token, new_cache, prefill

    if n_tokens < 2 or min(batch, steps, runs) < 1:
        raise SettingsError(
            f"n_tokens must be 2 or more, batch, steps and runs 1 or more, got {n_tokens}, {batch}, {steps}, {runs}"
        )
    ids = np.resize(tokenize(loaded.tokenizer, "\n\n".join(bundled_prose().values())).ids, n_tokens)
    check_length(loaded, Tokens(ids, np.zeros((n_tokens, 2), np.int32), ()), new_tokens=runs * (WARM_UP + steps))
    needed = 2 * batch * CacheShape.of(loaded.config, loaded.model.dtype.itemsize).nbytes(n_tokens)
    if needed > usable_bytes(loaded.device):
        raise OutOfMemoryError(
            f"The caches of {batch} sequences of {n_tokens} tokens take {human_bytes(needed)}, more than is free. Take "
            "fewer or shorter ones."
        )
    prompt = torch.from_numpy(ids)[None].to(loaded.device)
    with torch.inference_mode(), prepared(loaded):
        context, special_ids = prompt[:, :-1], loaded.special_ids(spec)
        full = new_cache(loaded.config, None)
        prefill(loaded.model, context, full)
        if POLICIES[spec.policy].needs_attention:  # which a full cache does not hold
            kept = new_cache(loaded.config, spec, special_ids=special_ids)
            prefill(loaded.model, context, kept)
        else:
            kept = CompressedCache.from_full(full, loaded.config, spec, input_ids=context, special_ids=special_ids)
        for cache in (full, kept):
            cache.batch_repeat_interleave(batch)
        full_nbytes, kept_nbytes = (cache_nbytes(cache, slack=False) for cache in (full, kept))

        def timed(cache: Cache, tick: Callable[[], object]) -> float:
            token, taken = prompt[:, -1:].expand(batch, 1), []
            for _ in range(WARM_UP + steps):
                tick()
                started = perf_counter()
                token = decode_one_token(loaded.model, token, cache)
                token.tolist()  # waits for a GPU
                taken.append(perf_counter() - started)
            return median(taken[WARM_UP:])

        seconds: list[tuple[float, float]] = []
        for run in range(runs):
            one, other = (
                timed(cache, lambda done=2 * run + i: progress(done, 2 * runs, "runs"))  # type: ignore[misc]
                for i, cache in enumerate((full, kept))
            )
            seconds.append((one, other))
        progress(2 * runs, 2 * runs, "runs")
    of_full, of_kept = zip(*seconds, strict=True)
    machine = Machine.of(loaded)
    return Speed(
        model=loaded.name,
        weights=machine.weights,
        device=machine.device,
        dtype=machine.dtype,
        threads=machine.threads,
        spec=spec,
        n_tokens=n_tokens,
        batch=batch,
        read_nbytes=read_bytes(loaded),
        full_nbytes=full_nbytes,
        kept_nbytes=kept_nbytes,
        full_seconds=of_full,
        kept_seconds=of_kept,
    )


def read_bytes(loaded: LoadedModel) -> int:
    """Number of bytes of the weights that a decoding step of a dense model reads: all but the rows of an embedding."""
    total = sum(p.numel() * p.itemsize for p in loaded.model.parameters())
    ends = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    read, written = (getattr(end, "weight", None) for end in ends)
    return total if read is None or written is read else total - read.numel() * read.itemsize
