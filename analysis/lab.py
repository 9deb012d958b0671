"""The policy lab: what can be said of an eviction policy in a minute, beside others that look at keys alone.

Does the order of its scores agree with attention, and is it on the Pareto front? It composes a capture, the metrics of
heads and the results of tasks, and measures nothing of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from analysis.defaults import RECENT_WINDOW
from analysis.errors import SettingsError, TextError
from analysis.evaluation.lm import LmSettings
from analysis.evaluation.passkey import PasskeySettings
from analysis.evaluation.results import FULL, Methods, Results
from analysis.evaluation.tasks import TASKS
from analysis.models.memory import LAST_QUERIES
from analysis.progress import Progress, unheard
from analysis.studies import Study, study_of
from analysis.texts.excerpts import Texts, excerpts_from
from l2kv.policies import POLICIES, Pairs, Policy
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.captures import Capture
    from analysis.models.load import LoadedModel
    from l2kv.hooks import Look

OTHERS = ("low_norm", "keydiff", "random")
"""Policies that one is shown beside."""
KEEP_RATIOS = (0.5, 0.25)
EXCERPTS = 6
"""Texts, the fewest of which there are intervals."""
# All together, with a model of 135 million weights on two cores: a minute.
PREDICTION = LmSettings(prompt_tokens=384, new_tokens=32)
PASSKEYS = PasskeySettings(lengths=(400,), depths=(0.1, 0.5, 0.9), keys=2)
OF_ORDER = ("gamma", "gamma_skip_first", "alr", "alr_chance", "alr_per_token")
"""Metrics of an order, be it that of norms or of scores."""


def studies_by_policy(
    loaded: LoadedModel,
    texts: Texts,
    policies: Iterable[str],
    *,
    probe: str = "next token",
    progress: Progress = unheard,
) -> dict[str, Study]:
    """Measure how the order of each policy's scores agrees with attention, in one capture of each text for all.

    The numbers are `OF_ORDER` of `analysis.metrics`, with low scores in place of high norms: Γ is -1 where the
    pairs of highest score get the most attention, and ALR is the attention lost beyond the ideal order.

    Args:
        policies: names of policies that look at keys, values and positions alone.
        progress: counts texts.

    Raises:
        SettingsError: a policy needs more than that, or there is no such probe.
        SpecError: there is no such policy, or its file gives no scores.
        TextError, ModelError, OutOfMemoryError: as `capture`, and TextError if there are no texts.
    """
    from analysis.recorder import capture  # waits for torch

    names, given = tuple(dict.fromkeys(policies)), excerpts_from(texts)
    if not given:
        raise TextError("There are no texts to measure agreement with attention on.")
    for name in names:
        if not by_pairs_alone(POLICIES.find(name)):
            raise SettingsError(f"The order of {name} depends on more than keys and values: leave it out.")
    rows = LAST_QUERIES if probe == "last queries" else 0
    runs: dict[str, list[Capture]] = {name: [] for name in names}
    for i, text in enumerate(given):
        scores: dict[str, list[np.ndarray]] = {name: [] for name in names}

        def look(at: Look, scores: dict[str, list[np.ndarray]] = scores) -> None:
            for name, of_layers in scores.items():
                of_layers.append(_scores(name, at))

        run = capture(
            loaded,
            text.text,
            last_queries=rows,
            look=look,
            progress=lambda *_, i=i: progress(i, len(given), "texts"),
        )
        for name in names:  # norms that differ by rounding alone are equal already
            runs[name].append(run if name == "low_norm" else run.with_order(np.stack(scores[name])))
        progress(i + 1, len(given), "texts")
    documents = [text.document or text.name for text in given]
    return {name: study_of(*runs[name], probes=[probe], names=OF_ORDER, documents=documents) for name in names}


def by_pairs_alone(policy: Policy) -> bool:
    """Tell whether a policy looks at keys, values and positions alone."""
    return not (policy.needs_attention or policy.needs_calibration or policy.needs_token_ids)


def _scores(policy: str, at: Look) -> np.ndarray:
    """Scores of all pairs of one layer, [Hkv, T] float64."""
    import torch

    _, n_heads, n, _ = at.key.shape
    pairs = Pairs(at.key, at.value, torch.arange(n, device=at.key.device), at.source, tuple(range(n_heads)))
    scores = POLICIES[policy].score(pairs).float().expand(1, n_heads, n)[0]
    found: np.ndarray = scores.cpu().numpy().astype(np.float64)
    return found


def methods(
    policies: Iterable[str], keep_ratios: Iterable[float] = KEEP_RATIOS, *, protect_last: int = RECENT_WINDOW
) -> Methods:
    """Make a method of each policy and keep ratio, "keydiff 0.5", after the full cache; all protect the same tokens."""
    specs: dict[str, CompressionSpec | None] = {FULL: None}
    for keep in keep_ratios:
        for policy in policies:
            specs[f"{policy} {keep:g}"] = CompressionSpec(keep_ratio=keep, policy=policy, protect_last=protect_last)
    return specs


def on_front(results: Results) -> tuple[str, ...]:
    """Name the methods on the Pareto front: whatever holds no more bytes and scores no worse is no better in either."""
    sign = 1 if TASKS[results.task].higher_is_better else -1
    places = {name: (-results.nbytes(name), sign * results.scores(name).mean()) for name in results.methods}
    return tuple(
        name
        for name, place in places.items()
        if np.isfinite(place[1])
        and not any(other != place and other[0] >= place[0] and other[1] >= place[1] for other in places.values())
    )
