"""Ties, norms that differ by rounding alone: what is equal, and that no number depends on the rounding."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis import alr, attention_loss, captures, correlation
from analysis.measures import by_kv_head
from analysis.metrics import METRICS, PROBES, by_query, metrics, status
from analysis.paper.why import factors, sink_head
from analysis.plans.curves import loss_curves
from analysis.studies import study_of
from analysis.ties import average_ties, levelled, shared_ranks, tolerance
from analysis.verdicts import verdicts
from tests.support.runs import made_up, run_of

DTYPES = ("float32", "float16", "bfloat16")


# What is equal


def slow_groups(norms: list[float], near: float) -> list[list[float]]:
    """The rule, from the other end: groups are cut at their widest gaps, all of that width, until none is too wide."""

    def cut(group: list[float]) -> list[list[float]]:
        gaps = [b - a for a, b in itertools.pairwise(group)]
        if group[-1] - group[0] <= near * group[0]:
            return [group]
        at = [i + 1 for i, gap in enumerate(gaps) if gap == max(gaps)]
        return [part for a, b in itertools.pairwise([0, *at, len(group)]) for part in cut(group[a:b])]

    # First of all where neighbours are further apart than the tolerance: it grows with the norm, so that such a gap
    # may be narrower than others that are not.
    chains, ascending = [], sorted(norms)
    for norm in ascending:
        if not chains or norm - chains[-1][-1] > near * chains[-1][-1]:
            chains.append([])
        chains[-1].append(norm)
    return [group for chain in chains for group in cut(chain)]


def norms_of_a_kind(kind: str, dtype: str, rng) -> np.ndarray:
    """[3, 2, 60]"""
    eps = tolerance(dtype)
    if kind == "spread":
        return rng.gamma(20, size=(3, 2, 60))
    if kind == "dense":  # one chain, many times as long as the tolerance
        return 10 * (1 + 20 * eps * rng.random((3, 2, 60)))
    if kind == "a grid":  # gaps of one width
        return 8 * (1 + 0.25 * eps * rng.integers(0, 40, size=(3, 2, 60)))
    if kind == "few tokens":  # each with its rounding
        return rng.choice(rng.gamma(20, size=9), size=(3, 2, 60)) * (1 + eps * (rng.random((3, 2, 60)) - 0.5))
    return np.where(rng.random((3, 2, 60)) < 0.5, 0.0, 3.0)  # zeros, and exact equals


KINDS = ("spread", "dense", "a grid", "few tokens", "zeros")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_are_the_groups_of_the_rule(dtype, kind, seed):
    norm = norms_of_a_kind(kind, dtype, np.random.default_rng(seed)).astype(np.float32)
    found = levelled(norm, dtype)
    assert found.dtype == np.float64 and found.shape == norm.shape
    for given, levels in zip(norm.reshape(6, 60).tolist(), found.reshape(6, 60).tolist(), strict=True):
        groups = slow_groups(given, tolerance(dtype))
        assert [
            sorted(x for x, at in zip(given, levels, strict=True) if at == level) for level in sorted(set(levels))
        ] == groups
        assert sorted(set(levels)) == [group[0] for group in groups]  # the lowest of each


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_are_within_the_tolerance_and_what_is_further_from_its_neighbours_is_no_equal(dtype, kind):
    norm = norms_of_a_kind(kind, dtype, np.random.default_rng(9)).astype(np.float32)
    levels, norm = levelled(norm, dtype), norm.astype(np.float64)
    assert (norm >= levels).all() and (norm - levels <= tolerance(dtype) * levels).all()
    for given, of in zip(norm.reshape(6, 60), levels.reshape(6, 60), strict=True):
        order = given.argsort()
        far = np.diff(given[order]) > tolerance(dtype) * given[order][:-1]
        assert (np.diff(of[order])[far] > 0).all()


def test_the_rule_by_hand():
    """In bfloat16 the tolerance is 1 / 128, of 128 just over 1."""
    assert tolerance("bfloat16") == pytest.approx(1 / 128, rel=1e-4) and tolerance("float32") == 3 * 2**-23
    norm = np.array([128.0, 128.5, 129.0, 131.0, 130.25, 135.0, 133.5])
    # 128, 128.5, 129 | 130.25, 131 | 133.5 | 135: gaps .5 .5 1.25 .75 2.5 1.5
    assert levelled(norm, "bfloat16").tolist() == [128, 128, 128, 130.25, 130.25, 135, 133.5]
    # a chain of 128, 128.4, 129.2, 129.6, longer than the tolerance: cut at its widest gap, .8
    assert levelled(np.array([129.6, 128.0, 129.2, 128.4]), "bfloat16").tolist() == [129.2, 128, 129.2, 128]
    # of three equal gaps none is the widest
    assert levelled(np.array([128, 128.75, 129.5, 130.25]), "bfloat16").tolist() == [128, 128.75, 129.5, 130.25]
    assert len(set(levelled(norm, "float16"))) == len(set(levelled(norm, "of some other kind"))) == 7
    assert levelled(np.zeros((2, 0)), "float32").shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_is_rounded_at_many_places_has_one_norm(dtype):
    """Turned by as many angles, as rotary embedding does it."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    for key in torch.randn(9, 32).to(kind):
        angle = torch.rand(200, 16, dtype=torch.float64) * 2 * torch.pi
        cos, sin = (torch.cat([x, x], dim=-1).to(kind) for x in (angle.cos(), angle.sin()))
        norm = (key * cos + torch.cat([-key[16:], key[:16]]) * sin).float().norm(dim=-1).numpy()
        assert len(np.unique(norm)) > 1 and len(np.unique(levelled(norm, dtype))) == 1


def test_ranks_that_equals_share_are_those_of_counting():
    values = np.random.default_rng(0).integers(0, 9, size=(2, 3, 20)).astype(float)
    first, last = shared_ranks(values)
    for row in np.ndindex(2, 3):
        for i, value in enumerate(values[row]):
            assert first[row][i] == sum(values[row] < value) + 1 and last[row][i] == sum(values[row] <= value)


def test_evened_attention_is_the_mean_over_all_orders_of_equals():
    values, attention = np.array([2.0, 1.0, 2.0, 3.0, 2.0]), np.array([0.1, 0.3, 0.05, 0.2, 0.15], np.float32)
    orders = [order for order in itertools.permutations(range(5)) if (values[list(order)] == np.sort(values)).all()]
    assert len(orders) == 6
    np.testing.assert_allclose(average_ties(attention, values), np.mean([attention[list(o)] for o in orders], axis=0))


# What is made of it


def papers_alr(order, attention) -> float:
    """Dropping tokens in this order, against the ideal one: Eq. 5-7."""
    ideal = sorted(attention)
    return sum(sum(attention[i] for i in order[:m]) - sum(ideal[:m]) for m in range(1, len(order) + 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_alr_is_the_mean_over_all_orders_of_tokens_that_rounding_tells_apart(dtype):
    near = 0.4 * tolerance(dtype)
    norm = np.array([2.0, 1.0 + near, 2.0 + near, 3.0, 1.0, 2.0 - near]) * 10
    attention = [0.1, 0.3, 0.05, 0.2, 0.15, 0.12]
    orders = [
        [*one, *other, *rest]
        for one, other, rest in itertools.product([[3]], *map(itertools.permutations, ([0, 2, 5], [1, 4])))
    ]
    run = replace(run_of([[norm]], [[attention]]), dtype=dtype)
    expected = np.mean([papers_alr(order, attention) for order in orders])
    chance = np.mean([papers_alr(order, attention) for order in itertools.permutations(range(6))])
    assert alr(run)[0, 0] == pytest.approx(expected, rel=1e-6)
    assert correlation(run)[0, 0] == pytest.approx(expected / chance - 1, rel=1e-5)
    dropped = [[sum(attention[i] for i in order[:m]) for m in range(7)] for order in orders]
    np.testing.assert_allclose(attention_loss(run, 0, 0).low_norm, np.mean(dropped, axis=0), rtol=1e-6)
    last = [[sum(attention[i] for i in order[6 - m :]) for m in range(7)] for order in orders]
    np.testing.assert_allclose(attention_loss(run, 0, 0).high_norm, np.mean(last, axis=0), rtol=1e-6)
    curves = loss_curves(run, bins=8)
    for b in range(9):
        gone = 6 - math.ceil(6 * b / 8)
        assert curves.low[0, 0, b] == pytest.approx(np.mean(dropped, axis=0)[gone], rel=1e-6)
        assert curves.high[0, 0, b] == pytest.approx(np.mean(last, axis=0)[gone], rel=1e-6)


def rounded_runs(dtype: str, n: int = 60):
    """A run of few tokens that come again and again, and three of the same whose norms were rounded otherwise."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 11, size=n)
    exact = 5 + np.stack([rng.permutation(11) for _ in range(6)]).reshape(3, 2, 11)[..., tokens]
    probe, received, recent = rng.gamma(0.3, size=(3, 6, n)), rng.gamma(0.3, size=(3, 6, n)), np.zeros((5, 3, 6, n))
    for i, row in enumerate(recent):
        row[..., : n - 5 + i] = rng.gamma(0.3, size=(3, 6, n - 5 + i))
    run = replace(run_of(exact, probe, received, recent), dtype=dtype)
    roundings = [1 + tolerance(dtype) * 0.6 * (rng.random(exact.shape) - 0.5) for _ in range(3)]
    return run, [replace(run, key_norm=(exact * rounding).astype(np.float32)) for rounding in roundings]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_figure_hangs_on_how_equal_tokens_were_rounded(dtype, probe):
    run, others = rounded_runs(dtype)
    for other in others:
        assert (np.argsort(other.key_norm) != np.argsort(run.key_norm)).any()
        for skip_first in (0, 1):
            for view in (lambda x: x, by_kv_head):
                one, two = (metrics(view(x), probe=probe, skip_first=skip_first) for x in (run, other))
                for name in set(METRICS) - {"pearson"}:  # which is of the values
                    np.testing.assert_allclose(one.of(name), two.of(name), atol=1e-12, err_msg=name)
                    np.testing.assert_array_equal(one.status_of(name), two.status_of(name))


@pytest.mark.parametrize("skip_first", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nor_do_measures_curves_and_single_queries(dtype, skip_first):
    run, others = rounded_runs(dtype)
    for other in others:
        np.testing.assert_array_equal(verdicts(study_of(run)), verdicts(study_of(other)))
        chance = metrics(run, skip_first=skip_first).of("alr_chance")
        gamma = correlation(other, skip_first=skip_first)
        np.testing.assert_allclose(alr(other, skip_first=skip_first), chance * (1 + gamma))
        for head in range(6):
            curves = [attention_loss(x, 1, head, skip_first=skip_first) for x in (run, other)]
            for name in ("low_norm", "high_norm", "ideal", "chance"):
                np.testing.assert_allclose(*(getattr(each, name) for each in curves), atol=1e-12)
        for last in (0, 7):
            one, two = (loss_curves(x, protect_last=last) for x in (run, other))
            np.testing.assert_allclose(one.low, two.low, atol=1e-12)
            np.testing.assert_allclose(one.high, two.high, atol=1e-12)
        np.testing.assert_allclose(by_query(run), by_query(other), atol=1e-12)


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_gives_what_its_row_gives_as_that_of_the_next_token(probe):
    run = rounded_runs("bfloat16")[1][0]
    given = {"next token": run.probe_attention, "all queries": run.attention_received}.get(probe)
    if given is None:
        run = replace(run, recent_attention=run.recent_attention[-1:])
        given = run.recent_attention[0]
        shorter = run_of(run.key_norm[..., :-1], given[..., :-1])
    else:
        shorter = run_of(run.key_norm, given)
    shorter = replace(shorter, dtype="bfloat16")
    for name, skip_first in (("gamma", 0), ("gamma_skip_first", 1)):
        np.testing.assert_allclose(
            metrics(run, probe=probe).of(name), correlation(shorter, skip_first=skip_first), atol=1e-12
        )
    np.testing.assert_allclose(metrics(run, probe=probe).of("alr"), alr(shorter), atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_that_are_all_equal_are_constant_and_never_an_order(dtype):
    """Whatever the dtype: else Γ would be 0 of a head that has none."""
    within, wider = (1 + np.linspace(0, share * tolerance(dtype), 40) for share in (0.99, 1000))
    run = replace(run_of([[within], [wider]], [[np.arange(40.0)]] * 2), dtype=dtype)
    assert status(run)[:, 0].tolist() == ["constant norms", "ok"]
    assert np.isnan(correlation(run)[0, 0]) and np.isnan(alr(run)[0, 0]) and np.isfinite(correlation(run)[1, 0])
    for probe in ("next token", "all queries"):
        shown = metrics(run, probe=probe)
        for name, metric in METRICS.items():
            assert shown.status_of(name)[0, 0] == ("constant norms" if metric.ranks else "ok")
            assert np.isnan(shown.of(name)[0, 0]) == metric.ranks
    # a chain of equal steps that is far longer than the tolerance has none, and an order
    assert correlation(run)[1, 0] == pytest.approx(1)


def test_a_sink_is_the_shortest_key_also_where_its_token_comes_again():
    norm = 5 + np.arange(30.0)
    norm[0], norm[17] = 2 * (1 + 2**-22), 2
    run = run_of([[norm]], [[[0.9, *np.full(29, 0.1 / 29)]]])
    assert run.key_norm[0, 0].argmin() == 17 and sink_head(run).low_norm


def test_lengths_that_rounding_tells_apart_are_one_length():
    exact, rounded = made_up(n=40), made_up(n=40)
    size = np.linalg.norm(exact.keys, axis=-1, keepdims=True)
    exact.keys[:] *= (2 + np.arange(40) % 5)[:, None] / size
    rounded.keys[:] = exact.keys * (1 + 0.005 * (np.random.default_rng(0).random((2, 40, 1)) - 0.5))
    rounded = replace(rounded, dtype="bfloat16")
    few = factors(replace(exact, dtype="bfloat16"))
    assert factors(replace(rounded, dtype="float32")).by_length[0] != pytest.approx(few.by_length[0], abs=1e-4)
    # the attention is that of the rounded keys: only its order counts here, and it hardly changes
    assert factors(rounded).by_length[0] == pytest.approx(few.by_length[0], abs=0.02)


def test_the_norms_of_a_run_are_levelled_once(monkeypatch):
    """However many metrics, probes and views are asked for: it takes longest of all."""
    run, _ = rounded_runs("bfloat16")
    calls = []
    monkeypatch.setattr(captures, "levelled", lambda *given: calls.append(1) or levelled(*given))
    for probe in PROBES:
        metrics(run, probe), metrics(run, probe, 1), metrics(by_kv_head(run), probe)
    loss_curves(run, protect_last=7), attention_loss(run, 1, 2), by_query(run), correlation(run, "spearman")
    assert len(calls) == 1
