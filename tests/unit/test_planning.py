"""Loss curves against a loop over tokens, allocations against all that there are, and sums worked out by hand."""

import ast
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog

from analysis.measures import kept_tokens
from analysis.plans.allocation import Budget, _Hull, _Units
from analysis.plans.curves import LossCurves, loss_curves
from analysis.plans.export import kvpress_code, library_code, savings
from analysis.plans.skip import suggest_skip_layers
from analysis.plans.strategies import STRATEGIES, plan
from analysis.studies import study_of
from l2kv import CompressionSpec
from l2kv.config import CacheShape
from tests.support.losses import expected_losses
from tests.support.paths import BUNDLED, ROOT
from tests.support.runs import random_run, run_of

BY_NORMS = [name for name, strategy in STRATEGIES.items() if strategy.kind != "baseline"]
BY_UNIT = {"head": "by_head", "layer": "by_layer"}


def curves_of(low, high=None, **others) -> LossCurves:
    """Curves that were made up, [L, Hkv, B + 1]."""
    low = np.asarray(low, float)
    defaults = {
        "compressible": np.ones(len(low), bool),
        "status": np.full(low.shape[:2], "ok", object),
        "gammas": np.full((1, *low.shape[:2]), -0.5),
    }
    return LossCurves(low=low, high=low if high is None else np.asarray(high, float), **defaults | others)


def whole_numbers(seed, shape, most=1000):
    """Losses whose sums are exact, falling to 0 in steps of any size: far from convex."""
    steps = np.random.default_rng(seed).integers(0, most, size=(*shape[:-1], shape[-1] - 1))
    steps *= np.random.default_rng(seed + 1).random(steps.shape) < 0.5
    falling = steps[..., ::-1].cumsum(-1)[..., ::-1]
    return np.concatenate([falling, np.zeros((*shape[:-1], 1), int)], axis=-1).astype(float)


def convex_numbers(seed, shape):
    steps = -np.sort(-np.random.default_rng(seed).integers(1, 1000, size=(*shape[:-1], shape[-1] - 1)))
    falling = steps[..., ::-1].cumsum(-1)[..., ::-1]
    return np.concatenate([falling, np.zeros((*shape[:-1], 1), int)], axis=-1).astype(float)


def least_loss(units, sizes, budget, least=0):
    """The least sum over all choices of a bin per unit whose cost is within the budget: every one is tried."""
    bins = len(units[0])
    return min(
        sum(unit[b] for unit, b in zip(units, chosen, strict=True))
        for chosen in itertools.product(range(least, bins), repeat=len(units))
        if sum(size * b for size, b in zip(sizes, chosen, strict=True)) <= budget
    )


def slow_loss(norms, attention, kept, protect_last, sign):
    """What is lost when `kept` tokens stay: the latest, then those of lowest (1) or highest (-1) norm."""
    before = max(len(norms) - protect_last, 0)
    dropped = min(len(norms) - kept, before)
    return expected_losses(attention[:before], [sign * x for x in norms[:before]])[dropped]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("protect_last", [0, 7, 100])
def test_a_curve_is_what_the_tokens_left_out_held_of_the_groups_mean_attention(ties, protect_last):
    run = random_run(n=40, ties=ties)
    curves = loss_curves(run, bins=16, protect_last=protect_last)
    for layer, head, b in np.ndindex(3, 2, 17):
        group = run.probe_attention[layer, 3 * head : 3 * head + 3].astype(float).tolist()
        mean = [sum(column) / 3 for column in zip(*group, strict=True)]
        kept = math.ceil(Fraction(b, 16) * 40)
        norms = run.key_norm[layer, head].tolist()
        for curve, sign in ((curves.low, 1), (curves.high, -1)):
            assert curve[layer, head, b] == pytest.approx(slow_loss(norms, mean, kept, protect_last, sign), abs=1e-12)


def test_curves_hold_on_to_no_rows_and_no_maps_of_their_captures():
    run = random_run(n=300)
    rows = np.zeros((16, 3, 6, 300), np.float32)
    maps = np.zeros((3, 6, 100, 100), np.uint8)
    run = replace(run, recent_attention=rows, pooled_attention=maps, tokens_per_bin=3)
    (kept,) = loss_curves(run).captures
    assert kept.recent_attention.nbytes == 0 and kept.recent_attention.base is None
    assert kept.pooled_attention.nbytes == 3 * 6 and kept.pooled_attention.base is None
    assert kept.text == run.text and (kept.probe_attention == run.probe_attention).all()


def test_texts_of_different_lengths_meet_on_the_axis_of_ratios():
    short, long = random_run(0, n=12), random_run(1, n=31)
    both = loss_curves(short, long, bins=8, protect_last=3)
    np.testing.assert_allclose(
        both.low, (loss_curves(short, bins=8, protect_last=3).low + loss_curves(long, bins=8, protect_last=3).low) / 2
    )
    assert both.least_bin == 2  # 3 of 12 tokens, of the text where they are most
    assert both.gammas.shape == (2, 3, 2)


def test_layers_with_a_window_take_no_part():
    run = replace(random_run(), layer_kinds=("full", "sliding", "full"), windows=(0, 8, 0))
    curves = loss_curves(run)
    made = plan(curves, 0.3)
    assert not curves.low[1].any() and (made.ratios[1] == 1).all() and 1 not in made.to_spec().skip_layers
    assert made.ratios[[0, 2]].mean() == pytest.approx(made.used) and made.used <= 0.3
    apart = plan(loss_curves(run_of(run.key_norm[[0, 2]], run.probe_attention[[0, 2]])), 0.3)
    assert made.expected_loss == apart.expected_loss


@pytest.mark.parametrize("last", [0, 2])
def test_where_norms_give_no_order_the_loss_is_that_of_a_random_one(last):
    attention = [0.4, 0.05, 0.25, 0.1, 0.15]
    run = run_of([[np.ones(5), np.arange(1.0, 6)]], [[attention, attention]])
    curves = loss_curves(run, bins=5, protect_last=last)
    assert curves.status.tolist() == [["constant norms", "ok"]]
    for kept in range(6):
        orders = list(itertools.combinations(range(5 - last), max(kept - last, 0)))
        stay = [sum(attention[i] for i in order) + sum(attention[5 - last :]) for order in orders]
        assert curves.low[0, 0, kept] == pytest.approx(sum(attention) - sum(stay) / len(stay))
    np.testing.assert_allclose(curves.low[0, 0], curves.high[0, 0])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("strategy", sorted(set(BY_NORMS) - {"skip_first_two", "by_head_with_signal"}))
def test_the_shortest_texts_have_a_plan(n, strategy):
    curves = loss_curves(random_run(n=n))
    made = plan(curves.weighted_by(np.ones((3, 2)), 0.5), 0.5, strategy)
    assert np.isfinite(made.ratios).all() and made.used <= 0.5 and 0 <= made.expected_loss <= 0.9
    with pytest.raises(ValueError, match="the keep ratio must be 1 or more"):
        plan(loss_curves(random_run(n=n), protect_last=32).weighted_by(np.ones((3, 2)), 0.5), 0.5, strategy)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("by", ["head", "layer"])
@pytest.mark.parametrize("least", [0, 2])
def test_the_dynamic_program_finds_the_best_of_all_allocations(seed, by, least):
    low, high = whole_numbers(seed, (2, 2, 6)), whole_numbers(seed + 100, (2, 2, 6))
    curves = curves_of(low, high, least_bin=least)
    better = np.minimum(low, high)
    units, sizes = (better.reshape(4, 6), [1] * 4) if by == "head" else (better.sum(1), [2] * 2)
    for budget in range(4 * least, 21):
        made = plan(curves, budget / 20, BY_UNIT[by])
        assert made.expected_loss * 4 == least_loss(units.tolist(), sizes, budget, least)
        assert made.used <= budget / 20 and made.gap >= 0 and made.ratios.min() >= least / 5
        if by == "layer":
            assert (made.ratios == made.ratios[:, :1]).all()


def test_a_plan_by_cost_is_the_best_of_all_where_lost_attention_counts_by_what_it_costs():
    losses = whole_numbers(3, (2, 2, 5))
    curves = curves_of(losses, losses + 1).weighted_by(np.array([[0.0, 9.0], [-1.0, 3.0]]), keep_ratio=0.5)
    lost = losses[..., 2]
    worth = [max(c, 0) / max(x, lost.mean() / 10) for c, x in zip([0, 9, -1, 3], lost.ravel(), strict=True)]
    weights = [0.2 + 0.8 * w / (sum(worth) / 4) for w in worth]
    np.testing.assert_allclose(curves.weights.ravel(), weights)
    units = [[w * x for x in row] for w, row in zip(weights, losses.reshape(4, 5), strict=True)]
    made = plan(curves, 0.5, "by_head_by_cost", policy="low_norm")
    assert made.expected_loss * 4 == pytest.approx(least_loss(units, [1] * 4, 8))
    assert plan(curves, 0.5, policy="low_norm").expected_loss * 4 == least_loss(losses.reshape(4, 5), [1] * 4, 8)
    free = curves_of(losses).weighted_by(np.zeros((2, 2)), keep_ratio=0.5)  # nothing costs anything
    assert (free.weights == 1).all()


def solved(curves, keep_ratio, *, by="head", skipped=None):
    """The budget, and the ratios [N] of least loss."""
    budget = Budget.of(curves, keep_ratio, "signed_norm")
    return budget, budget.best(by_layer=by == "layer", skipped=skipped)


@pytest.mark.parametrize("by", ["head", "layer"])
def test_heads_that_keep_everything_are_paid_for_by_the_others(by):
    low = whole_numbers(3, (2, 2, 6))
    gammas = np.array([[[-0.5, 0.05], [-0.5, -0.5]]])
    curves = curves_of(low, gammas=gammas)
    for budget in range(5, 21):
        given, ratios = solved(curves, budget / 20, by=by, skipped=~curves.has_signal(budget / 20).ravel())
        units, sizes = ([low[0, 0], low[1, 0], low[1, 1]], [1, 1, 1])
        if by == "layer":
            units, sizes = ([low[0, 0], low[1].sum(0)], [1, 2])
        assert ratios[1] == 1
        assert given.mean_loss(ratios) * 4 == least_loss([u.tolist() for u in units], sizes, budget - 5)
        if by == "head":
            assert plan(curves, budget / 20, "by_head_with_signal").ratios.ravel().tolist() == ratios.tolist()
    with pytest.raises(ValueError, match=r"keep ratio must be 0\.25 or more here, got 0\.2: 1 of 4"):
        plan(curves, 0.2, "by_head_with_signal")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("by,sizes", [("head", [1] * 6), ("layer", [3] * 2)])
def test_the_hull_states_the_bound_of_the_linear_program(seed, by, sizes):
    low = whole_numbers(seed, (2, 3, 8))
    units = low.reshape(6, 8) if by == "head" else low.sum(1)
    count = len(units)
    for keep in (0.1, 0.33, 0.5, 0.9):
        program = linprog(
            units.ravel(),
            A_ub=[(np.arange(8) * np.array(sizes)[:, None]).ravel()],
            b_ub=[math.floor(keep * 7 * 6)],
            A_eq=np.kron(np.eye(count), np.ones(8)),
            b_eq=np.ones(count),
        )
        budget, ratios = solved(curves_of(low), keep, by=by)
        units_of = _Units.of(budget, np.zeros(6, bool), by_layer=by == "layer")
        hull = _Hull.of(units_of)
        quick = units_of.to_heads(hull.chosen)
        assert hull.bound == pytest.approx(program.fun) and quick.mean() <= keep
        assert hull.bound / 6 <= budget.mean_loss(ratios) + 1e-9 <= budget.mean_loss(quick) + 2e-9
        if by == "head":
            assert plan(curves_of(low), keep).bound == min(budget.bound(), budget.mean_loss(ratios))
            assert budget.bound() == hull.bound / 6


@pytest.mark.parametrize("seed", range(4))
def test_on_convex_curves_the_hull_is_the_best_of_all_allocations(seed):
    low = convex_numbers(seed, (2, 2, 6))
    for budget in range(21):
        given = Budget.of(curves_of(low), budget / 20, "low_norm")
        units = _Units.of(given, np.zeros(4, bool))
        quick = given.mean_loss(units.to_heads(_Hull.of(units).chosen))
        assert quick * 4 == least_loss(low.reshape(4, 6).tolist(), [1] * 4, budget)
        assert given.bound() == pytest.approx(quick, abs=1e-9)


@pytest.mark.parametrize("strategy", sorted(set(BY_NORMS) - {"by_head_by_cost", "by_head_with_signal"}))
@pytest.mark.parametrize("policy", ["signed_norm", "low_norm", "high_norm"])
def test_no_strategy_exceeds_its_budget_or_beats_the_dynamic_program(strategy, policy):
    curves = loss_curves(random_run(2), random_run(3, n=25), bins=20, protect_last=3)
    for keep in np.linspace(0.2, 1, 17)[11 * (strategy == "skip_first_two") :]:  # it keeps two of three layers
        made = plan(curves, keep, strategy, policy=policy)
        best = plan(curves, keep, policy=policy)
        assert made.used <= keep + 1e-12 and made.ratios.min() >= 3 / 25
        assert made.used * 120 == pytest.approx(made.ratios.sum() * 20)
        assert best.expected_loss <= made.expected_loss + 1e-12 and made.bound <= best.expected_loss + 1e-12
        assert best.uniform_loss == made.uniform_loss == plan(curves, keep, "uniform_low", policy=policy).expected_loss
        assert best.expected_loss <= best.uniform_loss


@pytest.mark.parametrize("strategy", ["by_head", "by_layer"])
def test_more_budget_never_loses_more(strategy):
    curves = curves_of(whole_numbers(7, (3, 2, 12)))
    made = [plan(curves, keep, strategy) for keep in np.linspace(0, 1, 67)]
    for losses in ([each.expected_loss for each in made], [each.bound for each in made]):
        assert (np.diff(losses) <= 1e-9).all() and losses[-1] == 0


def test_uniform_is_the_ratio_that_was_asked_for():
    curves = loss_curves(random_run(), bins=100)
    for percent in range(101):
        made = plan(curves, percent / 100, "uniform_low")
        assert (made.ratios == percent / 100).all() and made.to_spec() == CompressionSpec(
            keep_ratio=percent / 100 if percent < 100 else 1.0, skip_layers=(0, 1, 2) if percent == 100 else ()
        )
        assert made.expected_loss == pytest.approx(curves.low[..., percent].mean())
    between = plan(curves, 0.333, "uniform_low")
    assert set(between.ratios.ravel()) == {0.333}
    lost = 0.7 * curves.low[..., 33] + 0.3 * curves.low[..., 34]
    assert between.expected_loss == between.uniform_loss == pytest.approx(lost.mean())


@pytest.mark.parametrize("strategy,policy", [("random", "random"), ("streaming", "streaming")])
def test_a_baseline_is_one_ratio_for_all_of_which_no_loss_is_known(strategy, policy):
    made = plan(loss_curves(random_run(), protect_last=4), 0.4, strategy)
    assert made.to_spec() == CompressionSpec(keep_ratio=0.4, policy=policy, protect_last=4)
    assert math.isnan(made.expected_loss) and math.isnan(made.bound) and made.directions is None


@pytest.mark.parametrize("protect_last", [0, 5])
def test_the_pyramid_is_as_its_authors_code_has_it(protect_last):
    """As in pyramidkv_utils.py of KVCache-Factory, in numbers of tokens; `least` and `most` are beside the window."""
    run, n = random_run(layers=5, n=100), 100
    for keep in (0.1, 0.3, 0.5, 0.7, 0.95):
        made = plan(loss_curves(run, bins=n, protect_last=protect_last), keep, "pyramid")
        beside = keep * n - protect_last
        most, least = 2 * beside - beside / 20, beside / 20
        if most >= n - protect_last:
            most, least = n - protect_last, 2 * beside - (n - protect_last)
        expected = [most - layer * (most - least) / 4 + protect_last for layer in range(5)]
        np.testing.assert_allclose(made.ratios * n, np.repeat(expected, 2).reshape(5, 2))
        assert made.ratios.mean() == pytest.approx(keep) and made.used <= keep and math.isnan(made.expected_loss)
        spec = made.to_spec()
        assert (spec.policy, spec.protect_last) == ("window", protect_last) and spec.head_ratios is None
    (alone,) = plan(loss_curves(random_run(layers=1)), 0.3, "pyramid").ratios
    assert set(alone) == {0.3}
    with pytest.raises(ValueError, match=r"must be 0\.32 or more here"):
        plan(loss_curves(run, bins=n, protect_last=32), 0.3, "pyramid")


def test_the_papers_skip_list_is_paid_for_by_the_other_layers():
    made = plan(loss_curves(random_run(layers=5)), 0.7, "skip_first_two").to_spec()
    assert made == CompressionSpec(keep_ratio=0.5, skip_layers=(0, 1))
    with pytest.raises(ValueError, match=r"must be 0\.4 or more here, got 0\.3: 4 of 10 kv heads keep everything"):
        plan(loss_curves(random_run(layers=5)), 0.3, "skip_first_two")


@pytest.mark.parametrize("protect_last", [0, 6])
def test_adakv_shares_a_layer_by_its_top_attention_weights(protect_last):
    run, n = random_run(5), 40
    made = plan(loss_curves(run, bins=5 * n, protect_last=protect_last), 0.5, "adakv")
    for layer in range(3):
        weights = []
        for head in range(2):
            for t in range(n):
                mean = sum(float(run.probe_attention[layer, 3 * head + g, t]) for g in range(3)) / 3
                weights.append((t < n - protect_last, -mean, head))
        budget = n  # half of two heads
        top = [head for _, _, head in sorted(weights)[:budget]]
        expected = [(0.8 * top.count(head) + 0.2 * budget / 2) / n for head in range(2)]
        np.testing.assert_allclose(made.ratios[layer], expected)
    assert made.used == 0.5


@pytest.mark.parametrize("policy,sign", [("low_norm", 1), ("high_norm", -1)])
@pytest.mark.parametrize("protect_last", [0, 6])
def test_global_is_one_threshold_on_norms_over_the_median_of_their_head(policy, sign, protect_last):
    run, n = random_run(6), 40
    made = plan(loss_curves(run, bins=n, protect_last=protect_last), 0.3, "global_threshold", policy=policy)
    pairs = []
    for layer, head in np.ndindex(3, 2):
        norms = run.key_norm[layer, head].astype(float).tolist()
        median = (sorted(norms)[19] + sorted(norms)[20]) / 2
        pairs += [(t < n - protect_last, sign * norms[t] / median, (layer, head)) for t in range(n)]
    kept = [place for _, _, place in sorted(pairs)[: math.floor(0.3 * 240)]]
    np.testing.assert_allclose(made.ratios, [[kept.count((layer, h)) / n for h in range(2)] for layer in range(3)])


def test_global_follows_each_heads_own_sign_where_directions_are_free():
    norms = np.array([1.0, 2, 3, 4, 100, 101, 102, 103])  # their median is 52
    run = run_of([[norms], [norms]], [[1 / np.arange(1, 9)], [np.arange(1, 9) / 36]])
    made = plan(loss_curves(run, bins=8), 6 / 16, "global_threshold")
    assert made.directions == (("low",), ("high",))
    assert made.ratios.ravel().tolist() == [0.5, 0.25]  # 1 to 4 are a long way below the median, 103 is twice it


def test_what_is_left_is_shared_evenly_among_heads_that_are_not_skipped():
    curves = curves_of(whole_numbers(0, (2, 2, 9)))
    ratios = Budget.of(curves, 0.5, "low_norm").even(np.array([True, False, False, False]))
    np.testing.assert_allclose(ratios, [1, 1 / 3, 1 / 3, 1 / 3])
    scaled = Budget.of(curves, 0.5, "low_norm").scaled(ratios)
    np.testing.assert_array_equal(scaled * 8, [8, 3, 3, 2])  # the same on bins: 16 of them, 8 left for three


def test_the_suggested_layers_are_skipped_at_equal_bytes():
    ranks = np.arange(1.0, 9.0)
    run = run_of([[ranks]] * 4, [[1 / ranks], [ranks / 36], [1 / ranks], [1 / ranks]])
    assert suggest_skip_layers(study_of(run)).layers == (1,)
    made = plan(loss_curves(run, bins=12), 0.5, "skip_suggested")
    np.testing.assert_allclose(made.ratios.ravel() * 12, [4, 12, 4, 4])
    spec = made.to_spec()
    assert spec.skip_layers == (1,) and spec.keep_ratio == pytest.approx(1 / 3)
    tight = plan(loss_curves(run, bins=12), 0.2, "skip_suggested")
    assert tight.used <= 0.2 and 1 not in tight.to_spec().skip_layers  # the budget cannot pay for it


def test_the_worst_layers_are_skipped_as_far_as_the_budget_goes():
    ranks = np.arange(1.0, 9.0)
    run = run_of([[ranks]] * 3, [[np.array([1, 2, 3, 4, 5, 6, 8, 7]) / 36], [ranks / 36], [1 / ranks]])
    assert suggest_skip_layers(study_of(run)).layers == (0, 1)
    assert plan(loss_curves(run), 0.5, "skip_suggested").to_spec().skip_layers == (1,)


def test_a_direction_is_that_which_loses_less_at_the_heads_ratio():
    low, high = [[[9.0, 1, 1, 0], [6, 4, 1, 0]]], [[[9.0, 3, 0, 0], [6, 4, 2, 0]]]
    one, two = plan(curves_of(low, high), 1 / 3), plan(curves_of(low, high), 4 / 6)
    assert one.ratios.ravel().tolist() == [1 / 3, 1 / 3] and one.directions == (("low", "low"),)
    assert two.ratios.ravel().tolist() == [2 / 3, 2 / 3] and two.directions == (("high", "low"),)
    assert two.to_spec().policy == "signed_norm" and two.to_spec().directions == (("high", "low"),)
    assert plan(curves_of(low, high), 0.5, policy="low_norm").directions is None
    assert plan(curves_of(low, high), 0.5, policy="high_norm").to_spec().policy == "high_norm"


def test_a_signal_is_strong_and_the_same_in_four_of_five_texts():
    signs = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, -1], [1, 1, 1, -1, -1], [1, 1, 1, 1, np.nan], [1, 1, 1, np.nan, 1]])
    strength = np.array([0.5, 0.5, 0.5, 0.5, 0.05])
    gammas = (signs * strength[:, None]).T[:, None]  # [5 texts, 1 layer, 5 heads]
    curves = curves_of(np.zeros((1, 5, 3)), gammas=gammas)
    assert curves.has_signal(0.5).tolist() == [[True, True, False, True, False]]
    undefined = np.array([["ok", "constant norms", "ok", "ok", "ok"]], object)
    assert curves_of(np.zeros((1, 5, 3)), gammas=gammas, status=undefined).has_signal(0.5).sum() == 2


def test_a_signal_is_of_the_policys_own_sign():
    gammas = np.array([[[-0.5, 0.5, 0.05]]])
    curves = curves_of(np.zeros((1, 3, 3)), gammas=gammas)
    assert curves.has_signal(0.5).tolist() == [[True, True, False]]
    assert curves.has_signal(0.5, "low_norm").tolist() == [[True, False, False]]
    assert curves.has_signal(0.5, "high_norm").tolist() == [[False, True, False]]


def test_with_texts_enough_a_signal_is_an_interval_that_beats_a_random_order_at_the_ratio():
    ranks = np.arange(1.0, 21.0)
    attention = [
        lambda text: 1 / ranks,  # low norms get it in every text
        lambda text: ranks if text % 2 else 1 / ranks,  # now these, now those
        lambda text: np.where(ranks > 15, 1.0, 0.0) + 0.01,  # the highest norms get it all: low loses it at any ratio
    ]
    runs = []
    for text in range(8):
        rows = np.array([row(text) for row in attention])
        runs.append(run_of([[ranks] * 3], [rows / rows.sum(axis=1, keepdims=True)]))
    curves = loss_curves(*runs, bins=20)
    assert curves.has_signal(0.5).tolist() == [[True, False, True]]
    assert curves.has_signal(0.5, "low_norm").tolist() == [[True, False, False]]
    assert curves.has_signal(0.5, "high_norm").tolist() == [[False, False, True]]
    assert not curves.has_signal(1.0).any() and not curves.has_signal(0.0).any()  # nothing to choose between
    few = loss_curves(*runs[:4], bins=20)  # too few for an interval: Γ decides
    assert few.has_signal(0.5).tolist() == [[True, False, True]]


def test_a_signal_that_only_one_of_two_documents_has_is_none():
    ranks = np.arange(1.0, 21.0)
    runs = [run_of([[ranks]], [[row / row.sum()]]) for row in [1 / ranks] * 15 + [ranks] * 3]
    assert loss_curves(*runs, bins=20).has_signal(0.5, "low_norm").all()
    by_document = loss_curves(*runs, bins=20, documents=["a"] * 15 + ["b"] * 3)
    assert not by_document.has_signal(0.5, "low_norm").any()


@pytest.mark.parametrize("policy", ["low_norm", "high_norm", "signed_norm"])
def test_the_loss_of_any_spec_is_what_its_tokens_left_out_held(policy):
    run = random_run(4, group=1)
    directions = (("low", "high"), ("high", "low"), ("low", "low")) if policy == "signed_norm" else None
    spec = CompressionSpec(
        policy=policy, directions=directions, skip_layers=(1,), protect_last=4, head_ratios={(0, 1): 0.25}
    )
    lost = 0.0
    for layer, head in ((0, 0), (0, 1), (2, 0), (2, 1)):  # layer 1 loses nothing
        name = policy if directions is None else f"{directions[layer][head]}_norm"
        kept = kept_tokens(run, layer, head, replace(spec, policy=name, directions=None))
        lost += float(run.probe_attention[layer, head, ~kept].sum())
    curves = loss_curves(run, protect_last=4)
    assert curves.loss_of(spec) == pytest.approx(lost / 6, abs=1e-6)
    assert math.isnan(curves.loss_of(CompressionSpec(policy="streaming")))
    assert math.isnan(curves.loss_of(CompressionSpec(budget=5)))


def test_a_random_order_loses_what_is_dropped_of_an_even_share():
    run = random_run(4, group=1)
    curves = loss_curves(run)
    assert curves.loss_of(CompressionSpec(0.3, policy="random")) == pytest.approx(
        0.7 * run.probe_attention.sum(axis=-1).mean(), abs=1e-6
    )


def test_what_a_plan_expects_is_what_its_spec_loses():
    run = random_run(8, group=1)
    made = plan(loss_curves(run, protect_last=4), 0.4, policy="low_norm")
    spec = made.to_spec()
    lost, pairs = 0.0, 0
    for layer, head in np.ndindex(3, 2):
        kept = kept_tokens(run, layer, head, spec)
        lost, pairs = lost + float(run.probe_attention[layer, head, ~kept].sum()), pairs + int(kept.sum())
    assert made.expected_loss == pytest.approx(lost / 6, abs=1e-6)
    assert pairs * 2 * 8 * 4 == run.cache_shape.nbytes(40, spec)
    assert 0.4 * 240 - 6 <= pairs < 0.4 * 240 + 6  # each head rounds up to a whole pair


def test_a_spec_takes_the_shortest_form_that_says_it():
    falling = np.linspace(1, 0, 5)
    steep = plan(curves_of([[falling, falling], [3 * falling, 3 * falling]]), 0.5, "by_layer", policy="low_norm")
    assert steep.to_spec() == CompressionSpec(keep_ratio=0.0, skip_layers=(1,))
    convex = [8.0, 4, 2, 1, 0]
    by_layer = plan(curves_of([[convex] * 2, [[b / 3 for b in convex]] * 2]), 0.5, "by_layer", policy="low_norm")
    assert by_layer.to_spec().layer_ratios == ((0, 0.75), (1, 0.25)) and by_layer.to_spec().head_ratios is None
    by_head = plan(curves_of([[convex, [b / 3 for b in convex]]]), 0.5, policy="low_norm")
    assert replace(by_head, protect_last=32).to_spec() == CompressionSpec(
        head_ratios={(0, 0): 0.75, (0, 1): 0.25}, protect_last=32
    )


def test_what_cannot_be_planned_is_said():
    curves = curves_of(np.zeros((1, 1, 3)))
    for wrong, words in (
        ({"keep_ratio": 1.5}, "keep_ratio must be from 0 to 1"),
        ({"keep_ratio": math.nan}, "keep_ratio must be from 0 to 1"),
        ({"strategy": "by_heads"}, "Did you mean 'by_head'"),
        ({"policy": "random"}, "policy must be one of signed_norm, low_norm, high_norm"),
        ({"strategy": "adakv"}, "adakv looks at single tokens"),
        ({"strategy": "by_head_by_cost"}, "needs the measured cost of each head"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(curves, **wrong)
    with pytest.raises(ValueError, match="at least one"):
        loss_curves()
    with pytest.raises(ValueError, match="of one model"):
        loss_curves(random_run(), replace(random_run(), model="another"))
    with pytest.raises(ValueError, match="bins must be 1 or more"):
        loss_curves(random_run(), bins=0)
    with pytest.raises(ValueError, match="sliding window"):
        plan(loss_curves(replace(random_run(), layer_kinds=("sliding",) * 3, windows=(8,) * 3)))


def test_savings_by_hand():
    """2 layers of 4 kv heads of 64 in two bytes: 2 * 4 * 2 * 64 * 2 = 2048 bytes a token."""
    shape = CacheShape((0, 1), 8, 4, 64, 2)
    weights, gpu = 1_000_000, 21_480_000
    (four,) = savings(
        shape, CompressionSpec(), weights_bytes=weights, gpu_bytes=gpu, bandwidth=1e9, lengths=[1000], batch=3
    )
    assert (four.full_bytes, four.kept_bytes) == (6_144_000, 3_072_000)
    assert (four.full_fits, four.kept_fits) == (10, 20)  # 20.48 MB of room for 2.048 MB each
    assert four.full_seconds == pytest.approx(0.007144) and four.kept_seconds == pytest.approx(0.004072)
    lengths = [row.n_tokens for row in savings(shape, CompressionSpec(), weights_bytes=0, gpu_bytes=1, bandwidth=1)]
    assert lengths == [4096, 32768, 131072]
    (none,) = savings(
        shape, CompressionSpec(budget=0), weights_bytes=weights, gpu_bytes=weights - 1, bandwidth=1, lengths=[10]
    )
    assert none.full_fits == 0 and none.kept_fits is None
    with pytest.raises(ValueError, match="each layer has a sliding window"):
        savings(CacheShape((), 8, 4, 64, 2), CompressionSpec(), weights_bytes=0, gpu_bytes=1, bandwidth=1)
    infinite = ({"gpu_bytes": float("inf")}, {"bandwidth": float("inf")})
    for wrong in ({"gpu_bytes": 0}, {"bandwidth": 0}, {"batch": 0}, {"weights_bytes": -1}, {"lengths": [0]}, *infinite):
        with pytest.raises(ValueError, match="must be positive"):
            savings(shape, CompressionSpec(), **{"weights_bytes": 0, "gpu_bytes": 1, "bandwidth": 1} | wrong)


@pytest.mark.parametrize(
    "spec",
    [
        CompressionSpec(),
        CompressionSpec(keep_ratio=0.3, head_ratios={(0, 1): 0.2}, layer_ratios={1: 0.7}, skip_layers=(2,)),
        CompressionSpec(policy="signed_norm", directions=(("low", "high"),), protect_last=32, budget=9),
        CompressionSpec(policy="fastgen"),
    ],
)
def test_the_code_of_this_library_makes_the_same_spec(spec):
    code = library_code(spec, "a/model")
    made = code[code.index("spec = ") : code.index("prompt = ")]
    names = {"CompressionSpec": CompressionSpec}
    exec(made, names)
    assert names["spec"] == spec and "seed" not in made
    for chosen in ("keep_ratio", "policy", "skip_layers", "protect_last", "prune_after"):  # as by default or not
        assert f"    {chosen}=" in made
    ast.parse(code)


def kvpress_call(code, name="KnormPress"):
    (call,) = (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name)
    return call


def compression_ratio(code):
    return kvpress_call(code).keywords[0].value


def layer_ratios(code):
    press, ratios = kvpress_call(code, "PerLayerCompressionPress").args
    assert press.func.id == "KnormPress" and not press.args and not press.keywords
    return eval(compile(ast.Expression(ratios), "", "eval"), {"n_tokens": 1024, "max": max})


def test_the_code_for_kvpress_drops_as_much_and_says_what_it_cannot():
    shape = CacheShape((0, 1), 4, 2, 8, 2)
    plain = kvpress_code(CompressionSpec(keep_ratio=0.3), shape, "a/model")
    assert ast.literal_eval(compression_ratio(plain)) == 0.7 and plain.count("# ") == 3
    assert 'model="a/model"' in plain and "PerLayer" not in plain and plain.startswith("# pip install kvpress\n")
    spec = CompressionSpec(keep_ratio=0.25, skip_layers=(0,), protect_last=32, head_ratios={(1, 0): 0.75})
    code = kvpress_code(spec, shape, "a/model", n_layers=3)  # all of the layer skipped; .75 and .25: a mean of .5
    assert layer_ratios(code) == [0.0, 0.5, 0.0]
    for words in ("per kv head", "last 32 tokens", "flash attention"):
        assert words in code
    by_layer = CompressionSpec(keep_ratio=0.3, layer_ratios={1: 0.9})
    assert layer_ratios(kvpress_code(by_layer, shape, "a/model")) == [0.7, 0.1]
    everything = CompressionSpec(
        policy="signed_norm",
        directions=(("low", "high"),) * 2,
        schedule="reference",
        protect_first=4,
        prune_after=9,
        layer_ratios={1: 0.5},
    )
    for words in ("spec's signed_norm", "pairs held", "first 4 tokens", "under 9 tokens"):
        assert words in kvpress_code(everything, shape, "a/model")
    nothing = kvpress_code(CompressionSpec(keep_ratio=0), shape, "a/model")
    assert 0.99 < ast.literal_eval(compression_ratio(nothing)) < 1
    assert layer_ratios(kvpress_code(CompressionSpec(budget=256, skip_layers=(1,)), shape, "a/model")) == [0.75, 0]
    assert f'model="analysis/bundled/{BUNDLED.name}"' in kvpress_code(CompressionSpec(), shape, "books-5m")
    budget = kvpress_code(CompressionSpec(budget=256), shape, "a/model")
    assert eval(compile(ast.Expression(compression_ratio(budget)), "", "eval"), {"n_tokens": 1024}) == 0.75
    with pytest.raises(ValueError, match="key norms"):
        kvpress_code(CompressionSpec(policy="keydiff"), shape, "a/model")
    with pytest.raises(ValueError, match="no layer"):
        kvpress_code(CompressionSpec(), replace(shape, layers=()), "a/model")


def test_a_plan_does_not_wait_for_torch():
    code = "import sys, analysis.plans.strategies; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
