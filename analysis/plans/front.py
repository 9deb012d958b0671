"""The front: what each way to share out a cache's bytes costs in prediction, on texts it was not made from.

What comes of it is a `Front`, a record on disk (`analysis.plans.front_record`). Texts are split into those that plans
are made from and those that they are measured on by `analysis.texts.excerpts.planning_and_measuring`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import ModelError, SettingsError, TextError
from analysis.plans.allocation import BudgetError
from analysis.plans.curves import loss_curves, slim
from analysis.plans.front_record import Front, FrontPoint
from analysis.plans.strategies import WAYS
from analysis.texts.excerpts import Excerpt
from l2kv.config import CacheShape

if TYPE_CHECKING:
    from analysis.captures import Capture
    from analysis.evaluation.run import OnDone
    from analysis.models.load import LoadedModel

KEEPS = (0.1, 0.2, 0.3, 0.5, 0.7)


def passes(n_planning: int, n_measuring: int, *, keeps: int, ways: Iterable[str], kv_heads: int) -> int:
    """How many captures and continuations `measure_front` announces; fewer are run where ways agree on a spec.

    Args:
        n_planning, n_measuring: texts.
        keeps: how many budgets.
        kv_heads: of all layers that can be compressed; each is compressed alone where a way goes by costs.
    """
    ways = tuple(ways)
    costly = any(WAYS[way].needs_costs for way in ways)
    return n_planning * (1 + costly * (1 + kv_heads)) + n_measuring * (2 + len(ways) * keeps)


def measure_front(
    loaded: LoadedModel,
    plan_texts: Sequence[Excerpt | tuple[str, str]],
    test_texts: Sequence[Excerpt | tuple[str, str]],
    *,
    keeps: Sequence[float] = KEEPS,
    ways: Iterable[str] = tuple(WAYS),
    prompt_tokens: int,
    new_tokens: int,
    protect_last: int = 32,
    on_done: OnDone | None = None,
) -> Front:
    """Make the specs of all ways from the prompts of the planning texts, and measure them on the others.

    Takes a capture of each text's prompt, and for each of the N test texts a continuation by the full cache and by
    each spec; where a way goes by costs, one for each planning text and kv head as well. A way that cannot be had at a
    budget is left out, and named in `Front.left_out`.

    Args:
        plan_texts, test_texts: (name, text) of each, or `excerpts`; none may be in both.
        keeps: budgets, shares of the pairs of the layers that can be compressed.
        ways: names in `analysis.plans.strategies.WAYS`.
        on_done: for progress and cancelling, as `analysis.evaluation.run.OnDone`: after each capture and
            continuation, and with the same numbers in the middle of one.

    Raises:
        TextError: there are no texts, one is in both, empty or too short.
        ModelError: no layer can be compressed, or as `capture`.
        OutOfMemoryError: as `capture`.
        SettingsError: a way is unknown, a keep is not from 0 to 1, or as `continuations`.
    """
    from analysis.evaluation.run import continuations, ignore, prompt_of  # waits for torch
    from analysis.plans.ablation import weighed_by_cost
    from analysis.recorder import capture

    on_done, ways = on_done or ignore, tuple(ways)
    plan_texts, test_texts = ([Excerpt(*text) for text in texts] for texts in (plan_texts, test_texts))
    if wrong := [keep for keep in keeps if isinstance(keep, bool) or not 0 <= keep <= 1]:
        raise SettingsError(f"keeps must be from 0 to 1, got {', '.join(map(str, wrong))}")
    if unknown := [way for way in ways if way not in WAYS]:
        raise SettingsError(f"ways must be of {', '.join(WAYS)}; got {', '.join(map(repr, unknown))}")
    if not plan_texts or not test_texts:
        raise TextError("A front takes texts to plan on, and others to measure on.")
    if both := {one.text for one in plan_texts} & {one.text for one in test_texts}:
        raise TextError(f"A text to measure on was planned on, too: {next(iter(both))[:60]!r}. Give others.")
    shape = CacheShape.of(loaded.config, loaded.model.dtype.itemsize)
    if not shape.layers:
        raise ModelError(f"{loaded.name} has no layer that can be compressed: all have a sliding window.")
    kv_heads = len(shape.layers) * shape.n_kv_heads
    before = passes(len(plan_texts), 0, keeps=len(keeps), ways=ways, kv_heads=kv_heads)
    total = passes(len(plan_texts), len(test_texts), keeps=len(keeps), ways=ways, kv_heads=kv_heads)

    def captured(text: str, done: int) -> Capture:
        prompt = prompt_of(loaded, text, prompt_tokens)
        run = slim(capture(loaded, prompt, last_queries=0, progress=lambda *_: on_done(done, total)))
        on_done(done + 1, total)
        return run

    runs = [captured(one.text, i) for i, one in enumerate(plan_texts)]
    documents = [one.document or one.name for one in plan_texts]
    curves = loss_curves(*runs, protect_last=protect_last, documents=documents)
    if any(WAYS[way].needs_costs for way in ways):
        curves = weighed_by_cost(
            curves,
            loaded,
            [one.text for one in plan_texts],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            on_done=lambda done, _: on_done(len(plan_texts) + done, total),
        )
    made, left_out = {}, []
    for way in ways:
        for keep in keeps:
            try:
                made[way, keep] = WAYS[way].make(curves, keep)
            except BudgetError as error:
                left_out.append(f"{way}, keep {keep:g}: {error}")
    specs = tuple(dict.fromkeys(made.values()))
    losses = np.zeros((len(test_texts), len(specs)))
    for i, measured in enumerate(test_texts):
        one = loss_curves(captured(measured.text, before + i), protect_last=protect_last)
        losses[i] = [one.loss_of(spec) for spec in specs]
    before += len(test_texts)
    total = before + len(test_texts) * (1 + len(specs))
    full, *rows = continuations(
        loaded,
        [one.text for one in test_texts],
        (None, *specs),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        on_done=lambda done, _: on_done(before + done, total),
    )
    rows, expected = dict(zip(specs, rows, strict=True)), dict(zip(specs, losses.mean(axis=0), strict=True))
    return Front(
        model=loaded.name,
        planned_on=tuple(one.name for one in plan_texts),
        measured_on=tuple(one.name for one in test_texts),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        full_nbytes=_mean_bytes(full),
        full_nll=tuple(one.nll for one in full),
        points=tuple(
            FrontPoint(
                line=way,
                keep=float(keep),
                spec=spec,
                nbytes=_mean_bytes(rows[spec]),
                nll_change=tuple(one.nll - whole.nll for one, whole in zip(rows[spec], full, strict=True)),
                planned_loss=curves.loss_of(spec),
                measured_loss=float(expected[spec]),
            )
            for (way, keep), spec in made.items()
        ),
        left_out=tuple(left_out),
        documents=tuple(one.document or one.name for one in test_texts),
    )


def _mean_bytes(row) -> int:
    return round(sum(one.nbytes for one in row) / len(row))
