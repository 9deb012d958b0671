"""How long an evaluation will take: counts its tokens, and times a few. Scores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from analysis.evaluation.results import Methods, Work, passes
from analysis.evaluation.run import batches, samples_of
from analysis.evaluation.task import Sample
from analysis.models.load import LoadedModel
from analysis.preview import prepared
from analysis.texts.excerpts import Texts
from l2kv import CompressionSpec
from l2kv.decoding import decode_one_token, new_cache, prefill

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
    """Tokens per second after a context, over all rows of a batch."""

    def __str__(self) -> str:
        work = self.work
        time = f"{self.seconds:.0f} s" if self.seconds < 100 else f"{self.seconds / 60:.0f} min"
        contexts = f"{work.prefilled:,} context tokens ({work.saved:,} more saved by sharing passes), "
        return f"{time}: {contexts if work.prefilled else ''}at most {work.decoded:,} tokens one by one"


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
    in_batches = sorted(batches(samples), key=lambda batch: len(batch[0].context) + len(batch[0].target))
    if not in_batches or not specs:
        return Estimate(work, 0.0, 0.0, 0.0)
    batch = in_batches[len(in_batches) // 2]
    timed = list(dict.fromkeys([None if None in specs else specs[0], next(filter(None, specs), None)]))
    with prepared(loaded):
        prefill_rate, steps = _timed(loaded, batch, timed)
    n_full = sum(spec is None for spec in specs)
    per_step = (steps[0] * n_full + steps[-1] * (len(specs) - n_full)) / len(specs)
    n_steps = len(specs) * sum(len(batch[0].target) or batch[0].new_tokens for batch in in_batches)
    seconds = n_steps * per_step + (work.prefilled / prefill_rate if work.prefilled else 0.0)
    return Estimate(work, seconds, prefill_rate if work.prefilled else 0.0, len(batch) / per_step)


def work_of(samples: Sequence[Sample], methods: Methods) -> Work:
    """Count the tokens of an evaluation, with every answer at its longest."""
    specs = set(methods.values())
    runs, saved = passes(specs)
    context = sum(len(sample.context) for sample in samples)
    after = sum(len(sample.question) + (len(sample.target) or sample.new_tokens) - 1 for sample in samples)
    return Work(runs * context, saved * context, len(specs) * after)


def _timed(
    loaded: LoadedModel, batch: Sequence[Sample], specs: Sequence[CompressionSpec | None]
) -> tuple[float, list[float]]:
    """Context tokens per second, and seconds that one step of the batch takes with each spec."""
    fill = [sample.context if len(sample.context) else sample.target[: len(sample.target) // 2] for sample in batch]
    ids = torch.stack([torch.from_numpy(one[:_TIMED]) for one in fill]).to(loaded.device)
    rates, steps = [], []
    for spec in specs:
        cache = new_cache(loaded.config, spec, special_ids=loaded.special_ids(spec))
        started = perf_counter()
        if ids.shape[1]:
            prefill(loaded.model, ids, cache)
        _wait(ids)
        rates.append(ids.numel() / (perf_counter() - started))
        token = torch.from_numpy(batch[0].question[:1]).to(loaded.device).expand(len(batch), 1)
        token = decode_one_token(loaded.model, token, cache)  # warms up
        _wait(token)
        started = perf_counter()
        for _ in range(_STEPS):
            token = decode_one_token(loaded.model, token, cache)
        _wait(token)
        steps.append((perf_counter() - started) / _STEPS)
    return max(rates), steps


def _wait(computed: Tensor) -> None:
    """Wait for a GPU to finish."""
    if computed.is_cuda:
        torch.cuda.synchronize(computed.device)
