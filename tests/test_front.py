"""The front: what is measured against single measurements, its sentences by hand, equal bytes, files from strangers."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from analysis import RunFileError, TextError, capture, loss_curves, presets
from analysis.evaluation import continuation_nll
from analysis.models import LoadedModel
from analysis.plans.causal import head_costs
from analysis.plans.front import Front, FrontPoint, measure_front
from analysis.plans.ways import KINDS, WAYS
from analysis.study import pieces
from analysis.tokens import tokenize
from l2kv import CompressionSpec
from tests.conftest import BUNDLED, ROOT

LENGTHS = {"prompt_tokens": 100, "new_tokens": 3}
KEEPS = (0.2, 0.6)


@pytest.fixture(scope="module")
def loaded(models) -> LoadedModel:
    return LoadedModel(models("books-5m"), AutoTokenizer.from_pretrained(BUNDLED), "books-5m")


@pytest.fixture(scope="module")
def texts(loaded):
    return pieces(loaded.tokenizer, presets.bundled_texts(), n_tokens=110, at_most=5)


@pytest.fixture(scope="module")
def calls() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def front(loaded, texts, calls) -> Front:
    return measure_front(
        loaded, texts[:3], texts[3:], keeps=KEEPS, protect_last=8, on_done=lambda *call: calls.append(call), **LENGTHS
    )


def test_every_way_is_measured_at_every_budget_or_named_as_left_out(front, calls):
    assert {(p.line, p.keep) for p in front.points} | {
        (words.split(", keep")[0], float(words.split("keep ")[1].split(":")[0])) for words in front.left_out
    } == {(way, keep) for way in WAYS for keep in KEEPS}
    assert any(words.startswith("skip 0 and 1, low norm, keep 0.2: layers 0 and 1") for words in front.left_out)
    assert [done for done, _ in calls] == list(range(1, calls[-1][1] + 1))
    assert calls[-1][1] == 3 + 3 * (1 + 24) + 2 + 2 * (1 + len({p.spec for p in front.points}))


def test_ways_at_one_budget_hold_equal_bytes(front):
    pair = 2 * 32 * 4  # a key and a value of 32 float32 each
    for keep in KEEPS:
        sizes = [p.nbytes for p in front.points if p.keep == keep]
        # 102 tokens are in the cache at last; a head may round up by a pair, and a ratio is of whole percents.
        assert all(abs(size - keep * front.full_nbytes) <= 24 * (1 + 0.01 * 102) * pair for size in sizes)
    assert front.full_nbytes == 24 * 102 * pair


@pytest.mark.parametrize("line", ["plan by head", "skip 0 and 1, low norm", "first and latest"])
def test_a_point_is_what_its_spec_costs_against_the_full_cache(loaded, texts, front, line):
    point = next(p for p in front.lines[line] if p.keep == 0.6)
    for (_, text), change in zip(texts[3:], point.nll_change, strict=True):
        nll = [continuation_nll(loaded, text, spec, **LENGTHS) for spec in (point.spec, None)]
        assert change == pytest.approx(nll[0] - nll[1], abs=1e-5)
    assert front.measured_on == tuple(name for name, _ in texts[3:])


def test_plans_are_made_from_the_planning_texts_alone(loaded, texts, front):
    runs = [capture(loaded, text[: tokenize(loaded.tokenizer, text).spans[99, 1]]) for _, text in texts[:3]]
    curves = loss_curves(*runs, protect_last=8)
    by_direction = WAYS["uniform, measured directions"].make(curves, 0.2)
    costs = head_costs(loaded, [text for _, text in texts[:3]], by_direction, **LENGTHS)
    curves = curves.weighed(costs.mean(axis=0), 0.2)
    for point in front.points:
        assert point.spec == WAYS[point.line].make(curves, point.keep)
    whole = next(p for p in front.points if p.line == "uniform, low norm" and p.keep == 0.6)
    lost = [curves.low[layer, head, 60] for layer in range(6) for head in range(4)]
    assert whole.planned_loss == pytest.approx(sum(lost) / 24)
    assert all(math.isnan(p.measured_loss) == (p.line == "first and latest") for p in front.points)


def test_bad_requests_are_refused(loaded, texts):
    with pytest.raises(TextError, match="planned on, too"):
        measure_front(loaded, texts[:2], texts[1:3], **LENGTHS)
    with pytest.raises(TextError, match="others to measure on"):
        measure_front(loaded, texts[:2], [], **LENGTHS)
    with pytest.raises(ValueError, match="ways must be of"):
        measure_front(loaded, texts[:1], texts[1:2], ways=["my own"], **LENGTHS)


def test_it_is_cancelled_by_raising(loaded, texts):
    class Cancelled(Exception):
        pass

    def stop(done, total):
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        measure_front(loaded, texts[:1], texts[1:2], keeps=(0.5,), on_done=stop, **LENGTHS)


# ------------------------------------------------------------------------------------------------------- made up


def made_up(**changes_by_line) -> Front:
    """A front at one budget whose points cost so much on each of 8 texts, give or take the same for all."""
    wobble = np.linspace(-0.01, 0.01, 8)
    return Front(
        model="made up",
        planned_on=("a",),
        measured_on=tuple("bcdefghi"),
        prompt_tokens=10,
        new_tokens=2,
        full_nbytes=4096,
        full_nll=(3.0,) * 8,
        points=tuple(
            FrontPoint(line, 0.5, CompressionSpec(), 2048, tuple((change + wobble * (i + 1)).tolist()), loss, loss)
            for i, (line, (change, loss)) in enumerate(changes_by_line.items())
        ),
    )


LOW, HIGH, PLAN, RANDOM = "uniform, low norm", "uniform, high norm", "plan by head", "random"


def test_the_answer_names_a_plan_that_beats_the_best_uniform_rule():
    answer = made_up(**{LOW: (0.3, 0.4), HIGH: (0.1, 0.3), PLAN: (0.04, 0.2), RANDOM: (0.5, 0.5)}).answer()
    assert answer.startswith("Yes: at keep 0.5 a plan beats the best uniform rule by norm at equal bytes")
    assert "(2.0 KiB), plan by head against uniform, high norm: −0.060 (95 %" in answer
    assert "1 of 1 comparisons are won and 0 lost" in answer and "But" not in answer


def test_the_answer_says_that_none_does_and_that_dice_do_as_well():
    answer = made_up(**{LOW: (0.3, 0.4), HIGH: (0.1, 0.3), PLAN: (0.2, 0.2), RANDOM: (0.1, 0.5)}).answer()
    assert answer.startswith("No: no plan beats") and "+0.100" in answer
    assert "0 of 1 comparisons are won and 1 lost" in answer
    assert "But random, which reads no norms, is no worse than all of them at keep 0.5" in answer
    assert "cannot tell" in made_up(**{LOW: (0.3, 0.4)}).answer()


def test_differences_are_paired_by_text():
    front = made_up(**{LOW: (0.3, 0.4), PLAN: (0.2, 0.2)})
    low, plan = (np.array(front.lines[line][0].nll_change) for line in (LOW, PLAN))
    got = front.against(PLAN, LOW)[0.5]
    assert got.value == pytest.approx((plan - low).mean())
    assert got.high - got.low < 0.02 < np.ptp(plan)  # the texts differ more than the two ways do


def test_expected_loss_that_orders_the_points_as_their_cost_agrees_fully():
    rising = made_up(**{LOW: (0.3, 0.4), HIGH: (0.2, 0.3), PLAN: (0.1, 0.2)})
    assert rising.agreement() == {0.5: pytest.approx(1)}
    assert made_up(**{LOW: (0.1, 0.4), HIGH: (0.2, 0.3), PLAN: (0.3, 0.2)}).agreement() == {0.5: pytest.approx(-1)}
    assert math.isnan(made_up(**{LOW: (0.1, 0.4), HIGH: (0.2, 0.3)}).agreement("planned_loss")[0.5])


# --------------------------------------------------------------------------------------------------------- files


def test_a_front_is_read_back_as_it_was_written(front):
    assert Front.from_json(front.to_json()).to_json() == front.to_json()
    told = [p for p in front.points if p.line != "first and latest"]  # NaN is not equal to itself
    assert [p for p in Front.from_json(front.to_json()).points if p.line != "first and latest"] == told
    undefined = replace(front.points[0], nll_change=(math.nan, 0.1))
    (point,) = Front.from_json(replace(front, points=(undefined,)).to_json()).points
    assert math.isnan(point.nll_change[0]) and point.nll_change[1] == 0.1


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"points": [{}]}, "it has no"),
        ({"points": 3}, "not iterable"),
        ({"model": 7}, "must be text"),
        ({"full_nll": [1.0]}, "8 texts"),
        ({"full_nbytes": -1}, "whole number"),
        ({"l2kv_front": 99}, "version 1"),
        ({"spec": {"keep_ratio": 7}}, "keep_ratio must be from 0 to 1"),
        ({"keep": 2}, "keep must be"),
        ({"nll_change": ["x"] * 8}, "number is needed"),
    ],
)
def test_a_strangers_file_is_refused_with_the_reason(change, reason):
    content = json.loads(made_up(**{LOW: (0.3, 0.4)}).to_json())
    if set(change) <= set(content):
        content |= change
    else:
        content["points"][0] |= change
    with pytest.raises(RunFileError, match=reason):
        Front.from_json(json.dumps(content))


def test_reading_a_front_or_a_check_does_not_wait_for_torch():
    code = "import sys, analysis.plans.front, analysis.plans.causal; "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_every_way_is_of_a_kind_and_says_what_it_is():
    assert all(way.kind in KINDS and way.about for way in WAYS.values())
