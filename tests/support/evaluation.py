"""One NLL at a time; fronts, ablations and results made up from scores and NLL changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.evaluation.lm import LmSettings
from analysis.evaluation.results import FULL, Methods, Results, Row
from analysis.evaluation.run import evaluate
from analysis.models.load import LoadedModel
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front, Planned
from l2kv import CompressionSpec

MIB = 2**20


def continuation_nll(
    loaded: LoadedModel, text: str, spec: CompressionSpec | None, *, prompt_tokens: int, new_tokens: int
) -> float:
    """The NLL of the tokens after a prompt by one spec, in a run of its own."""
    settings = LmSettings(prompt_tokens, new_tokens)
    return float(evaluate(loaded, "lm", {"it": spec}, texts=[("it", text)], settings=settings).scores("it")[0])


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


def front_of(
    points: Sequence[tuple[str, float, CompressionSpec, Sequence[float]]],
    *,
    model: str = "made up",
    nbytes: Mapping[float, int] | None = None,
    full_nbytes: int = 4096,
    losses: Mapping[str, float] | None = None,
    documents: Sequence[str] = (),
) -> Front:
    """A Pareto front from (strategy, keep ratio, spec, NLL changes of N texts); each holds 2048 bytes by default."""
    names, losses = [f"{name} {keep:g}" for name, keep, *_ in points], losses or {}
    n = len(points[0][-1])
    results = of_changes(
        model,
        {name: point[2] for name, point in zip(names, points, strict=True)},
        {name: point[-1] for name, point in zip(names, points, strict=True)},
        samples=[f"text {i}" for i in range(n)],
        full_nll=(3.0,) * n,
        nbytes={FULL: full_nbytes}
        | {name: (nbytes or {}).get(p[1], 2048) for name, p in zip(names, points, strict=True)},
        documents=documents,
        settings={"prompt_tokens": 384, "new_tokens": 32},
    )
    planned = tuple(
        Planned(strategy, keep, name, losses.get(strategy), losses.get(strategy))
        for name, (strategy, keep, *_) in zip(names, points, strict=True)
    )
    return Front(("a",), results, planned)


def ablation_of(
    change, normalised_alr=None, *, spec=None, layers=None, model="made up", alr=None, documents=()
) -> Ablation:
    """An ablation of NLL changes [K, N]; ALR is 1 by default."""
    change = np.asarray(change, float)
    layers = tuple(range(len(change))) if layers is None else tuple(layers)
    spec = spec or CompressionSpec(keep_ratio=0.3)

    def rows(values):
        return tuple(tuple(None if np.isnan(x) else float(x) for x in row) for row in np.asarray(values, float))

    results = of_changes(
        model,
        {f"layer {layer}": spec for layer in layers},
        {f"layer {layer}": row for layer, row in zip(layers, rows(change), strict=True)},
        samples=[f"text {i}" for i in range(change.shape[1])],
        documents=documents,
    )
    normalised = rows(np.ones_like(change) if normalised_alr is None else normalised_alr)
    return Ablation(spec, layers, results, normalised, None if alr is None else rows(alr))


def passkeys_of(found: dict[str, dict[tuple[int, float], list[int]]]) -> Results:
    """Results of the task `passkey`: method -> (tokens, depth) -> found or not. The full cache holds 4 MiB."""
    rows = [
        Row(method, f"{n} {depth} {i}", score, (4 if method == FULL else 1) * MIB, at={"n_tokens": n, "depth": depth})
        for method, places in found.items()
        for (n, depth), scores in places.items()
        for i, score in enumerate(scores)
    ]
    specs = {name: None if name == FULL else CompressionSpec(0.25) for name in found}
    return Results("a model", "", "passkey", {}, specs, tuple(rows))


def predictions_of(changes: dict[str, list[list[float]]], *, full: bool = True) -> Results:
    """Results of the task `lm` from changes of an NLL of 2, method -> [documents][tokens]; half of the tokens hit."""
    shape = np.shape(next(iter(changes.values())))
    rows = [
        Row(
            method, f"s{i}", 2 + float(np.mean(of)), (2 if method == FULL else 1) * MIB, document=f"d{i}",
            decoded=len(of), nats=tuple(2 + change for change in of), hits=tuple(k % 2 for k in range(len(of))),
        )
        for method, documents in (({FULL: np.zeros(shape).tolist()} if full else {}) | changes).items()
        for i, of in enumerate(documents)
    ]  # fmt: skip
    specs = {row.method: None if row.method == FULL else CompressionSpec(0.5) for row in rows}
    return Results("a model", "", "lm", {}, specs, tuple(rows))
