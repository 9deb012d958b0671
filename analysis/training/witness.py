"""What training did to the heads, written down as it happens: the figures of each head every few hundred steps."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import numpy as np

from analysis.capturing import capture
from analysis.evaluation import bits_per_byte
from analysis.measures import correlation, sink_share
from analysis.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Record:
    """The heads at one step, as means over the texts of the witness; [L, H] but for `bos_norm`. None: undefined."""

    step: int
    tokens: int
    seconds: float
    loss: float | None  # of training, mean over the steps since the last record, nats a token
    bits_per_byte: float  # on the texts of the witness
    gamma: list[list[float | None]]
    gamma_without_first: list[list[float | None]]
    spearman: list[list[float | None]]
    sink_share: list[list[float | None]]  # of the probe's attention that goes to the first token
    bos_norm: list[list[float | None]]  # [L, Hkv], norm of the first token's key over the median norm

    def to_json(self) -> dict:
        return asdict(self)


def record(
    loaded: LoadedModel, texts: list[str], *, step: int, tokens: int, seconds: float, loss: float | None
) -> Record:
    """Look at every head of the model as it is now."""
    runs = [capture(loaded, text) for text in texts]
    return Record(
        step=step,
        tokens=tokens,
        seconds=round(seconds, 1),
        loss=None if loss is None else round(loss, 4),
        bits_per_byte=round(float(np.mean([bits_per_byte(loaded, text) for text in texts])), 4),
        gamma=_mean([correlation(run) for run in runs]),
        gamma_without_first=_mean([correlation(run, leave_out=1) for run in runs]),
        spearman=_mean([correlation(run, "spearman") for run in runs]),
        sink_share=_mean([sink_share(run) for run in runs]),
        bos_norm=_mean([run.key_norm[..., 0] / np.median(run.key_norm, axis=-1) for run in runs]),
    )


def _mean(figures: list[np.ndarray]) -> list[list[float | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a head that is undefined in all texts: None, below
        mean = np.nanmean(figures, axis=0)
    return [[None if np.isnan(x) else round(float(x), 3) for x in row] for row in mean]
