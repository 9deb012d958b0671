"""Many texts: means, intervals and verdicts against slow loops and by hand."""

import dataclasses
import math
import time

import numpy as np
import pytest
from scipy import stats

from analysis.across import (
    MIN_TEXTS,
    RESAMPLES,
    VERDICTS,
    answer,
    head_verdicts,
    kendall,
    layer_means,
    means,
    median_gamma,
    misses,
    resamples,
    spearman,
    stability,
    verdicts,
)
from analysis.comparing import compare_studies
from analysis.metrics import METRICS, PROBES
from analysis.study import Study


def study_of(gamma, without=None, **metric) -> Study:
    """A study of [N, L, H] numbers for Γ, and for other metrics; all others are 0."""
    gamma = np.asarray(gamma, dtype=float)
    n, layers, heads = gamma.shape
    values = np.zeros((n, len(PROBES), len(METRICS), layers, heads))
    given = {"gamma": gamma, "gamma_without_sink": gamma if without is None else without} | metric
    for name, numbers in given.items():
        values[:, :, list(METRICS).index(name)] = np.asarray(numbers, dtype=float)[:, None]
    return Study(
        model="made up",
        weights="",
        layer_kinds=("full",) * layers,
        texts=n,
        names=tuple(map(str, range(n))),
        digests=("",) * n,
        n_tokens=np.full(n, 9),
        values=values,
        status=np.where(np.isfinite(values), 0, 1).astype(np.uint8),
    )


# Means and intervals


def test_an_interval_is_that_of_a_plain_loop_over_resamples():
    values = np.random.default_rng(1).normal(size=(7, 2, 3))
    values[2, 0, 0] = values[5, 0, 0] = values[0, 1, 1] = np.nan
    got = means(values, seed=3)
    drawn = np.random.default_rng(3).integers(7, size=(RESAMPLES, 7)).tolist()
    for place in np.ndindex(2, 3):
        column = [float(v) for v in values[(slice(None), *place)]]
        known = [v for v in column if v == v]
        results = []
        for texts in drawn:
            some = [column[i] for i in texts if column[i] == column[i]]
            if some:
                results.append(sum(some) / len(some))
        results.sort()

        def quantile(share, results=results):
            at = share * (len(results) - 1)
            low = math.floor(at)
            return results[low] + (at - low) * (results[min(low + 1, len(results) - 1)] - results[low])

        assert got.mean[place] == pytest.approx(sum(known) / len(known))
        assert got.low[place] == pytest.approx(quantile(0.025)) and got.high[place] == pytest.approx(quantile(0.975))
        assert got.defined[place] == len(known)


def test_a_resample_counts_how_often_each_text_was_drawn():
    drawn = np.random.default_rng(5).integers(9, size=(50, 9)).tolist()
    assert resamples(9, count=50, seed=5).tolist() == [[float(row.count(text)) for text in range(9)] for row in drawn]


def test_many_texts_are_resampled_in_no_more_than_their_share_of_time():
    """Ten times the texts take ten times as long, not a hundred times; 2000 once took 16 s."""
    started = time.perf_counter()
    resamples(2000)
    assert time.perf_counter() - started < 4


@pytest.mark.parametrize("n", [3, 6, 16])
@pytest.mark.parametrize("groups", [1, 2])
def test_intervals_leave_0_out_by_chance_as_often_as_is_said(n, groups):
    samples = np.random.default_rng(n).normal(size=(groups, n, 3000))
    if groups == 1:
        got = means(samples[0])
    else:
        first, second = (study_of(values[:, None]) for values in samples)
        got = compare_studies(first, dataclasses.replace(second, digests=("other",) * n)).difference
    assert ((got.low > 0) | (got.high < 0)).mean() == pytest.approx(float(misses(n, groups=groups)), abs=0.02)


def test_fewer_than_two_texts_have_no_interval_to_leave_0_out():
    assert np.isnan(misses(np.array([0, 1, 2]))).tolist() == [True, True, False]


def test_an_interval_of_many_texts_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(0.3, 0.5, size=(400, 5))
    got = means(values)
    error = 1.96 * values.std(axis=0) / 20
    np.testing.assert_allclose(got.high - got.mean, error, rtol=0.08)
    np.testing.assert_allclose(got.mean - got.low, error, rtol=0.08)


@pytest.mark.parametrize(("n", "covered"), [(6, 0.86), (16, 0.92), (32, 0.94)])
def test_an_interval_covers_the_mean_as_often_as_is_said(n, covered):
    got = means(np.random.default_rng(n).normal(size=(n, 2000)))
    assert ((got.low < 0) & (got.high > 0)).mean() == pytest.approx(covered, abs=0.02)


def test_what_no_text_or_one_text_defines_has_no_interval():
    values = np.full((8, 3), np.nan)
    values[4, 1] = values[:, 2] = 0.5
    got = means(values)
    assert got.defined.tolist() == [0, 1, 8]
    assert np.isnan(got.mean[0]) and got.mean[1] == 0.5 and np.isnan(got.low[:2]).all() and np.isnan(got.high[:2]).all()
    assert got.low[2] == got.high[2] == 0.5


def test_layers_are_means_over_the_heads_that_are_defined():
    gamma = [[[0.2, 0.4, np.nan]], [[0.6, np.nan, np.nan]]]
    got = layer_means(study_of(gamma))
    assert got.mean == pytest.approx([(0.3 + 0.6) / 2]) and got.defined.tolist() == [2]


# Verdicts

ABOVE, BELOW, NEITHER, SPLIT = [0.5] * 8, [-0.5] * 8, [0.05, -0.05] * 4, [0.5, -0.5] * 4


@pytest.mark.parametrize(
    ("with_sink", "without", "verdict"),
    [
        (BELOW, BELOW, "follows the paper"),
        (BELOW, NEITHER, "sink only"),
        (BELOW, ABOVE, "sink only"),
        (BELOW, SPLIT, "sink only"),
        (NEITHER, BELOW, "hidden by the sink"),
        (ABOVE, BELOW, "hidden by the sink"),
        (ABOVE, ABOVE, "mirror"),
        (NEITHER, ABOVE, "mirror"),
        (NEITHER, NEITHER, "no signal"),
        (ABOVE, NEITHER, "no signal"),
        (NEITHER, SPLIT, "no signal"),
        *((SPLIT, without, "unstable") for without in (ABOVE, BELOW, NEITHER, SPLIT)),
        # 3 of 8 texts say the opposite, though with 80 such texts the interval of the mean is below 0
        (([-0.9] * 5 + [0.2] * 3) * 10, [-0.5] * 80, "unstable"),
        ([-0.9] * 6 + [0.9] * 2, NEITHER, "no signal"),  # a quarter is not more than a quarter
        ([-0.5] * (MIN_TEXTS - 1), [-0.5] * (MIN_TEXTS - 1), "undefined"),
        ([-0.5] * MIN_TEXTS, [-0.5] * MIN_TEXTS, "follows the paper"),
        (BELOW, [-0.5] * 5 + [np.nan] * 3, "sink only"),  # too few texts have Γ without the first token
        (ABOVE, [np.nan] * 8, "no signal"),
        ([np.nan] * 8, BELOW, "undefined"),
        ([-0.5, 0.5, *[-0.5] * 6], [np.nan, np.nan, *[-0.5] * 6], "follows the paper"),
    ],
)
def test_verdicts_by_hand(with_sink, without, verdict):
    got = verdicts(*(np.array(gamma)[:, None, None] for gamma in (with_sink, without)))
    assert got.tolist() == [[verdict]] and verdict in VERDICTS


def test_each_head_has_one_verdict_and_the_answer_counts_them():
    gamma = np.array([BELOW] * 8 + [ABOVE] + [SPLIT] + [[np.nan] * 8]).T[:, None]
    made = study_of(gamma)
    assert head_verdicts(made)[0].tolist() == ["follows the paper"] * 8 + ["mirror", "unstable", "undefined"]
    text = answer(made)
    assert text.startswith("Yes. In 8 of 10 heads low-norm")
    assert "in 1 high-norm" in text and "in 1 the sign changes between texts" in text and "over 8 texts" in text
    assert answer(study_of(-gamma)).startswith("No, the opposite")
    assert answer(study_of(gamma[:3])).startswith("This study cannot tell") and "over 3 texts" in answer(
        study_of(gamma[:3])
    )


def test_the_median_is_of_heads_and_its_interval_of_texts():
    rng = np.random.default_rng(0)
    gamma = rng.normal(size=(6, 1, 3)) + np.arange(3)
    got = median_gamma(study_of(gamma))
    drawn = np.random.default_rng(0).integers(6, size=(RESAMPLES, 6))
    medians = sorted(sorted(gamma[texts, 0].mean(axis=0))[1] for texts in drawn)
    assert got.value == pytest.approx(sorted(gamma[:, 0].mean(axis=0))[1])
    assert (got.low, got.high) == pytest.approx(np.quantile(medians, [0.025, 0.975]))
    assert str(median_gamma(study_of(np.full((6, 1, 2), np.nan)))) == "undefined"
    assert "no interval" in str(median_gamma(study_of(gamma[:1])))


# Stability


def test_rank_correlations_of_many_pairs_are_those_of_scipy():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 7)).round(1)
    for one, other, rho, tau in zip(x, y, spearman(x, y), kendall(x, y), strict=True):
        assert rho == pytest.approx(stats.spearmanr(one, other).statistic)
        assert tau == pytest.approx(stats.kendalltau(one, other).statistic)
    assert np.isnan(spearman(np.ones((2, 4)), x[:2, :4])).all() and np.isnan(kendall(x[:, :2], y[:, :2])).all()


def test_the_order_of_layers_is_stable_where_texts_agree_and_not_where_they_do_not():
    rng = np.random.default_rng(0)
    layers = np.arange(8.0)
    same = stability(np.tile(layers, (6, 1)))
    assert [a.texts for a in same.by_texts] == [1, 2, 3] and same.stable_from == 1
    assert all(a.spearman == pytest.approx(1) and a.kendall == pytest.approx(1) for a in same.by_texts)
    noise = stability(rng.normal(size=(24, 8)))
    # Halves of all the texts add up to a constant, so noise agrees at random, or less.
    assert noise.stable_from is None and max(a.spearman for a in noise.by_texts) < 0.3
    assert "not stable yet" in str(noise)
    mixed = stability(layers + 3 * rng.normal(size=(60, 8)))
    spearmans = [a.spearman for a in mixed.by_texts]
    assert 1 < mixed.stable_from < 30 and f"from {mixed.stable_from} texts on" in str(mixed)
    assert min(spearmans[mixed.stable_from - 1 :]) >= 0.9 > spearmans[mixed.stable_from - 2]


def test_the_agreement_of_single_texts_is_the_mean_over_pairs():
    losses = np.random.default_rng(0).normal(size=(4, 6))
    pairs = [stats.spearmanr(losses[i], losses[j]).statistic for i in range(4) for j in range(i)]
    got = stability(losses, splits=20_000).by_texts[0].spearman
    assert got == pytest.approx(sum(pairs) / 6, abs=0.01)


@pytest.mark.parametrize("losses", [np.ones((1, 5)), np.ones((6, 5)), np.eye(6, 2), np.full((6, 5), np.nan)], ids=str)
def test_an_order_that_cannot_be_compared_is_said_so(losses):
    assert stability(losses).stable_from is None and "cannot be compared" in str(stability(losses))


def test_a_layer_that_a_text_leaves_undefined_is_not_ordered():
    losses = np.random.default_rng(0).normal(size=(6, 5))
    holed = np.insert(losses, 2, 0.0, axis=1)
    holed[3, 2] = np.nan
    assert stability(holed) == stability(losses)
