"""Many texts: means, intervals and verdicts against slow loops and by hand."""

import dataclasses
import math
import time

import numpy as np
import pytest
from scipy import stats

from analysis.comparing import compare
from analysis.statistics import (
    MIN_TEXTS,
    RESAMPLES,
    few_documents_warning,
    kendall,
    means,
    miss_rate,
    resamples,
    simultaneous,
    spearman,
    stability,
)
from analysis.studies import head_means, layer_means, median_gamma
from analysis.verdicts import answer, meanings, verdicts, verdicts_of
from tests.support.runs import study_of

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
        got = compare(first, dataclasses.replace(second, digests=("other",) * n)).difference
    assert ((got.low > 0) | (got.high < 0)).mean() == pytest.approx(float(miss_rate(n, groups=groups)), abs=0.02)


def test_fewer_than_two_texts_have_no_interval_to_leave_0_out():
    assert np.isnan(miss_rate(np.array([0, 1, 2]))).tolist() == [True, True, False]


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


# Documents


def clustered(rng, *, documents: int, each: int, between: float, within: float, studies: int) -> np.ndarray:
    """[documents * each, studies] normal values about 0: excerpts of one document have something in common."""
    shared = rng.normal(scale=between, size=(documents, 1, studies))
    return (shared + rng.normal(scale=within, size=(documents, each, studies))).reshape(-1, studies)


def names(documents: int, each: int) -> list[str]:
    return [f"d{i}" for i in range(documents) for _ in range(each)]


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_documents_of_one_text_each_are_resampled_as_texts_are(n):
    apart = [f"d{i}" for i in range(n)][::-1]
    assert (resamples(n, documents=apart, count=99, seed=4) == resamples(n, count=99, seed=4)).all()


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_of_one_document_its_excerpts_are_resampled(n):
    drawn = resamples(n, documents=["x"] * n, count=4000)
    assert (drawn.sum(axis=1) == n).all() and (drawn == drawn.astype(int)).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(n), abs=0.08)
    assert drawn.var(axis=0) == pytest.approx(np.full(n, 1 - 1 / n), abs=0.12)


def test_a_document_that_is_not_drawn_gives_no_excerpt_and_one_drawn_twice_gives_two_of_each():
    which = np.array([0, 1, 0, 2, 1, 0])
    drawn = resamples(6, documents=[f"d{i}" for i in which], count=5000)
    by_document = np.stack([drawn[:, which == i].sum(axis=1) / (which == i).sum() for i in range(3)], axis=1)
    assert (by_document == by_document.astype(int)).all() and (by_document.sum(axis=1) == 3).all()
    assert {tuple(row) for row in by_document.tolist()} == {(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)}


@pytest.mark.parametrize("between", [0.0, 1.0])
@pytest.mark.parametrize(("documents", "each"), [(6, 4), (8, 1), (12, 2), (32, 3)])
def test_intervals_cover_where_excerpts_of_one_document_are_alike(documents, each, between):
    """0, the mean of all that could be drawn, as often as intervals over so many single texts do, or oftener."""
    values = clustered(np.random.default_rng(1), documents=documents, each=each, between=between, within=1, studies=900)
    got = means(values, documents=names(documents, each))
    missed = float(((got.low > 0) | (got.high < 0)).mean())
    assert missed <= float(miss_rate(np.array(documents))) + 0.03
    if between and each > 1:  # which an interval over the texts does not
        got = means(values)
        assert ((got.low > 0) | (got.high < 0)).mean() > 1.3 * missed


@pytest.mark.parametrize(("documents", "each"), [(2, 12), (3, 8), (5, 4)])
def test_with_few_documents_that_do_not_differ_an_interval_is_no_narrower_than_over_their_excerpts(documents, each):
    values = clustered(np.random.default_rng(2), documents=documents, each=each, between=0, within=1, studies=300)
    over_documents, over_texts = (means(values, documents=of) for of in (names(documents, each), ()))
    widths = [(of.high - of.low).mean() for of in (over_documents, over_texts)]
    assert 0.95 * widths[1] < widths[0] < 1.5 * widths[1]


def test_everything_said_of_a_study_resamples_its_documents():
    """Twelve excerpts of each of eight documents, that differ much: by texts one sign, by documents none."""
    rng = np.random.default_rng(0)
    gamma = (
        np.array([0.5, 0.4, 0.3, -0.1, 0.2, -0.2, 0.3, -0.1])[:, None] + rng.normal(scale=0.01, size=(8, 12))
    ).reshape(-1, 1, 1)
    known, unknown = study_of(gamma, documents=names(8, 12)), study_of(gamma)
    for of in (head_means, layer_means, median_gamma):
        assert np.all(of(known).low < 0) and np.all(of(unknown).low > 0)
    assert verdicts(known)[0, 0] != verdicts(unknown)[0, 0]
    both = [compare(study_of(0 * gamma, documents=d.documents), d) for d in (known, unknown)]
    assert both[0].paired and both[0].difference.low[0, 0] < 0 < both[1].difference.low[0, 0]


def test_simultaneous_intervals_take_the_excerpts_of_a_document_as_one():
    """The mean of a document's excerpts has the interval that the excerpts have."""
    rng = np.random.default_rng(3)
    values = clustered(rng, documents=9, each=4, between=1, within=1, studies=5)
    by_mean = simultaneous(values.reshape(9, 4, 5).mean(axis=1))
    for got, expected in zip(simultaneous(values, documents=names(9, 4)), by_mean, strict=True):
        assert (got.value, got.low, got.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert simultaneous(values, documents=names(4, 9)) == simultaneous(values)  # of so few, coins say nothing


def test_that_there_are_few_documents_is_said_and_of_many_or_unknown_ones_nothing():
    assert few_documents_warning(()) == few_documents_warning(names(8, 3)) == few_documents_warning(names(3, 1)) == ""
    assert few_documents_warning(names(1, 8)) == (
        "All 8 are excerpts of one document, so the interval is over its excerpts and too narrow for others."
    )
    assert "only 2 documents" in few_documents_warning(names(2, 8))
    study = study_of(np.full((8, 1, 1), -0.5), documents=names(1, 8))
    assert answer(study).endswith(few_documents_warning(study.documents))


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
        (NEITHER, NEITHER, "no signal"),
        (ABOVE, NEITHER, "no signal"),
        (NEITHER, ABOVE, "no signal"),
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
    got = verdicts_of(*(np.array(gamma)[:, None, None] for gamma in (with_sink, without)))
    assert got.tolist() == [[verdict]] and verdict in meanings(len(with_sink))


def test_each_head_has_one_verdict_and_the_answer_counts_them():
    gamma = np.array([BELOW] * 8 + [ABOVE] + [SPLIT] + [[np.nan] * 8]).T[:, None]
    made = study_of(gamma)
    assert verdicts(made)[0].tolist() == ["follows the paper"] * 8 + ["mirror", "unstable", "undefined"]
    text = answer(made)
    assert text.startswith("Yes. Layer 0: low norm predicts attention. In 8 of 10 heads low-norm")
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
