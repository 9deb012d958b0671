"""Each number against a slow loop over its definition, and against examples worked out by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from analysis import Plan, alr, attention_loss, correlation, suggest_skip_layers
from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.measures import attention_lost, by_kv_head, kept_tokens
from analysis.metrics import LEAST_MASS, METRICS, PROBES, metrics, status
from analysis.records import from_json, to_json
from analysis.studies import layer_alr, policy_alr, study_of
from analysis.verdicts import answer, by_layer, in_short, verdicts, verdicts_of
from l2kv import CompressionSpec
from tests.support.losses import expected_losses, slow_losses
from tests.support.runs import random_run, run_of


@pytest.fixture(scope="module", params=[0, 1], ids=["random", "with ties and a sink"])
def run(request) -> Capture:
    rng = np.random.default_rng(request.param)
    norm, probe = rng.gamma(5, size=(3, 2, 40)), rng.gamma(0.3, size=(3, 6, 40))
    if request.param:
        norm, probe = norm.round(), probe.round(1)
        norm[..., 0], probe[..., 0] = 0.5, 20
    return run_of(norm, probe / probe.sum(-1, keepdims=True) * 0.9)


def test_expected_losses_are_the_mean_over_all_orders_of_equals():
    """The oracle itself, by all 12 orders of two and of three equals."""
    norms, attention = [2.0, 1.0, 2.0, 3.0, 1.0, 2.0], [0.1, 0.3, 0.05, 0.2, 0.15, 0.12]
    orders = [order for order in itertools.permutations(range(6)) if [norms[i] for i in order] == sorted(norms)[::-1]]
    assert len(orders) == 12
    mean = [sum(attention[i] for order in orders for i in order[:m]) / 12 for m in range(7)]
    assert expected_losses(attention, norms) == pytest.approx(mean)


@pytest.mark.parametrize("skip_first", [0, 1, 3])
def test_alr_and_the_loss_curves_are_the_papers_sums(run, skip_first):
    figures = alr(run, skip_first=skip_first)
    for layer in range(3):
        for head in range(6):
            low, high, ideal = slow_losses(run, layer, head, skip_first)
            curves = attention_loss(run, layer, head, skip_first=skip_first)
            for got, expected in ((curves.low_norm, low), (curves.high_norm, high), (curves.ideal, ideal)):
                np.testing.assert_allclose(got, expected, atol=1e-12)
            assert figures[layer, head] == pytest.approx(sum(a - b for a, b in zip(low[1:], ideal[1:], strict=True)))


@pytest.mark.parametrize("protected", [0, 7, 40, 99])
def test_the_loss_curves_end_at_what_the_protected_tokens_let_go(protected):
    rng = np.random.default_rng(4)  # no ties: of those a curve is the one expected, and a cache keeps the earlier
    run = run_of(rng.gamma(5, size=(3, 2, 40)), rng.dirichlet(np.full(40, 0.3), size=(3, 6)))
    for layer, head in np.ndindex(3, 6):
        curves = attention_loss(run, layer, head, protect_last=protected)
        free = max(40 - protected, 0)
        assert all(len(getattr(curves, name)) == free + 1 for name in ("low_norm", "high_norm", "ideal", "chance"))
        for policy, curve in (("low_norm", curves.low_norm), ("high_norm", curves.high_norm)):
            for ratio in (0.05, 0.5, 1.0):
                spec = CompressionSpec(keep_ratio=ratio, policy=policy, protect_last=protected)
                kept = kept_tokens(run, layer, head, spec)
                attention, norm = run.probe_attention[layer, head].astype(float), run.key_norm[layer, head // 3]
                # Of equals, the cache keeps the earlier; the curve is expected of any.
                both = (np.arange(40) < free) & np.isin(norm, norm[~kept]) & np.isin(norm, norm[:free][kept[:free]])
                lost = attention[~kept & ~both].sum() + attention[both].sum() * (~kept & both).sum() / max(
                    both.sum(), 1
                )
                assert curve[(~kept).sum()] == pytest.approx(lost, abs=1e-9)


def test_the_attention_lost_is_that_of_what_each_kv_head_evicts():
    """Slowly: the tokens that may go in order of norm, a head's own ratio and the skipped layers heeded."""
    run = random_run(5, n=20)
    spec = CompressionSpec(0.5, protect_first=1, protect_last=3, skip_layers=(1,), head_ratios={(2, 1): 0.25})
    lost = attention_lost(run, spec)
    for layer, head in np.ndindex(3, 6):
        kv_head = head // 3
        keep = 20 if layer == 1 else 5 if (layer, kv_head) == (2, 1) else 10
        norm = run.key_norm[layer, kv_head].tolist()
        evicted = sorted(range(1, 17), key=lambda i, norm=norm: -norm[i])[: 20 - keep]
        assert lost[layer, head] == pytest.approx(sum(float(run.probe_attention[layer, head, i]) for i in evicted))


def test_tokens_protected_at_the_beginning_are_on_no_loss_curve(run):
    curves, rest = attention_loss(run, 2, 4, protect_first=5), attention_loss(run, 2, 4, skip_first=5)
    assert all((getattr(curves, name) == getattr(rest, name)).all() for name in ("low_norm", "ideal", "chance"))


@pytest.mark.parametrize("probe", PROBES)
def test_the_alr_of_a_kv_head_is_that_of_the_mean_attention_of_its_query_heads(run, probe):
    rng = np.random.default_rng(3)
    rows = np.stack([rng.gamma(0.3, size=(3, 6, 40)) * (np.arange(40) < position) for position in (38, 39)])
    run = replace(run, recent_attention=rows.astype(np.float32))
    found = metrics(by_kv_head(run), probe=probe).of("alr")
    assert found.shape == (3, 2)
    for layer, kv_head in np.ndindex(3, 2):
        alrs = []
        for given, n in {
            "next token": [(run.probe_attention, 40)],
            "all queries": [(run.attention_received, 40)],
            "last queries": [(run.recent_attention[0], 38), (run.recent_attention[1], 39)],
        }[probe]:
            heads = [given[layer, head, :n].astype(float).tolist() for head in range(3 * kv_head, 3 * kv_head + 3)]
            mean = [sum(three) / 3 for three in zip(*heads, strict=True)]
            norms = run.key_norm[layer, kv_head, :n].tolist()
            alrs.append(sum(expected_losses(mean, norms)) - sum(expected_losses(mean, [-a for a in mean])))
        assert found[layer, kv_head] == pytest.approx(sum(alrs) / len(alrs))


def test_the_alr_of_a_kv_head_is_not_the_mean_of_those_of_its_query_heads():
    """Two heads, each the worst order of three; together they attend evenly to what the norms put last."""
    run = run_of([[[1.0, 2.0, 3.0]]], [[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    np.testing.assert_allclose(alr(run), [[1, 2]])
    # of the mean (0, .5, .5): by norm .5, 1, 1 is lost, ideally 0, .5, 1
    np.testing.assert_allclose(alr(by_kv_head(run)), [[1]])


@pytest.mark.parametrize("skip_first", [0, 1])
def test_alr_is_chance_times_one_plus_gamma(run, skip_first):
    chance = metrics(run, skip_first=skip_first).of("alr_chance")
    gamma = correlation(run, skip_first=skip_first)
    np.testing.assert_allclose(alr(run, skip_first=skip_first), chance * (1 + gamma), rtol=1e-9, atol=1e-12)
    for layer, head in np.ndindex(3, 6):
        curves = attention_loss(run, layer, head, skip_first=skip_first)
        assert chance[layer, head] == pytest.approx((curves.chance - curves.ideal)[1:].sum())


def test_gamma_by_hand():
    """Attention .5 .3 .2 (ranks 3 2 1): covariance with the norms' ranks over that with its own."""
    run = run_of([[[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]], [[2.0, 1.0, 3.0]]], [[[0.5, 0.3, 0.2]]] * 3)
    np.testing.assert_allclose(correlation(run)[:, 0], [-1, 1, -1 / 3], atol=1e-6)
    # norms 2 1 3: dropping the highest loses .2, then .2 + .5, then all; ideally .2, .5, all
    np.testing.assert_allclose(alr(run)[:, 0], [0, 0.6, 0.2], atol=1e-6)


def test_gamma_sees_the_sink_that_spearman_hides():
    norm = [0.1, *range(1, 20)]
    probe = [0.9, *(np.arange(1, 20) / 1900)]
    run = run_of([[norm]], [[probe]])
    assert correlation(run)[0, 0] < -0.8 and correlation(run, skip_first=1)[0, 0] == pytest.approx(1)
    assert correlation(run, "spearman")[0, 0] > 0.5
    assert verdicts(study_of(run))[0, 0] == "sink only"
    assert metrics(run).of("sink_share")[0, 0] == pytest.approx(0.9)


@pytest.mark.parametrize("skip_first", [0, 1])
def test_rank_correlations_are_those_of_their_definitions(run, skip_first):
    def pearson(x, y):
        mx, my = sum(x) / len(x), sum(y) / len(y)
        top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
        return top / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5

    def mean_ranks(x):
        return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]

    spearman, plain = (
        correlation(run, "spearman", skip_first=skip_first),
        correlation(run, "pearson", skip_first=skip_first),
    )
    for layer, head in np.ndindex(3, 6):
        x = run.key_norm[layer, head // 3, skip_first:].tolist()
        y = run.attention_received[layer, head, skip_first:].tolist()
        assert plain[layer, head] == pytest.approx(pearson(x, y))
        assert spearman[layer, head] == pytest.approx(pearson(mean_ranks(x), mean_ranks(y)))


def test_verdicts_by_sign_with_and_without_the_sink():
    rest, falling, rising = [1.0, 2.0, 3.0], [0.03, 0.02, 0.01], [0.01, 0.02, 0.03]
    low_sink, high_sink = [0.5, *rest], [9.0, *rest]
    run = run_of(
        [[low_sink], [low_sink], [high_sink], [high_sink]],
        [[[0.9, *falling]], [[0.9, *rising]], [[0.9, *falling]], [[0.9, *rising]]],
    )
    assert verdicts(study_of(run))[:, 0].tolist() == ["follows the paper", "sink only", "hidden by the sink", "mirror"]


def test_what_hangs_on_the_first_token_alone_is_not_said_of_the_others():
    noise = np.tile([0.02, 0.01, 0.01, 0.02], 25)
    run = run_of([[[0.5, *np.arange(1.0, 101)]], [[200.0, *np.arange(1.0, 101)]]], [[[0.9, *noise]]] * 2)
    assert abs(correlation(run, skip_first=1)).max() < 0.1 < abs(correlation(run)).min()
    assert verdicts(study_of(run))[:, 0].tolist() == ["sink only", "too weak to call"]


@pytest.mark.parametrize(
    "paper,mirror,weak,begins",
    [
        (8, 1, 1, "Yes. Layer"),
        (6, 4, 0, "Mostly yes. Layer"),
        (4, 4, 2, "Mixed. Layer"),
        (1, 1, 8, "Mixed. Layer"),
        (4, 6, 0, "Mostly no, rather the opposite. Layer"),
        (1, 8, 1, "No, the opposite. Layer"),
        (0, 0, 0, "This run"),
    ],
)
def test_the_answer_is_a_sentence_that_counts_heads(paper, mirror, weak, begins):
    ranks, alternating = np.arange(1.0, 42.0), np.array([0.1, 0.2] * 20 + [0.1])
    rows = [1 / ranks] * paper + [ranks / 1000] * mirror + [alternating] * weak
    constant = not rows
    run = run_of([[ranks if rows else np.ones(41)]] * max(len(rows), 1), [[row] for row in rows or [ranks]])
    text = answer(study_of(run))
    assert text.startswith(begins)
    if not constant:
        assert (
            f"In {paper} of 10 heads low-norm" in text
            and f"in {mirror} high-norm" in text
            and f"; in {weak} it is too weak to call" in text
        )


STEPS = ["Yes.", "Mostly yes.", "Mixed.", "Mostly no,", "No,"]


def test_more_heads_against_the_paper_never_soften_the_answer():
    for total in (10, 48):
        for weak in range(total // 4):
            said = [in_short(total - weak - mirror, mirror, total) for mirror in range(total - weak + 1)]
            steps = [next(i for i, begins in enumerate(STEPS) if one.startswith(begins)) for one in said]
            assert steps == sorted(steps)


def test_with_low_and_high_norms_exchanged_yes_is_no():
    for follows in range(21):
        for mirror in range(21 - follows):
            said = [in_short(follows, mirror, 20), in_short(mirror, follows, 20)]
            one, other = (next(i for i, begins in enumerate(STEPS) if words.startswith(begins)) for words in said)
            assert one == len(STEPS) - 1 - other


def test_each_layer_is_told_by_what_more_than_half_of_its_heads_say():
    follows, sink, mirror, weak, none = "follows the paper", "sink only", "mirror", "too weak to call", "undefined"
    verdict = [
        [weak, weak, follows],
        [follows, follows, mirror],
        [follows, none, none],
        [mirror, mirror, follows],
        [sink, sink, follows],
        [sink, follows, mirror],
        [sink, mirror, weak],
        [follows, follows, follows],
        [none, none, none],
    ]
    assert by_layer(np.array(verdict, dtype=object)) == (
        "Layers 1-2, 7: low norm predicts attention; 4: only through the attention sink; 5: partly through the "
        "attention sink; 3: high norm predicts attention; 0: neither does; 6: mixed; 8: cannot be told."
    )
    assert by_layer(np.array([["unstable"]], dtype=object)) == "Layer 0: neither does."


def test_a_head_with_next_to_no_attention_outside_the_sink_has_no_figure_without_it():
    rest = 1 / np.arange(1.0, 40.0)
    norm = np.arange(1.0, 41.0)
    for mass, known in ((0.9 * LEAST_MASS, False), (1.1 * LEAST_MASS, True), (1e-15, False), (0.0, False)):
        row = np.concatenate([[1 - mass], mass * rest / rest.sum()])
        run = run_of([[norm]], [[row]], received=[[row]], recent=[[[row * (np.arange(40) < 39)]]])
        assert status(run)[0, 0] == "ok" and np.isfinite(correlation(run)).all()
        assert np.isfinite(correlation(run, skip_first=1)).all() == known
        assert verdicts(study_of(run))[0, 0] == ("follows the paper" if known else "sink only")
        for probe in PROBES:
            found = metrics(run, probe=probe)
            assert (found.status_of("gamma_skip_first")[0, 0] == "ok") == known
            assert found.status_of("gamma")[0, 0] == "ok"
        assert (metrics(run, skip_first=1).status_of("gamma")[0, 0] == "ok") == known
        if not known and mass > 1e-12:
            assert status(run, skip_first=1)[0, 0] == "little attention"


def test_without_the_others_the_first_token_cannot_be_borne_out():
    gamma = np.array([-0.9, -0.01, 0.9, np.nan])
    assert verdicts_of(gamma[None], np.full((1, 4), np.nan)).tolist() == [
        "sink only", "too weak to call", "too weak to call", "undefined",
    ]  # fmt: skip


def test_a_handful_of_tokens_gets_no_answer():
    ranks = np.arange(1.0, 6.0)
    assert answer(study_of(run_of([[ranks]], [[1 / ranks]]))) == (
        "This run cannot tell: 5 tokens are too few. Take a text of some hundred."
    )


def test_the_undefined_is_named_and_never_a_number():
    run = run_of(
        [[[1.0, 1.0, 1.0, 1.000001]], [[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]],
        [[[0.4, 0.3, 0.2, 0.1]], [[0.0, 0.0, 0.0, 0.0]], [[0.4, 0.3, 0.2, 0.1]]],
    )
    assert status(run)[:, 0].tolist() == ["constant norms", "no attention", "ok"]
    for figure in (correlation(run), correlation(run, "spearman"), alr(run)):
        assert np.isnan(figure[:2]).all() and np.isfinite(figure[2]).all()
    assert verdicts(study_of(run))[:, 0].tolist() == ["undefined", "undefined", "follows the paper"]
    assert set(status(run, skip_first=2).ravel()) == {"too short"} and np.isnan(correlation(run, skip_first=2)).all()


def test_an_unknown_method_is_refused(run):
    with pytest.raises(ValueError, match="gini, spearman, pearson"):
        correlation(run, "kendall")


def test_layers_are_skipped_where_the_policy_is_no_better_than_a_random_order():
    ranks = np.arange(1.0, 9.0)
    run = run_of([[ranks], [ranks], [np.ones(8)]], [[1 / ranks], [ranks], [ranks]])
    study = study_of(run)
    assert layer_alr(study)[0, :2] == pytest.approx([0, 2])
    assert suggest_skip_layers(study).layers == (1, 2)
    assert suggest_skip_layers(study, "high_norm").layers == (0, 2)
    assert suggest_skip_layers(study, threshold=2.5).layers == (2,)
    assert "8 tokens" in suggest_skip_layers(study).rule and "skipped, 1 because" in suggest_skip_layers(study).rule


@pytest.mark.parametrize("probe", PROBES)
def test_the_functions_of_the_library_give_the_metrics_of_their_names(run, probe):
    run = replace(run, recent_attention=run.probe_attention[None] * (np.arange(40) < 39))
    found = metrics(run, probe, 1)
    for method, name in (("gini", "gamma"), ("spearman", "spearman"), ("pearson", "pearson")):
        np.testing.assert_array_equal(correlation(run, method, probe=probe, skip_first=1), found.of(name))
    np.testing.assert_array_equal(alr(run, probe=probe, skip_first=1), found.of("alr"))
    np.testing.assert_array_equal(status(run, probe=probe, skip_first=1), found.status_of("gamma"))


def test_alr_by_the_token_and_by_the_chance_level_are_its_quotients(run):
    found = metrics(run, skip_first=1)
    np.testing.assert_allclose(found.of("alr_per_token"), found.of("alr") / 39)
    np.testing.assert_allclose(found.of("normalised_alr"), found.of("alr") / found.of("alr_chance"))


def test_asking_for_some_metrics_gives_these_and_a_slip_is_told_the_nearest(run):
    some = metrics(run, names=["overlap", "gamma"])
    assert some.names == ("overlap", "gamma") and some.values.shape == (2, 3, 6)
    np.testing.assert_array_equal(some.of("gamma"), metrics(run).of("gamma"))
    with pytest.raises(SettingsError, match="Did you mean 'spearman'"):
        metrics(run, names=["spaerman"])


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_stays_within_the_range_that_it_is_shown_on(run, name):
    values, metric = metrics(run).of(name), METRICS[name]
    assert (metric.low is None or values.min() >= metric.low - 1e-12) and metric.title and metric.about
    assert metric.high is None or values.max() <= metric.high + 1e-12
    assert metric.diverging == (metric.low == -1)


def test_a_sink_may_hide_that_the_others_are_in_the_worst_order():
    ranks = np.arange(1.0, 9.0)
    run = run_of([[[0.5, *ranks]]], [[[20.0, *ranks]]])  # a sink of low norm; among the others the mirror holds
    assert suggest_skip_layers(study_of(run)).layers == ()
    assert metrics(run, skip_first=1).of("normalised_alr") == pytest.approx(np.array([[2.0]]))


def test_a_spread_of_norms_of_a_thousandth_is_an_order():
    run = run_of([[[1.0, 1.0001, 1.0002, 1.0003]]], [[[0.4, 0.3, 0.2, 0.1]]])
    assert status(run)[0, 0] == "ok" and correlation(run)[0, 0] == pytest.approx(-1)


def test_a_layer_counts_its_heads_by_what_there_is_to_lose(run):
    study, low, chance = study_of(run), alr(run), metrics(run).of("alr_chance")
    np.testing.assert_allclose(layer_alr(study)[0], low.mean(1) / chance.mean(1))
    np.testing.assert_allclose(layer_alr(study, "high_norm")[0], 2 - low.mean(1) / chance.mean(1))
    np.testing.assert_allclose(policy_alr(study)[0], low)
    np.testing.assert_allclose(policy_alr(study, "high_norm")[0] / chance, 2 - low / chance)
    np.testing.assert_allclose(layer_alr(study, "random"), 1)


def test_a_plan_is_read_back_as_it_was_written():
    plan = Plan("books-5m", CompressionSpec(keep_ratio=0.3, skip_layers=(0, 4), protect_last=32), "by hand")
    assert from_json(Plan, to_json(plan)) == plan
