"""One NLL at a time, and fronts and ablations made up from NLL changes."""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.evaluation.lm import LmSettings
from analysis.evaluation.results import FULL
from analysis.evaluation.run import evaluate
from analysis.models.load import LoadedModel
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front, Planned
from analysis.plans.version1 import of_changes
from l2kv import CompressionSpec


def continuation_nll(
    loaded: LoadedModel, text: str, spec: CompressionSpec | None, *, prompt_tokens: int, new_tokens: int
) -> float:
    """The NLL of the tokens after a prompt by one spec, in a run of its own."""
    settings = LmSettings(prompt_tokens, new_tokens)
    return float(evaluate(loaded, "lm", {"it": spec}, texts=[("it", text)], settings=settings).scores("it")[0])


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
