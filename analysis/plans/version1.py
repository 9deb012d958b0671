"""Files of version 1: fronts with strategies by other names, and "causal checks", which are single-layer ablations now.

Both held NLL changes, text by text. Their content comes out as version 2 has it, with results of the task `lm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from analysis.evaluation.results import FULL, Methods, Results, Row
from l2kv.spec import CompressionSpec

Numbers = tuple[float | None, ...]
STRATEGIES = {
    "uniform, low norm": "uniform_low",
    "uniform, high norm": "uniform_high",
    "uniform, measured directions": "uniform_signed",
    "skip 0 and 1, low norm": "skip_first_two",
    "suggested skip list, low norm": "skip_suggested",
    "plan by layer": "by_layer",
    "plan by head": "by_head",
    "plan by head, no signal whole": "by_head_with_signal",
    "plan by head, weighed by cost": "by_head_by_cost",
    "global threshold": "global_threshold",
    "AdaKV's shares": "adakv",
    "first and latest": "streaming",
}
"""Name in version 1 -> name of the allocation strategy."""


@dataclass(frozen=True, slots=True)
class _Point:
    line: str
    keep: float
    spec: CompressionSpec
    nbytes: int
    nll_change: Numbers
    planned_loss: float | None = None
    measured_loss: float | None = None

    @property
    def strategy(self) -> str:
        return STRATEGIES.get(self.line, self.line)

    @property
    def method(self) -> str:
        return f"{self.strategy} {self.keep:.9g}"


@dataclass(frozen=True, slots=True)
class _Front:
    model: str
    planned_on: tuple[str, ...]
    measured_on: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    full_nbytes: int
    full_nll: Numbers
    points: tuple[_Point, ...]
    left_out: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _CausalCheck:
    model: str
    spec: CompressionSpec
    layers: tuple[int, ...]
    nll_change: tuple[Numbers, ...]
    loss: tuple[Numbers, ...]
    paper: tuple[Numbers, ...] | None = None
    documents: tuple[str, ...] = ()


def front(version: int, content: dict[str, Any]) -> dict[str, Any]:
    """Content of a front. Raises ValueError, or msgspec's ValidationError, where it is none."""
    old = msgspec.convert(content, _Front)
    results = of_changes(
        old.model,
        {point.method: point.spec for point in old.points},
        {point.method: point.nll_change for point in old.points},
        samples=old.measured_on,
        full_nll=old.full_nll,
        nbytes={FULL: old.full_nbytes} | {point.method: point.nbytes for point in old.points},
        documents=old.documents,
        settings={"prompt_tokens": old.prompt_tokens, "new_tokens": old.new_tokens},
    )
    plans = [
        {
            "strategy": point.strategy,
            "keep_ratio": point.keep,
            "method": point.method,
            "planned_loss": point.planned_loss,
            "measured_loss": point.measured_loss,
        }
        for point in old.points
    ]
    left_out = [_renamed(words) for words in old.left_out]
    return msgspec.to_builtins({"planned_on": old.planned_on, "results": results, "plans": plans, "left_out": left_out})


def _renamed(words: str) -> str:
    """Words that begin with the name of a strategy, by the longest that fits."""
    names = sorted(STRATEGIES, key=len, reverse=True)
    return next((STRATEGIES[name] + words[len(name) :] for name in names if words.startswith(name)), words)


def ablation(version: int, content: dict[str, Any]) -> dict[str, Any]:
    """Content of a causal check. Raises ValueError, or msgspec's ValidationError, where it is none."""
    old = msgspec.convert(content, _CausalCheck)
    n_layers, n_texts = max(old.layers, default=0) + 1, len(old.nll_change[0]) if old.nll_change else 0
    results = of_changes(
        old.model,
        {
            f"layer {layer}": replace(old.spec, skip_layers=tuple(k for k in range(n_layers) if k != layer))
            for layer in old.layers
        },
        {f"layer {layer}": row for layer, row in zip(old.layers, old.nll_change, strict=True)},
        samples=[str(i) for i in range(n_texts)],
        documents=old.documents,
    )
    kept = {"spec": old.spec, "layers": old.layers, "normalised_alr_rows": old.loss, "alr_rows": old.paper}
    return msgspec.to_builtins({"results": results, **kept})


def of_changes(
    model: str,
    specs: Methods,
    changes: Mapping[str, Sequence[float | None]],
    *,
    samples: Sequence[str],
    full_nll: Sequence[float | None] = (),
    nbytes: Mapping[str, int] | None = None,
    documents: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Results:
    """Results of the task `lm` from NLL changes against the full cache, [N] by method.

    Args:
        full_nll: [N] of the full cache; scores are changes, and its own are 0, where it is not known.
        nbytes: held by each method, the full cache among them; 0 where it is not known.

    Raises:
        ValueError: numbers, or documents, are not of the N samples.
    """
    full = tuple(full_nll) or (0.0,) * len(samples)
    settings = dict(settings or {}) | ({} if full_nll else {"scores": "changes against the full cache"})
    scores: dict[str, Sequence[float | None]] = {FULL: full}
    for name, values in changes.items():
        scores[name] = [
            None if one is None or base is None else one + base for one, base in zip(values, full, strict=True)
        ]
    rows = tuple(
        Row(name, sample, score, (nbytes or {}).get(name, 0), document=document)
        for name, of in scores.items()
        for sample, document, score in zip(samples, documents or [""] * len(samples), of, strict=True)
    )
    return Results(model, "", "lm", settings, {FULL: None, **specs}, rows)
