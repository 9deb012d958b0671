"""GO or NO-GO against cases worked by hand: the rules, their borders, and results that cannot count."""

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.decision.checklist import Answer, Limits, Status, decide
from analysis.decision.evidence import Estimate, Evidence, Sizes
from analysis.decision.speed import Speed
from analysis.errors import SettingsError
from analysis.evaluation.results import FULL
from analysis.evaluation.tasks import TASKS
from analysis.plans.skip import Plan
from analysis.records import load, save
from tests.support.decision import HALF, PLAN, found, lm, results

GOOD = (lm(*[0.01] * 16), found("passkey", 50), found("needle", 50))


def status(decision):
    return [check.status.value for check in decision.checks]


def test_what_passes_all_checks_is_go():
    decision = decide(GOOD, HALF)
    assert decision.answer is Answer.GO == "GO"
    assert status(decision) == ["passed"] * 3
    ratio, points = decision.checks[0].measured, decision.checks[1].measured
    assert ratio.value == ratio.high == pytest.approx(math.exp(0.01))  # all excerpts alike: an interval of no width
    assert (points.value, points.low, points.high) == (0, 0, 0)
    assert "× 1.010" in decision.checks[0].says and "over 16 excerpts" in decision.checks[0].says


def test_it_is_the_upper_end_of_the_ratio_that_must_be_within_the_limit_not_its_mean():
    wide = lm(*[-0.05, 0.07] * 8)  # mean +0.01; standard error 0.015: the interval ends near +0.01 + 1.96 * 0.015
    decision = decide([wide, *GOOD[1:]], HALF, plan=PLAN)
    ratio = decision.checks[0].measured
    assert ratio.value == pytest.approx(math.exp(0.01))
    assert math.log(ratio.high) == pytest.approx(0.01 + 1.96 * 0.06 / 4, abs=0.004)
    assert decision.checks[0].status is Status.FAILED
    assert decide([wide, *GOOD[1:]], HALF, limits=Limits(perplexity_ratio=1.05)).answer is Answer.GO


def test_excerpts_of_one_document_are_resampled_with_it():
    changes = [0.0] * 8 + [0.03] * 8
    of_two = lm(*changes, documents=["a"] * 8 + ["b"] * 8)  # a resample has a alone or b alone in half of the cases
    ratio = decide([of_two], HALF).checks[0].measured
    assert (ratio.low, ratio.high) == (pytest.approx(1.0), pytest.approx(math.exp(0.03)))
    assert "only 2 documents" in decide([of_two], HALF).checks[0].says
    alone = decide([lm(*changes)], HALF).checks[0].measured
    assert alone.high < ratio.high


@pytest.mark.parametrize(("ours", "passes"), [(50, True), (49, False), (48, False)])
def test_one_of_fifty_lost_is_a_difference_whose_interval_reaches_six_points(ours, passes):
    """Of 50 draws with one loss among 50 samples, three losses or more come up in 8 % of cases: 6 points."""
    least = sum(math.comb(50, k) * 0.02**k * 0.98 ** (50 - k) for k in range(3))
    assert 1 - least > 0.025  # so the lower end of a 95 % interval is at three losses, or beyond
    decision = decide([GOOD[0], found("passkey", ours), GOOD[2]], HALF)
    assert (decision.checks[1].status is Status.PASSED) == passes
    assert decision.checks[1].measured.value == pytest.approx(2 * (ours - 50))
    assert f"It finds {ours} of 50, the full cache 50" in decision.checks[1].says


def test_what_the_full_cache_does_not_find_is_not_held_against_anyone():
    decision = decide([GOOD[0], found("passkey", 0, full=44), GOOD[2]], HALF)
    assert status(decision) == ["passed", "not applicable", "passed"]
    assert decision.answer is Answer.GO and decision.why.endswith("is not judged: passkey.")
    assert "44 of 50, less than 90%" in decision.checks[1].says
    assert decide([GOOD[0], found("passkey", 0, full=45), GOOD[2]], HALF).checks[1].status is Status.FAILED


def test_too_few_samples_say_how_many_are_missing():
    decision = decide([lm(*[0.0] * 12), found("passkey", 20, 20, 20)], HALF)
    assert decision.answer is Answer.NOT_YET and status(decision) == ["not yet"] * 3
    assert "4 more excerpts, 30 more passkeys, 50 needles" in decision.why
    assert decide([lm(*[0.0] * 12), *GOOD[1:]], HALF, limits=Limits(least_excerpts=12)).answer is Answer.GO
    assert decide([], HALF).answer is Answer.NOT_YET
    begun = results("lm", {FULL: (None, []), "it": (HALF, []), "plan": (PLAN, [])})
    assert Evidence((begun,), (Plan("tiny", PLAN),)).decide(HALF).answer is Answer.NOT_YET


def test_a_failure_is_an_answer_though_the_rest_is_not_measured():
    failed = lm(*[0.4] * 16)
    assert decide([failed], HALF).answer is Answer.NOT_YET  # a plan may pass
    told = "As set, it fails: perplexity × 1.492 (95 % up to 1.492). A plan of the same bytes may pass; none is "
    told += "measured yet."
    assert decide([failed], HALF).why == told
    larger = [
        results(
            one.task,
            {FULL: (None, list(one.scores(FULL))), "0.9": (replace(HALF, keep_ratio=0.9), list(one.scores(FULL)))},
        )
        for one in GOOD
    ]
    assert decide([failed, *larger], HALF).why == f"{told} The smallest keep ratio measured that passes is 0.9."
    both = results("lm", {FULL: (None, [2.0] * 16), "it": (HALF, [2.4] * 16), "plan": (PLAN, [2.3] * 16)})
    decision = decide([both], HALF, plan=PLAN, planned_on=["another"])
    assert decision.answer is Answer.NO_GO and "Of the keep ratios measured (0.5) none passes." in decision.why


def with_plan(task, ours, of_plan, *, n, **more):
    full = 2.0 if task == "lm" else TASKS[task].right
    return results(
        task, {FULL: (None, [full] * n), "it": (HALF, [full + ours] * n), "plan": (PLAN, [full + of_plan] * n)}, **more
    )


PLANNED = [with_plan("lm", 0.4, 0.01, n=16), *(with_plan(task, 0, 0, n=50) for task in ("passkey", "needle"))]


def test_a_plan_that_passes_on_other_texts_is_go_with_a_plan():
    decision = decide(PLANNED, HALF, plan=PLAN, planned_on=["some text", "another"])
    assert decision.answer is Answer.GO_WITH_A_PLAN
    assert [check.status.value for check in decision.plan_checks] == ["passed"] * 5
    assert "made from 2 texts, and measured on 16" in decision.plan_checks[-1].says


def test_a_plan_that_was_measured_on_its_own_texts_or_holds_more_bytes_does_not_count():
    assert decide(PLANNED, HALF, plan=PLAN, planned_on=["lm 3"]).answer is Answer.NO_GO
    assert decide(PLANNED, HALF, plan=PLAN).answer is Answer.NOT_YET  # nobody knows what it was made from
    for nbytes, answer in ((1009, Answer.GO_WITH_A_PLAN), (1011, Answer.NO_GO)):
        larger = [with_plan("lm", 0.4, 0.01, n=16, nbytes={"plan": nbytes, "it": 1000}), *PLANNED[1:]]
        assert decide(larger, HALF, plan=PLAN, planned_on=["x"]).answer is answer


def test_a_policy_that_passes_where_the_one_asked_about_fails_is_named():
    other = replace(HALF, policy="keydiff")

    def beside(other_loses, spec=other):
        by_task = {"lm": (16, 2.0, 2.4), "passkey": (50, 1.0, 0.0), "needle": (50, 100.0, 0.0)}
        return [
            results(
                task,
                {
                    FULL: (None, [full] * n),
                    "it": (HALF, [worse] * n),
                    "other": (spec, [worse if task == other_loses else full] * n),
                    "plan": (PLAN, [worse] * n),
                },
            )
            for task, (n, full, worse) in by_task.items()
        ]

    decision = decide(beside(None), HALF, plan=PLAN, planned_on=["x"])
    assert decision.answer is Answer.NO_GO and decision.rival == other
    assert decision.why.endswith("The same bytes by KeyDiff pass.")
    assert decide(beside("needle"), HALF, plan=PLAN, planned_on=["x"]).rival is None
    assert decide(beside(None, replace(other, keep_ratio=0.6)), HALF, plan=PLAN, planned_on=["x"]).rival is None


def test_the_smallest_ratio_that_passes_is_one_above_which_all_pass():
    def of_ratios(*passing, ratios=(0.5, 0.6, 0.7, 0.8, 0.9)):
        specs = {f"{ratio}": replace(HALF, keep_ratio=ratio) for ratio in ratios}

        def one(task, n, full, worse):
            methods = {name: (spec, [full if float(name) in passing else worse] * n) for name, spec in specs.items()}
            return results(task, {FULL: (None, [full] * n), **methods, "plan": (PLAN, [worse] * n)})

        given = [one("lm", 16, 2.0, 2.4), one("passkey", 50, 1.0, 1.0), one("needle", 50, 100.0, 100.0)]
        return decide(given, HALF, plan=PLAN, planned_on=["x"])

    assert of_ratios(0.7, 0.8, 0.9).smallest == 0.7
    assert "smallest keep ratio measured that passes is 0.7" in of_ratios(0.7, 0.8, 0.9).why
    assert of_ratios(0.6, 0.8, 0.9).smallest == 0.8  # 0.6 was lucky
    assert of_ratios().smallest is None
    assert of_ratios(0.5, 0.6, 0.7, 0.8, 0.9).smallest == 0.5


def test_scores_that_are_undefined_under_compression_fail_and_those_of_the_full_cache_do_not_count():
    broken = results("lm", {FULL: (None, [2.0] * 17), "it": (HALF, [2.0] * 16 + [None])})
    decision = decide([broken, *GOOD[1:]], HALF)
    assert decision.checks[0].status is Status.FAILED and "1 of 17 have no score" in decision.checks[0].says
    blind = results("lm", {FULL: (None, [None] * 2 + [2.0] * 15), "it": (HALF, [2.0] * 17)})
    assert decide([blind, *GOOD[1:]], HALF).checks[0].missing == "1 more excerpt"


def test_the_measurement_with_the_most_samples_counts_and_of_equally_many_the_last():
    worse, better = lm(*[0.4] * 16), lm(*[0.0] * 16)
    assert decide([worse, better, *GOOD[1:]], HALF).answer is Answer.GO
    assert decide([better, worse, *GOOD[1:]], HALF).answer is Answer.NOT_YET
    assert decide([lm(*[0.4] * 17), better, *GOOD[1:]], HALF).answer is Answer.NOT_YET
    without_full = results("lm", {"it": (HALF, [9.0] * 40)})
    assert decide([without_full, *GOOD], HALF).answer is Answer.GO


def test_results_of_another_model_are_refused():
    with pytest.raises(SettingsError, match="different models"):
        decide([GOOD[0], replace(GOOD[1], weights="other")], HALF)
    with pytest.raises(SettingsError, match="different models"):
        decide(GOOD, HALF, weights="other")
    with pytest.raises(SettingsError, match=r"different models \(other, tiny\)"):  # of an old file, without a digest
        decide([GOOD[0], replace(GOOD[1], weights="", model="other")], HALF)
    assert decide([GOOD[0], replace(GOOD[1], weights=""), GOOD[2]], HALF, weights="w").answer is Answer.GO


@pytest.mark.parametrize(
    "wrong", [{"perplexity_ratio": 0.9}, {"points_lost": 0}, {"full_finds": math.nan}, {"least_excerpts": 1}]
)
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Limits(**wrong)


def test_an_estimate_is_scaled_by_what_each_stage_goes_by():
    seconds = {"plan": 10.0, "lm": 20.0, "passkey": 30.0, "needle": 40.0, "speed": 5.0}
    half = Estimate(1000, seconds).scaled(Sizes(16, 50), Sizes(8, 25, context=2000))
    assert half.context == 2000
    assert half.seconds == {"plan": 5.0, "lm": 10.0, "passkey": 30.0, "needle": 40.0, "speed": 10.0}
    assert Estimate(1000, seconds).scaled(Sizes(16, 50), Sizes(16, 50)).total == 105


SPEED = Speed("tiny", "w", "cpu", "float32", 1, HALF, 1000, 4, 600, 400, 200, (0.2, 0.4, 0.1), (0.1, 0.1, 0.1))


def test_speed_is_of_the_median_run_and_bound_by_the_bytes_that_are_read(tmp_path):
    assert (SPEED.full_rate, SPEED.kept_rate) == (pytest.approx(20), pytest.approx(40))  # 4 / 0.2, 4 / 0.1
    assert SPEED.speedup == pytest.approx(2)
    assert SPEED.spread == (pytest.approx(1), pytest.approx(4))
    assert SPEED.bound == 1000 / 800
    assert load(Speed, save(SPEED, tmp_path / "speed.json")) == SPEED
    for wrong in (
        {"kept_seconds": (0.1,)},
        {"full_seconds": (0.0, 0.1, 0.1)},
        {"full_seconds": (), "kept_seconds": ()},
    ):
        with pytest.raises(ValueError, match="must be"):
            replace(SPEED, **wrong)


def test_the_interval_of_points_is_that_of_a_slow_loop():
    random = np.random.default_rng(1)
    ours = np.array([1.0] * 46 + [0.0] * 4)
    drawn = [100 * (ours[random.integers(0, 50, 50)] - 1).mean() for _ in range(4000)]
    decision = decide([GOOD[0], found("passkey", 46), GOOD[2]], HALF)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert decision.checks[1].measured.low == pytest.approx(low, abs=2)
    assert decision.checks[1].measured.high == pytest.approx(high, abs=2)
