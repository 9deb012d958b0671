"""The Pareto front: held against single measurements, sentences by hand, equal bytes, files from strangers."""

import json
import math
import statistics
import subprocess
import sys

import numpy as np
import pytest

from analysis import ModelError, RecordError, TextError, capture, loss_curves
from analysis.demo import presets
from analysis.evaluation.lm import LmSettings
from analysis.models.load import LoadedModel
from analysis.plans.ablation import head_costs
from analysis.plans.allocation import BudgetError
from analysis.plans.curves import LossCurves
from analysis.plans.front import Front, costs_beside, measure_front, passes
from analysis.plans.strategies import KINDS, STRATEGIES, Strategy, plan, title_of
from analysis.records import from_json, to_json
from analysis.statistics import MIN_TEXTS, RESAMPLES, Interval, simultaneous
from analysis.texts.excerpts import excerpts
from analysis.texts.tokens import tokenize
from l2kv import CompressionSpec
from l2kv.config import CacheShape
from tests.support.evaluation import continuation_nll, front_of
from tests.support.models import build
from tests.support.paths import ROOT

LENGTHS = {"prompt_tokens": 100, "new_tokens": 3}
SETTINGS = LmSettings(**LENGTHS)
KEEPS = (0.2, 0.6)


@pytest.fixture(scope="module")
def texts(loaded):
    return excerpts(loaded.tokenizer, presets.bundled_texts(), n_tokens=110, at_most=5)


@pytest.fixture(scope="module")
def calls() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def front(loaded, texts, calls) -> Front:
    return measure_front(
        loaded,
        texts[:3],
        texts[3:],
        keep_ratios=KEEPS,
        settings=SETTINGS,
        protect_last=8,
        progress=lambda *call: calls.append(call[:2]),
    )


def test_every_strategy_is_measured_at_every_budget_or_named_as_left_out(front, calls):
    assert {(p.strategy, p.keep_ratio) for p in front.points} | {
        (words.split(", keep")[0], float(words.split("keep ratio ")[1].split(":")[0])) for words in front.left_out
    } == {(name, keep) for name in STRATEGIES for keep in KEEPS}
    assert any(words.startswith("skip_first_two, keep ratio 0.2: the keep ratio must be") for words in front.left_out)
    done = [done for done, _ in calls]
    assert done == sorted(done) and {0, 1, 2, 3, calls[-1][1]} <= set(done)
    assert calls[-1][1] == 3 + 3 * (1 + 24) + 2 + 2 * (1 + len({p.spec for p in front.points}))
    assert calls[0] == (0, passes(3, 2, keep_ratios=2, strategies=STRATEGIES, kv_heads=24))
    assert calls[0][1] - calls[-1][1] == 2 * (2 * len(STRATEGIES) - len({p.spec for p in front.points}))
    inside = [call for call in calls[: calls.index((1, calls[0][1]))] if call[0] == 0]
    assert len(inside) > 6  # of the first capture, layer by layer


def test_strategies_at_one_budget_hold_equal_bytes(front):
    pair = 2 * 32 * 4  # a key and a value of 32 float32 each
    for keep in KEEPS:
        sizes = [p.nbytes for p in front.points if p.keep_ratio == keep]
        # A prompt has 100 tokens; a head may round up by a pair, and a ratio is of whole percents.
        assert all(abs(size - keep * front.full_nbytes) <= 24 * (1 + 0.01 * 100) * pair for size in sizes)
    assert front.full_nbytes == 24 * 100 * pair


@pytest.mark.parametrize("strategy", ["by_head", "skip_first_two", "streaming"])
def test_a_point_is_what_its_spec_costs_against_the_full_cache(loaded, texts, front, strategy):
    point = next(p for p in front.lines[strategy] if p.keep_ratio == 0.6)
    for (_, text, _), change in zip(texts[3:], point.nll_change, strict=True):
        nll = [continuation_nll(loaded, text, spec, **LENGTHS) for spec in (point.spec, None)]
        assert change == pytest.approx(nll[0] - nll[1], abs=1e-5)
    assert front.measured_on == tuple(excerpt.name for excerpt in texts[3:])


def test_plans_are_made_from_the_planning_texts_alone(loaded, texts, front):
    runs = [capture(loaded, text[: tokenize(loaded.tokenizer, text).spans[99, 1]]) for _, text, _ in texts[:3]]
    curves = loss_curves(*runs, protect_last=8)
    by_direction = plan(curves, 0.2, "uniform_signed").to_spec()
    costs = head_costs(loaded, texts[:3], by_direction, settings=SETTINGS)
    curves = curves.weighted_by(costs.mean(axis=0), 0.2)
    for point in front.points:
        assert point.spec == plan(curves, point.keep_ratio, point.strategy).to_spec()
    whole = next(p for p in front.points if p.strategy == "uniform_low" and p.keep_ratio == 0.6)
    lost = [curves.low[layer, head, 60] for layer in range(6) for head in range(4)]
    assert whole.planned_loss == pytest.approx(sum(lost) / 24)
    without = {"streaming", "window"}  # policies of which there are no curves
    assert all(math.isnan(p.measured_loss) == (p.spec.policy in without) for p in front.points)


def test_bad_requests_are_refused(loaded, texts):
    with pytest.raises(TextError, match="both to plan on and to measure on"):
        measure_front(loaded, texts[:2], texts[1:3], settings=SETTINGS)
    with pytest.raises(TextError, match="other texts to measure on"):
        measure_front(loaded, texts[:2], [], settings=SETTINGS)
    with pytest.raises(ValueError, match="Did you mean 'by_head'"):
        measure_front(loaded, texts[:1], texts[1:2], strategies=["by_heads"], settings=SETTINGS)
    calls = []
    for wrong in (1.5, -0.1, math.nan, True):
        with pytest.raises(ValueError, match="keep_ratios must be from 0 to 1"):
            measure_front(
                loaded,
                texts[:1],
                texts[1:2],
                keep_ratios=[0.5, wrong],
                settings=SETTINGS,
                progress=lambda *call: calls.append(call),
            )
    assert not calls  # before anything is run


@pytest.fixture
def registered():
    """Register a strategy, for the time of a test."""
    names = []

    def register(name, allocate):
        STRATEGIES.register(name, Strategy("Toy", "A toy.", "plan", allocate, "low_norm"))
        names.append(name)

    yield register
    for name in names:
        STRATEGIES.remove(name)


def test_a_strategy_that_fails_for_another_reason_than_its_budget_is_not_left_out(loaded, texts, registered):
    def broken(budget):
        raise ValueError("a defect")

    registered("broken", broken)
    with pytest.raises(ValueError, match="a defect"):
        measure_front(loaded, texts[:1], texts[1:2], keep_ratios=[0.5], strategies=["broken"], settings=SETTINGS)


def test_a_strategy_that_is_registered_elsewhere_is_measured_with_all_others(loaded, texts, registered):
    registered("toy", lambda budget: np.linspace(0, 2 * budget.keep_ratio, len(budget.layer)))
    names = ["uniform_low", "toy"]
    front = measure_front(loaded, texts[:1], texts[1:2], keep_ratios=[0.5], strategies=names, settings=SETTINGS)
    assert list(front.lines) == names and front.points[1].spec.target_of(5, 3).ratio == 1.0
    assert title_of("toy") == "Toy" and title_of("forgotten") == "forgotten"


def test_a_model_of_sliding_windows_alone_is_refused_before_it_is_run(loaded, texts):
    sliding = build("qwen2", use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 3)
    with pytest.raises(ModelError, match="no layer that can be compressed"):
        measure_front(LoadedModel(sliding, loaded.tokenizer, "sliding"), texts[:1], texts[1:2], settings=SETTINGS)


def test_it_is_cancelled_by_raising(loaded, texts):
    class Cancelled(Exception):
        pass

    def stop(done, total, what):
        if done > 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        measure_front(loaded, texts[:1], texts[1:2], keep_ratios=(0.5,), settings=SETTINGS, progress=stop)


def test_a_stopped_one_goes_on_from_its_files_in_either_stage(loaded, texts, tmp_path):
    out, given = tmp_path / "part.jsonl", (loaded, texts[:1], texts[1:2])
    asked = {"keep_ratios": [0.5], "strategies": ["uniform_low", "by_head_by_cost"], "settings": SETTINGS}
    whole = measure_front(*given, **asked)
    kept = []
    for file in (costs_beside(out), out):

        def stop(done, total, what, file=file):
            if file.exists() and file.read_text().count("\n") > 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure_front(*given, **asked, out=out, progress=stop)
        kept.append(file.read_bytes())
    assert measure_front(*given, **asked, out=out) == whole
    assert costs_beside(out).read_bytes().startswith(kept[0]) and out.read_bytes().startswith(kept[1])


def curves_of(n_layers: int, *, n_tokens: int, protect_last: int) -> LossCurves:
    """Of a model in which all heads are alike."""
    falling = np.broadcast_to(np.linspace(1, 0, 101), (n_layers, 2, 101))
    return LossCurves(
        low=falling,
        high=falling,
        compressible=np.ones(n_layers, bool),
        status=np.full((n_layers, 2), "ok", dtype=object),
        gammas=np.zeros((1, n_layers, 2)),
        protect_last=protect_last,
        least_bin=math.ceil(100 * protect_last / n_tokens),
    )


@pytest.mark.parametrize("n_layers", [6, 32, 80])
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.12, 0.13, 0.3, 0.5])
def test_no_strategy_holds_more_than_its_budget_however_many_layers_are_protected(n_layers, keep):
    curves, shape = curves_of(n_layers, n_tokens=448, protect_last=32), CacheShape(tuple(range(n_layers)), 2, 2, 8, 4)
    pair, budget = 2 * 8 * 4, keep * shape.nbytes(448)
    for name in ("uniform_low", "skip_first_two", "by_head", "random"):
        ratio = (keep * n_layers - 2) / (n_layers - 2) if name.startswith("skip") else keep
        if ratio < 0.08:  # 32 of 448 tokens are 0.0714 of them, and bins are whole percents
            with pytest.raises(BudgetError):
                plan(curves, keep, name)
            continue
        spec = plan(curves, keep, name).to_spec()
        assert shape.nbytes(448, spec) <= budget + n_layers * 2 * pair  # a head may round up by a pair


# ------------------------------------------------------------------------------------------------------- made up


def made_up(**changes_by_strategy) -> Front:
    """A Pareto front at one budget whose points cost so much on each of 8 texts, give or take the same for all."""
    wobble = np.linspace(-0.01, 0.01, 8)
    return front_of(
        [
            (strategy, 0.5, CompressionSpec(), (change + wobble * (i + 1)).tolist())
            for i, (strategy, (change, _)) in enumerate(changes_by_strategy.items())
        ],
        losses={strategy: loss for strategy, (_, loss) in changes_by_strategy.items()},
    )


LOW, HIGH, PLAN, RANDOM = "uniform_low", "uniform_high", "by_head", "random"


def test_the_answer_names_a_plan_that_beats_the_best_uniform_strategy():
    answer = made_up(**{LOW: (0.3, 0.4), HIGH: (0.1, 0.3), PLAN: (0.04, 0.2), RANDOM: (0.5, 0.5)}).answer()
    assert answer.startswith("At keep ratio 0.5 a plan beats the best uniform strategy of the same bytes.")
    assert "(2.0 KiB), By head against Uniform (high norm): −0.060 nats/token (95 %" in answer
    assert (
        "Over 8 excerpts of 8 texts, by intervals that hold for all comparisons at once, plans win 1 of 1 and lose 0."
        in answer
    )
    assert "But" not in answer


def test_the_answer_says_that_none_does_and_that_random_does_as_well():
    answer = made_up(**{LOW: (0.3, 0.4), HIGH: (0.1, 0.3), PLAN: (0.2, 0.2), RANDOM: (0.1, 0.5)}).answer()
    assert answer.startswith("No plan is clearly better") and "luck" not in answer and "+0.100" in answer
    assert "plans win 0 of 1 and lose 1" in answer
    assert "no worse than any of them: Random at keep ratio 0.5 (+0.000 at 0.5)." in answer
    assert "cannot tell" in made_up(**{LOW: (0.3, 0.4)}).answer()


def test_a_lead_that_is_not_told_apart_may_be_luck():
    costs = {LOW: [0.1] * 8, PLAN: [0.0, 0.19] * 4}
    answer = front_of([(name, 0.5, CompressionSpec(), change) for name, change in costs.items()]).answer()
    assert "The best case is at keep ratio 0.5" in answer and "which may be luck" in answer
    assert "plans win 0 of 1 and lose 0" in answer


def test_every_baseline_is_named_with_the_budgets_that_it_is_as_good_at():
    costs = {LOW: (0.5, 0.3, 0.1), RANDOM: (0.4, 0.2, 0.3), "streaming": (0.6, 0.6, 0.05), PLAN: (0.9, 0.9, 0.9)}
    front = front_of(
        [
            (strategy, keep, CompressionSpec(), (cost,) * 8)
            for strategy, of in costs.items()
            for keep, cost in zip((0.1, 0.2, 0.3), of, strict=True)
        ]
    )
    assert front.answer().endswith(
        "no worse than any of them: Random at keep ratio 0.1, 0.2 (−0.100 at 0.1); StreamingLLM at keep ratio 0.3 "
        "(−0.050 at 0.3)."
    )


def test_too_few_texts_tell_nothing():
    few = front_of([(LOW, 0.5, CompressionSpec(), (0.3,) * 5), (PLAN, 0.5, CompressionSpec(), (0.04,) * 5)])
    assert MIN_TEXTS == 6
    assert few.answer() == "This Pareto front cannot tell: it was measured on 5 texts; 6 are needed."
    (one,) = few.comparisons()
    assert one.verdict == "not told apart" and math.isnan(one.less.low)


def test_the_best_plan_is_compared_with_the_best_uniform_strategy_text_by_text():
    costs = {LOW: (0.3, 0.4), HIGH: (0.25, 0.4), PLAN: (0.2, 0.2), "by_layer": (0.22, 0.2), RANDOM: (0.1, 0.5)}
    (one,) = made_up(**costs).comparisons()
    assert [c.plan.keep_ratio for c in random_front(np.random.default_rng(0)).comparisons()] == [
        0.1,
        0.2,
        0.3,
        0.5,
        0.7,
    ]
    assert (one.plan.strategy, one.uniform.strategy, one.verdict) == (PLAN, HIGH, "better")
    assert one.less.value == pytest.approx(np.mean(one.plan.nll_change) - np.mean(one.uniform.nll_change))
    assert one.less.high - one.less.low < 0.04 < np.ptp(one.plan.nll_change)  # texts differ more than the strategies do
    assert made_up(**{LOW: (0.3, 0.4), RANDOM: (0.2, 0.2)}).comparisons() == ()


def random_front(rng, *, better: float = 0.0) -> Front:
    """8 plans and 3 uniform strategies at 5 budgets, the same but for chance, on 16 texts; or plans `better`."""
    kinds = ("uniform", "plan")
    names = {kind: [name for name, one in STRATEGIES.items() if one.kind == kind] for kind in kinds}
    texts = rng.normal(0.3, 0.2, 16)  # some are hard for all
    points = [
        (line, keep, CompressionSpec(), tuple(texts + rng.normal(-better * (kind == "plan"), 0.05, 16)))
        for kind, lines in names.items()
        for line in lines
        for keep in (0.1, 0.2, 0.3, 0.5, 0.7)
    ]
    return front_of(points)


def test_where_plans_are_no_better_the_answer_is_hardly_ever_yes():
    rng = np.random.default_rng(0)
    answers = [random_front(rng).answer() for _ in range(60)]
    assert sum(answer.startswith("At keep ratio") for answer in answers) <= 6  # 3 expected at most, of 60
    assert sum("and lose 0" not in answer for answer in answers) <= 6
    assert random_front(rng, better=0.1).answer().startswith("At keep ratio 0.1, 0.2, 0.3, 0.5, 0.7")


def test_simultaneous_intervals_are_those_of_a_plain_loop():
    values = np.random.default_rng(3).normal(size=(7, 3)) * [1, 5, 0.1]
    got = simultaneous(values, seed=2)
    largest = []
    for signs in np.random.default_rng(2).choice([-1.0, 1.0], size=(RESAMPLES, 7)):
        flipped = [
            [sign * (row[k] - values[:, k].mean()) for row, sign in zip(values, signs, strict=True)] for k in range(3)
        ]
        largest.append(max(abs(statistics.mean(c)) / (statistics.stdev(c) / math.sqrt(7)) for c in flipped))
    c = np.quantile(largest, 0.95)
    for k, interval in enumerate(got):
        error = statistics.stdev(values[:, k]) / math.sqrt(7)
        mean = statistics.mean(values[:, k])
        assert (interval.value, interval.low, interval.high) == pytest.approx(
            (mean, mean - c * error, mean + c * error)
        )


@pytest.mark.parametrize("n", [6, 16])
def test_simultaneous_intervals_all_hold_in_95_of_100_cases(n):
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        values = rng.normal(size=(n, 40)) + rng.normal(size=(n, 1))  # of one text, they have something in common
        missed += any(interval.low > 0 or interval.high < 0 for interval in simultaneous(values))
    assert missed <= 20  # 10 are expected; by an interval of each alone it is most


def test_what_does_not_vary_or_is_undefined_spoils_no_other_interval():
    values = np.random.default_rng(0).normal(size=(8, 2))
    alone = simultaneous(values)
    same, undefined = np.full((8, 1), 0.25), np.where(np.arange(8)[:, None] == 3, np.nan, 1.0)
    both = simultaneous(np.hstack([values, same, undefined]))
    assert both[:2] == alone and both[2] == Interval(0.25, 0.25, 0.25)
    assert math.isnan(both[3].value) and math.isnan(both[3].low)


def test_expected_loss_that_orders_the_points_as_their_cost_agrees_fully():
    rising = made_up(**{LOW: (0.3, 0.4), HIGH: (0.2, 0.3), PLAN: (0.1, 0.2)})
    assert rising.agreement() == {0.5: pytest.approx(1)}
    assert made_up(**{LOW: (0.1, 0.4), HIGH: (0.2, 0.3), PLAN: (0.3, 0.2)}).agreement() == {0.5: pytest.approx(-1)}
    assert math.isnan(made_up(**{LOW: (0.1, 0.4), HIGH: (0.2, 0.3)}).agreement()[0.5])


# --------------------------------------------------------------------------------------------------------- files


def test_a_front_is_read_back_as_it_was_written(front):
    assert from_json(Front, to_json(front)) == front
    unknown = ["pyramid", "streaming"] * 2  # two budgets each; of their policies there are no curves
    assert sorted(p.strategy for p in front.points if math.isnan(p.measured_loss)) == sorted(unknown)
    undefined = front_of([(LOW, 0.5, CompressionSpec(), (None, 0.1))])
    (point,) = from_json(Front, to_json(undefined)).points
    assert math.isnan(point.nll_change[0]) and point.nll_change[1] == pytest.approx(0.1)


def test_a_front_of_version_1_is_refused_with_the_command_that_makes_it_again():
    with pytest.raises(RecordError, match=r"front of version 2: it is of version 1\. Make it again: l2kv front"):
        from_json(Front, '{"l2kv_front": 1, "model": "m"}')


def content_of_a_front() -> dict:
    """What the file of a Pareto front of one strategy on two texts says."""
    return json.loads(to_json(front_of([(LOW, 0.5, CompressionSpec(), (0.5, 0.25))], documents=("x", "y"))))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("l2kv_front",), 99, "it is of version 99"),
        (("results", "rows"), 3, "Expected `array`"),
        (("results", "rows"), [], "no texts"),
        (("results", "model"), 7, "Expected `str`"),
        (("results", "rows", 1, "score"), "x", "Expected `float"),
        (("results", "rows", 1, "score"), 10**400, "out of range"),
        (("results", "rows", 1, "nbytes"), 10**400, "nbytes must be"),
        (("results", "rows", 1, "nbytes"), -1, "nbytes must be"),
        (("results", "rows", 1, "document"), 1, "Expected `str`"),
        (("results", "rows", 1, "sample"), "another", "one row for each sample"),
        (("results", "methods", f"{LOW} 0.5", "keep_ratio"), 7, "keep_ratio must be from 0 to 1"),
        (("plans", 0, "keep_ratio"), 2, "keep_ratio must be"),
        (("plans", 0, "keep"), 0.5, r"plans has no field 'keep'"),
    ],
    ids=str,
)
def test_a_strangers_file_is_refused_with_the_reason(place, value, reason):
    within = content = content_of_a_front()
    for step in place[:-1]:
        within = within[step]
    within[place[-1]] = value
    if place[-1] == "rows" and value == []:
        content["results"]["methods"], content["plans"] = {"full cache": None}, []
    with pytest.raises(RecordError, match=reason):
        from_json(Front, json.dumps(content))


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"plans": [{}]}, "missing required field"),
        ({"plans": [{"strategy": "by_head", "keep_ratio": 0.5, "method": "nowhere"}]}, "results lack nowhere"),
        ({"plans": [{"strategy": "by_head", "keep_ratio": 0.5, "method": "full cache"}]}, "no plan"),
        ({"plans": [{"strategy": "by_head", "keep_ratio": -1, "method": "by_head 0.5"}]}, "from 0 to 1"),
        ({"results": {}}, "missing required field"),
        ({"planned_on": "a"}, "Expected `array`"),
    ],
)
def test_a_strangers_new_file_is_refused_with_the_reason(change, reason):
    content = json.loads(to_json(made_up(**{LOW: (0.3, 0.4)}))) | change
    with pytest.raises(RecordError, match=reason):
        from_json(Front, json.dumps(content))


def test_a_front_keeps_its_documents_and_its_intervals_resample_them():
    points = [(LOW, 0.5, CompressionSpec(), np.linspace(0.2, 0.4, 8)), (PLAN, 0.5, CompressionSpec(), (0.1,) * 8)]
    by_texts, by_documents = front_of(points), front_of(points, documents=tuple("xxxxyyyy"))
    assert from_json(Front, to_json(by_documents)).results.documents == tuple("xxxxyyyy")
    wide, narrow = (front.interval(front.points[0]) for front in (by_documents, by_texts))
    assert wide.value == narrow.value and wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
    assert "only 2 documents" in by_documents.answer() and "document" not in by_texts.answer()


def test_reading_a_front_or_a_check_does_not_wait_for_torch():
    code = "import sys, analysis.plans.front, analysis.plans.ablation; "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_every_strategy_is_of_a_kind_and_says_what_it_is():
    assert all(one.kind in KINDS and one.title and one.about.endswith(".") for one in STRATEGIES.values())
