"""Probes: each of the last queries against slow loops; the self-test; both in the app."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis import by_query
from analysis import selftest as synthetic_module
from analysis.__main__ import main
from analysis.captures import Capture, load_run, save_run
from analysis.measures import by_kv_head
from analysis.metrics import METRICS, PROBES, STATUSES, metrics
from analysis.selftest import GAMMA, check, is_synthetic, synthetic_run
from analysis.studies import study_of
from analysis.verdicts import verdicts
from app import figures
from app.figures.style import PRIMARY
from tests.support.losses import expected_losses
from tests.support.runs import run_of

LAYERS, HEADS, KV_HEADS, TOKENS, QUERIES = 3, 4, 2, 24, 6
WINDOW = 9


@pytest.fixture(scope="module", params=[0, 1], ids=["random", "with ties and a sink"])
def run(request) -> Capture:
    """Layer 2 has a sliding window, which its queries do not see beyond."""
    rng = np.random.default_rng(request.param)
    norm, rows = rng.gamma(5, size=(LAYERS, KV_HEADS, TOKENS)), rng.gamma(0.5, size=(QUERIES, LAYERS, HEADS, TOKENS))
    if request.param:
        norm, rows = norm.round(), rows.round(1)
        norm[..., 0], rows[..., 0] = 0.5, 9
    for i, query in enumerate(range(TOKENS - QUERIES, TOKENS)):
        rows[i, ..., query:] = 0
        rows[i, 2, :, : query - WINDOW + 1] = 0
    rows = 0.9 * rows / np.maximum(rows.sum(-1, keepdims=True), 1e-9)
    probe = rng.gamma(0.5, size=(LAYERS, HEADS, TOKENS))
    made = run_of(norm, probe, rng.gamma(0.5, size=probe.shape), recent=rows)
    return replace(made, windows=(0, 0, WINDOW), layer_kinds=("full", "full", "sliding"))


# Each of the last queries by itself


def slow_metrics(norms: list[float], attention: list[float], visible: int) -> dict[str, float]:
    """Every metric of one head and one query, from its definition."""
    n, total = len(norms), sum(attention)

    def alr(tokens):
        """The ALR of some of the tokens, and the one expected of a random order."""
        of, mass, size = [attention[i] for i in tokens], sum(attention[i] for i in tokens), len(tokens)
        found, least = expected_losses(of, [norms[i] for i in tokens]), expected_losses(of, [-a for a in of])
        even = [m / size * mass for m in range(1, size + 1)]
        return sum(found) - sum(least), sum(even) - sum(least)

    loss, chance = alr(range(n))
    loss_without, chance_without = alr(range(1, n))
    kept = math.ceil(n / 2)
    by_norm = set(sorted(range(n), key=lambda i: (norms[i], i))[:kept])
    ideal = set(sorted(range(n), key=lambda i: (-attention[i], i))[:kept])
    entropy = -sum(a / total * math.log2(a / total) for a in attention if a > 0)
    return {
        "gamma": loss / chance - 1,
        "gamma_skip_first": loss_without / chance_without - 1,
        "alr": loss,
        "alr_chance": chance,
        "alr_per_token": loss / n,
        "normalised_alr": loss / chance,
        "spearman": stats.spearmanr(norms, attention).statistic,
        "pearson": stats.pearsonr(norms, attention).statistic,
        "sink_share": attention[0] / total,
        "overlap": len(by_norm & ideal) / kept,
        "entropy": entropy,
        "entropy_normalised": entropy / math.log2(visible),
    }


def test_every_metric_of_each_query_is_that_of_a_slow_loop_over_the_tokens_before_it(run):
    found = {name: by_query(run, name) for name in METRICS}
    for w, query in enumerate(range(TOKENS - QUERIES, TOKENS)):
        for layer, head in np.ndindex(2, HEADS):
            norms = run.key_norm[layer, head // 2].astype(float).tolist()[:query]
            row = run.recent_attention[w, layer, head].astype(float).tolist()[:query]
            for name, value in slow_metrics(norms, row, query).items():
                assert found[name][w, layer, head] == pytest.approx(value, abs=1e-9), (name, w, layer, head)
    # Of the layer with a window only what looks at attention alone is defined: of the 8 keys before the query's own.
    for name, metric in METRICS.items():
        assert np.isfinite(found[name][:, 2]).all() == (not metric.ranks)
    row = run.recent_attention[3, 2, 1].astype(float)
    share = row[row > 0] / row.sum()
    assert found["entropy_normalised"][3, 2, 1] == pytest.approx(-(share * np.log2(share)).sum() / math.log2(8))


@pytest.mark.parametrize("name", METRICS)
def test_the_last_queries_are_the_mean_over_those_that_define_a_metric(run, name):
    holed = replace(run, recent_attention=run.recent_attention.copy())
    holed.recent_attention[[0, 3], 0, 1] = 0  # no attention at all
    holed.recent_attention[:, 1, 2] = 0
    each, shown = by_query(holed, name), metrics(holed, probe="last queries")
    assert np.isnan(each[[0, 3], 0, 1]).all() and np.isfinite(each[[1, 2, 4, 5], 0, 1]).all()
    assert shown.of(name)[0, 1] == pytest.approx(sum(each[w, 0, 1] for w in (1, 2, 4, 5)) / 4)
    assert shown.of(name)[1, 0] == pytest.approx(sum(each[:, 1, 0]) / QUERIES)
    words = shown.status_of(name)
    assert words[0, 1] == "ok" and words[1, 2] == "no attention" and np.isnan(shown.of(name)[1, 2])
    assert set(words[2]) == {"sliding window" if METRICS[name].ranks else "ok"}


def test_a_query_with_too_few_tokens_before_it_does_not_count():
    rng = np.random.default_rng(0)
    rows = np.tril(rng.gamma(1, size=(1, 1, 5, 5)), -1).transpose(2, 0, 1, 3)
    run = run_of(rng.gamma(5, size=(1, 1, 5)), rng.gamma(1, size=(1, 1, 5)), recent=rows)
    assert np.isfinite(by_query(run)[:, 0, 0]).tolist() == [False, False, False, True, True]
    assert np.isfinite(by_query(run, "entropy")[:, 0, 0]).tolist() == [False, False, True, True, True]
    without = metrics(run, probe="last queries", skip_first=1)
    assert without.of("gamma")[0, 0] == pytest.approx(by_query(run, "gamma_skip_first")[4, 0, 0])
    assert metrics(run, probe="last queries").of("gamma")[0, 0] == pytest.approx(by_query(run)[3:, 0, 0].mean())


def test_a_run_without_last_queries_is_said_to_have_none(run):
    old = replace(run, recent_attention=run.recent_attention[:0])
    shown = metrics(old, probe="last queries")
    assert np.isnan(shown.values).all() and set(shown.status_of("entropy").ravel()) == {"no queries kept"}
    assert STATUSES[shown.status.max()] == "no queries kept" and by_query(old).shape == (0, LAYERS, HEADS)
    np.testing.assert_array_equal(metrics(old).values, metrics(run).values)


def test_an_unknown_metric_or_probe_is_refused_by_name(run):
    with pytest.raises(ValueError, match=r"metric must be one of gamma, .*'delta'"):
        by_query(run, "delta")
    with pytest.raises(ValueError, match="probe must be one of next token, last queries, all queries"):
        metrics(run, probe="every query")


def test_the_numbers_by_a_probe_are_of_its_attention_with_and_without_the_first_token(run):
    received = replace(run, probe_attention=run.attention_received, windows=(0, 0, 0))
    for skip_first in (0, 1):
        ours, plain = metrics(run, "all queries", skip_first), metrics(received, skip_first=skip_first)
        np.testing.assert_allclose(ours.values, plain.values, atol=1e-12)
        np.testing.assert_array_equal(ours.status, plain.status)
        by_last = metrics(run, "last queries", skip_first)
        np.testing.assert_allclose(
            by_last.of("gamma"), metrics(run, "last queries").of("gamma_skip_first" if skip_first else "gamma")
        )
    both = study_of(run), study_of(received)
    np.testing.assert_array_equal(verdicts(both[0], probe="all queries"), verdicts(both[1]))
    assert set(verdicts(both[0], probe="last queries")[2]) == {"undefined"}
    assert set(by_last.status_of("gamma")[2]) == {"sliding window"}


# The self-test


def slow_gamma(norms, attention) -> float:
    """cov(a, rank(norm)) / cov(a, rank(a)), in exact whole ranks."""
    tokens = range(len(norms))
    by_norm, by_attention = (sorted(tokens, key=lambda i: values[i]) for values in (norms, attention))
    middle = (len(norms) - 1) / 2

    def covariance(order):
        return sum(float(attention[i]) * (rank - middle) for rank, i in enumerate(order))

    return covariance(by_norm) / covariance(by_attention)


def test_the_synthetic_run_has_the_figures_that_it_is_said_to_have():
    run = synthetic_run()
    rows = {run.n_tokens: run.probe_attention, run.n_tokens + 1: run.attention_received}
    rows |= dict(zip(run.recent_positions, run.recent_attention, strict=True))
    assert len(rows) == 18
    for end, attention in rows.items():
        for layer, head in np.ndindex(run.n_layers, run.n_heads):
            norms = run.key_norm[layer, run.kv_head(head)][:end]
            assert slow_gamma(norms, attention[layer, head][:end]) == pytest.approx(GAMMA[layer], abs=1e-12)
            assert stats.spearmanr(norms, attention[layer, head][:end]).statistic == pytest.approx(GAMMA[layer])
    np.testing.assert_allclose(run.probe_attention.sum(-1), 0.9, rtol=1e-6)
    np.testing.assert_allclose([run.pooled(0, h).sum(-1).mean() for h in range(4)], 1, atol=0.03)
    shares = metrics(run).of("sink_share")
    assert shares[0, 0] > 0.9 and shares[2, 0] > 0.9 and shares.min() < 0.02  # with a sink and without
    assert {run.model, run.architecture, run.text.split()[0], run.probe_label} == {"synthetic"}


def test_the_self_test_measures_what_is_known_also_from_a_file(tmp_path):
    found = check(load_run(save_run(synthetic_run(), tmp_path / "run.safetensors")))
    assert found.passed and found.error < 1e-12 and "The self-test passed" in str(found)
    assert {reading.probe for reading in found.readings} == set(PROBES) and len(found.readings) == 3 * 3 * 3


@pytest.mark.parametrize("damage", ["probe_attention", "recent_attention", "attention_received", "key_norm"])
def test_measurements_that_are_off_are_caught(damage):
    run = synthetic_run()
    values = getattr(run, damage).copy()
    values[..., 1, 3:5] = values[..., 1, 4:2:-1]  # two tokens of one head change places
    found = check(replace(run, **{damage: values}))
    assert not found.passed and found.error > 1e-4 and "FAILED" in str(found)


def test_a_run_of_a_model_has_no_known_figures(run):
    assert is_synthetic(synthetic_run()) and not is_synthetic(run) and not is_synthetic(replace(run, model="synthetic"))
    with pytest.raises(ValueError, match="only the synthetic run"):
        check(run)
    none = check(replace(synthetic_run(), recent_attention=synthetic_run().recent_attention[:0]))
    assert none.error == math.inf and not none.passed  # what cannot be read has not been read right


# Commands


def test_the_command_prints_known_against_measured_and_writes_the_run(tmp_path, capsys):
    out = tmp_path / "run.safetensors"
    assert main(["selftest", "-o", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    rows = [" ".join(line.split()) for line in told]
    assert "last queries gamma 0 -1 -1.0000000" in rows and "all queries normalised_alr 2 +2 +2.0000000" in rows
    assert told[-1].startswith("The self-test passed")
    assert is_synthetic(load_run(out))


def test_the_command_fails_where_the_self_test_fails(monkeypatch, capsys):
    real = synthetic_run()
    monkeypatch.setattr(synthetic_module, "synthetic_run", lambda: replace(real, key_norm=real.key_norm[:, :, ::-1]))
    assert main(["selftest"]) == 1
    assert "The self-test FAILED: at most 1.9" in capsys.readouterr().out


def number(word):
    return np.nan if word == "undefined" else float(word)


def test_heads_are_told_by_the_probe_that_is_asked_for(tmp_path, capsys, run):
    path = save_run(run, tmp_path / "run.safetensors")
    for probe in PROBES:
        assert main(["heads", str(path), "--probe", probe.replace(" ", "-")]) == 0
        told = capsys.readouterr().out.splitlines()
        assert f"{probe}: {PROBES[probe]}" in told[0] and len(told) == 3 + LAYERS * HEADS + 1
        rows = [line.split() for line in told[3:-1]]
        gamma = metrics(run, probe=probe).of("gamma")
        assert [number(row[3]) for row in rows] == pytest.approx(gamma.ravel(), abs=0.0051, nan_ok=True)
        of_kv_heads = np.repeat(metrics(by_kv_head(run), probe=probe).of("alr_per_token"), HEADS // KV_HEADS, axis=1)
        assert [number(row[6]) for row in rows] == pytest.approx(of_kv_heads.ravel(), abs=0.00051, nan_ok=True)
    assert main(["heads", str(path), "--probe", "last"]) == 2
    assert "must be one of next-token, last-queries, all-queries, got 'last'" in capsys.readouterr().err
    save_run(replace(run, recent_attention=run.recent_attention[:0]), path)
    assert main(["heads", str(path), "--probe", "last-queries"]) == 2
    assert "holds no last queries" in capsys.readouterr().err


# In the app


def test_the_strip_of_queries_stands_on_a_fixed_scale_and_leaves_out_what_is_undefined():
    gamma = np.array([0.2, np.nan, -0.4, 0.5])
    figure = figures.gamma_by_query(
        gamma, ["a", "<b>", "$c$", "d"], first_position=7, next_token=-0.9, next_label="<i>"
    )
    dots, diamond, mean = figure.data
    assert tuple(figure.layout.yaxis.range) == (-1.05, 1.05) and figure.layout.yaxis.zeroline
    assert list(dots.x) == [7, 8, 9, 10] and dots.y[2] == np.float32(-0.4) and dots.marker.color == PRIMARY
    assert list(diamond.x) == [11] and diamond.y[0] == np.float32(-0.9) and diamond.marker.color != PRIMARY
    assert mean.y[0] == pytest.approx(0.1) and mean.name == "their mean, +0.10"
    assert dots.text[1:3] == ("&lt;b&gt;", "&#36;c&#36;") and diamond.text == ("&lt;i&gt;",)
    undefined = figures.gamma_by_query(
        np.full(2, np.nan), ["a", "b"], first_position=0, next_token=np.nan, next_label=""
    )
    assert len(undefined.data) == 2  # no mean of nothing
