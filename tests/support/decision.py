"""Results of the three tasks that a decision rests on, made up of scores."""

from analysis.evaluation.results import FULL, Results, Row
from analysis.evaluation.tasks import TASKS
from l2kv import CompressionSpec

HALF = CompressionSpec(keep_ratio=0.5, protect_last=32)
PLAN = CompressionSpec(head_ratios={(0, 0): 0.4, (0, 1): 0.6}, protect_last=32)


def results(task, scores, *, model="tiny", weights="w", nbytes=None, documents=None):
    """Results of {method: (spec, scores)}; the full cache is the one whose spec is None."""
    rows = [
        Row(name, f"{task} {i}", score, (nbytes or {}).get(name, 100), document=documents[i] if documents else "")
        for name, (_, of) in scores.items()
        for i, score in enumerate(of)
    ]
    return Results(model, weights, task, {}, {name: spec for name, (spec, _) in scores.items()}, tuple(rows))


def lm(*changes, spec=HALF, **more):
    return results("lm", {FULL: (None, [2.0] * len(changes)), "it": (spec, [2.0 + c for c in changes])}, **more)


def found(task, ours, full=50, n=50, spec=HALF, **more):
    """`ours` and `full` of n samples found, those of ours among those of full."""
    right = TASKS[task].right
    scores = {name: (its, [right] * k + [0.0] * (n - k)) for name, its, k in ((FULL, None, full), ("it", spec, ours))}
    return results(task, scores, **more)
