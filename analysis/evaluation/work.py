"""How long an evaluation will take: counts its tokens, and times a few. Scores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from analysis.evaluation.batches import Cells, cells_of
from analysis.evaluation.results import Methods, Work
from analysis.evaluation.run import joined, prefilled, samples_of
from analysis.evaluation.task import Sample
from analysis.models.load import LoadedModel
from analysis.preview import prepared
from analysis.texts.excerpts import Texts
from analysis.words import counted
from l2kv.decoding import decode_one_token

_TIMED = 512  # tokens of a context at most
_STEPS = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens and seconds that an evaluation takes from its beginning."""

    work: Work
    """Tokens to run, with every answer at its longest."""
    seconds: float
    """Seconds to run the model; an upper bound where answers are generated."""
    prefill_rate: float
    """Context tokens per second; 0 if there are none."""
    decode_rate: float
    """Tokens per second after a context, over all rows."""

    def __str__(self) -> str:
        work = self.work
        time = f"{self.seconds:.0f} s" if self.seconds < 100 else f"{self.seconds / 60:.0f} min"
        contexts = f"{counted(work.prefilled, 'context token')} ({work.saved:,} more saved by sharing passes), "
        return f"{time}: {contexts if work.prefilled else ''}at most {counted(work.decoded, 'token')} one by one"


@torch.inference_mode()
def estimate(
    loaded: LoadedModel, task: str, methods: Methods, *, texts: Texts | None = None, settings: object = None
) -> Estimate:
    """Count the tokens of an evaluation, and time a few tokens of a batch of median length.

    Raises:
        As `evaluate`.
    """
    samples, _, _ = samples_of(loaded, task, texts=texts, settings=settings)
    work, specs = work_of(samples, methods), tuple(dict.fromkeys(methods.values()))
    passes = sorted(cells_of(loaded, samples, specs), key=lambda one: len(one[0].samples[0].context)) if specs else []
    if not passes:
        return Estimate(work, 0.0, 0.0, 0.0)
    timed = passes[len(passes) // 2]
    with prepared(loaded):
        prefill_rate, per_step = _timed(loaded, timed)
    samples_of_passes = (of_pass[0].samples[0] for of_pass in passes)  # equally long within a pass
    n_steps = sum(len(sample.target) or sample.new_tokens for sample in samples_of_passes)
    seconds = n_steps * per_step + (work.prefilled / prefill_rate if work.prefilled else 0.0)
    rows = len(specs) * len(timed[0].samples)
    return Estimate(work, seconds, prefill_rate if work.prefilled else 0.0, rows / per_step)


def work_of(samples: Sequence[Sample], methods: Methods) -> Work:
    """Count the tokens of an evaluation, with every answer at its longest."""
    specs = len(set(methods.values()))
    context = sum(len(sample.context) for sample in samples)
    after = sum(len(sample.question) + (len(sample.target) or sample.new_tokens) - 1 for sample in samples)
    return Work(min(specs, 1) * context, max(specs - 1, 0) * context, specs * after)


def _timed(loaded: LoadedModel, of_pass: Sequence[Cells]) -> tuple[float, float]:
    """Context tokens per second, and seconds that a step of all batches of a pass takes, one after the other."""
    samples = [replace(one, context=_beginning(one)) for one in of_pass[0].samples]
    cut = [replace(cells, samples=tuple(samples)) for cells in of_pass]
    ids = torch.from_numpy(samples[0].question[:1]).to(loaded.device)
    loaded.model(ids[None])  # warms up: weights that lie in a file are read as they are used first
    started = perf_counter()
    compressed = prefilled(loaded, cut)
    _wait(ids)
    rate, per_step = len(samples) * len(samples[0].context) / (perf_counter() - started), 0.0
    for cells in cut:
        cache = joined(loaded, cells, [compressed(spec) for spec in cells.specs])
        token = ids.expand(len(list(cells.rows())), 1)
        token = decode_one_token(loaded.model, token, cache)  # warms up
        _wait(token)
        started = perf_counter()
        for _ in range(_STEPS):
            token = decode_one_token(loaded.model, token, cache)
        _wait(token)
        per_step += (perf_counter() - started) / _STEPS
    return rate, per_step


def _beginning(sample: Sample) -> np.ndarray:
    """The context to time, or as much of the target where there is none."""
    return (sample.context if len(sample.context) else sample.target[: len(sample.target) // 2])[:_TIMED]


def _wait(computed: Tensor) -> None:
    """Wait for a GPU to finish."""
    if computed.is_cuda:
        torch.cuda.synchronize(computed.device)
