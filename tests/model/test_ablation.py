"""Each layer compressed alone: its cost against single measurements, the agreement against a plain loop."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis import RecordError, SettingsError, TextError, capture
from analysis.demo import presets
from analysis.evaluation.lm import LmSettings
from analysis.lab import studies_by_policy
from analysis.metrics import alr
from analysis.plans import ablation
from analysis.plans.ablation import Ablation, ablate_layers, agreement, head_costs, suggest_by_ablation
from analysis.records import from_json, to_json
from analysis.statistics import MIN_TEXTS, RESAMPLES
from analysis.studies import layer_alr, study_of
from analysis.texts.excerpts import Excerpt, excerpts
from analysis.texts.tokens import tokenize
from l2kv import CompressionSpec
from tests.support.evaluation import ablation_of, continuation_nll

KEATS = presets.bundled_texts()["The Tomb of Keats (Oscar Wilde, 1877)"]
SPEC = CompressionSpec(keep_ratio=0.3)
LENGTHS = {"prompt_tokens": 24, "new_tokens": 4}
SETTINGS = LmSettings(**LENGTHS)


@pytest.fixture(scope="module")
def texts(loaded) -> list[Excerpt]:
    found = excerpts(loaded.tokenizer, {"Keats": KEATS}, n_tokens=32, at_most=2)
    return [Excerpt(one.name, one.text) for one in found]  # as if of two documents


def test_the_cost_of_a_layer_is_that_of_compressing_it_and_no_other(loaded, texts):
    calls = []
    check = ablate_layers(loaded, texts, SPEC, settings=SETTINGS, progress=lambda *call: calls.append(call[:2]))
    assert calls == sorted(calls) and {(0, 16), (1, 16), (2, 16), (16, 16)} <= set(calls)
    assert calls.count((0, 16)) > 6 and calls.count((2, 16)) > 4 * 6  # amid a capture; at every layer of every token
    assert check.layers == tuple(range(6)) and check.nll_change.shape == check.normalised_alr.shape == (6, 2)
    for i, (_, text, _) in enumerate(texts):
        full = continuation_nll(loaded, text, None, **LENGTHS)
        run = capture(loaded, text[: tokenize(loaded.tokenizer, text).spans[23, 1]])
        assert run.n_tokens == 24
        np.testing.assert_allclose(check.normalised_alr[:, i], layer_alr(study_of(run))[0])
        np.testing.assert_allclose(check.alr[:, i], alr(run).mean(axis=1))
        for layer in range(6):
            # The same cache by other fields: a ratio of 1 for every layer but one.
            whole = {other: 1.0 for other in range(6) if other != layer}
            alone = continuation_nll(loaded, text, replace(SPEC, layer_ratios=whole), **LENGTHS)
            assert check.nll_change[layer, i] == pytest.approx(alone - full, abs=1e-5)
    assert abs(check.nll_change).max() > 1e-3
    by_paper = stats.spearmanr(check.nll_change.mean(axis=1), check.alr.mean(axis=1)).statistic
    assert check.alr_agreement.value == pytest.approx(by_paper)
    assert "over 6 layers and 2 texts" in str(check) and "no interval" in str(check)
    assert f"the paper's ALR and that change: {check.alr_agreement}." in str(check)


def test_the_cost_of_a_head_is_that_of_compressing_it_and_no_other(loaded, texts):
    spec = CompressionSpec(keep_ratio=0.9, head_ratios={(3, 1): 0.2, (5, 0): 0.4})
    calls = []
    costs = head_costs(loaded, texts, spec, settings=SETTINGS, progress=lambda *call: calls.append(call[:2]))
    heads = loaded.config.num_key_value_heads
    assert costs.shape == (2, 6, heads) and calls[-1] == (2 * (1 + 6 * heads),) * 2
    for layer, head, ratio in ((3, 1, 0.2), (5, 0, 0.4), (0, 1, 0.9)):
        rows = [[1.0] * heads for _ in range(6)]
        rows[layer][head] = ratio
        for i, (_, text, _) in enumerate(texts):
            full, alone = (
                continuation_nll(loaded, text, s, **LENGTHS) for s in (None, replace(spec, head_ratios=rows))
            )
            assert costs[i, layer, head] == pytest.approx(alone - full, abs=1e-5)
    assert abs(costs[:, 3, 1]).max() > 1e-4
    with pytest.raises(TextError):
        head_costs(loaded, [], spec, settings=SETTINGS)


def test_an_ablation_is_read_back_as_it_was_written(loaded, texts):
    check = ablate_layers(loaded, texts[:1], replace(SPEC, skip_layers=(0, 4, 5)), settings=SETTINGS)
    read = from_json(Ablation, to_json(check))
    assert read == check and str(read) == str(check)
    undefined = ablation_of([[0.1]] * 3, [[1.0], [np.nan], [1.0]])
    again = from_json(Ablation, to_json(undefined))
    assert np.isnan(again.normalised_alr[:, 0]).tolist() == [False, True, False]


def test_a_causal_check_is_refused_with_the_command_that_makes_an_ablation():
    with pytest.raises(RecordError, match=r"of version 2: it is of version 1\. Make it again: l2kv ablation"):
        from_json(Ablation, '{"l2kv_causal": 1, "model": "m"}')


def test_an_ablation_without_the_papers_alr_says_nothing_of_it():
    check = ablation_of([[0.1, 0.3], [0.2, 0.4], [0.5, 0.7]], alr=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert check.alr_agreement.value == pytest.approx(1) and "paper" in str(check)
    content = json.loads(to_json(check))
    del content["alr_rows"]
    before = from_json(Ablation, json.dumps(content))
    assert before.alr is None and before.alr_agreement is None and "paper" not in str(before)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"layers": [0, 1, 7]}, "results lack layer 7"),
        ({"layers": [0, "one", 2]}, "Expected `int`"),
        ({"normalised_alr_rows": [[1.0]]}, "a row for each of 3 layers"),
        ({"normalised_alr_rows": [[1.0], [1.0]]}, "a row for each of 3 layers"),
        ({"normalised_alr_rows": [[], [], []]}, "a row for each"),
        ({"normalised_alr_rows": [["x"], [1], [2]]}, "Expected `float"),
        ({"normalised_alr_rows": [[10**400], [1], [2]]}, "out of range"),
        ({"alr_rows": [[1.0], [2.0]]}, "a row for each of 3 layers"),
        ({"layers": [], "normalised_alr_rows": []}, "a row for each"),
        ({"spec": {"policy": "worst"}}, "policy must be one of"),
        ({"l2kv_ablation": 3}, "it is of version 3"),
        ({"results": {}}, "missing required field"),
    ],
)
def test_a_strangers_ablation_is_refused_with_the_reason(change, reason):
    content = json.loads(to_json(ablation_of([[0.1], [0.2], [0.3]]))) | change
    with pytest.raises(RecordError, match=reason):
        from_json(Ablation, json.dumps(content))


def test_layers_that_the_spec_skips_are_not_compared(loaded, texts):
    high, low = (
        ablate_layers(loaded, texts[:1], replace(SPEC, policy=policy, skip_layers=(0, 4, 5)), settings=SETTINGS)
        for policy in ("high_norm", "low_norm")
    )
    assert high.layers == (1, 2, 3) and high.normalised_alr.shape == (3, 1)
    np.testing.assert_allclose(high.normalised_alr, 2 - low.normalised_alr)  # the mirror of one measurement


def test_the_alr_of_any_policy_is_that_of_its_order(loaded, texts):
    spec = replace(SPEC, policy="keydiff", skip_layers=(0, 4, 5))
    of_keydiff = ablate_layers(loaded, texts, spec, settings=SETTINGS)
    for i, (_, text, _) in enumerate(texts):
        prompt = text[: tokenize(loaded.tokenizer, text).spans[23, 1]]
        order = studies_by_policy(loaded, [("it", prompt)], ["keydiff"])["keydiff"]
        np.testing.assert_allclose(of_keydiff.alr[:, i], order.of("alr")[0].mean(axis=1)[1:4])
        alone = replace(spec, skip_layers=(0, 2, 3, 4, 5))
        full, compressed = (continuation_nll(loaded, text, one, **LENGTHS) for one in (None, alone))
        assert of_keydiff.nll_change[0, i] == pytest.approx(compressed - full, abs=1e-5)


def test_it_is_cancelled_by_raising(loaded, texts):
    class Cancelled(Exception):
        pass

    def stop(done, total, what):
        if done == 2:  # amid the first batch
            raise Cancelled

    with pytest.raises(Cancelled):
        ablate_layers(loaded, texts, SPEC, settings=SETTINGS, progress=stop)


def test_what_cannot_be_measured_is_refused_with_the_reason(loaded, texts):
    with pytest.raises(TextError, match="no texts"):
        ablate_layers(loaded, [], SPEC, settings=SETTINGS)
    with pytest.raises(TextError, match="prompt of 24"):
        ablate_layers(loaded, [("short", "Too short by far.")], SPEC, settings=SETTINGS)
    with pytest.raises(SettingsError, match="The order of window depends on more than keys and values"):
        ablate_layers(loaded, texts, replace(SPEC, policy="window"), settings=SETTINGS)
    with pytest.raises(ablation.ModelError, match="no layer"):
        ablate_layers(loaded, texts, replace(SPEC, skip_layers=tuple(range(6))), settings=SETTINGS)


def test_the_agreement_is_that_of_a_plain_loop_over_resamples():
    rng = np.random.default_rng(0)
    loss = rng.normal(size=(5, 8))
    change = 0.7 * loss + rng.normal(size=(5, 8))
    got = agreement(change, loss, seed=4)
    assert got.value == pytest.approx(stats.spearmanr(change.mean(axis=1), loss.mean(axis=1)).statistic)
    rhos = []
    for texts in np.random.default_rng(4).integers(8, size=(RESAMPLES, 8)):
        rhos.append(stats.spearmanr(change[:, texts].mean(axis=1), loss[:, texts].mean(axis=1)).statistic)
    assert (got.low, got.high) == pytest.approx(np.quantile(rhos, [0.025, 0.975]), abs=1e-9)


def test_the_agreement_resamples_documents_and_an_ablation_keeps_them(loaded, texts):
    """Where all excerpts of a document are one text, as the documents alone would have it."""
    rng = np.random.default_rng(1)
    loss = rng.normal(size=(5, 7))
    change = 0.5 * loss + rng.normal(size=(5, 7))
    alone, names = agreement(change, loss), [f"d{i}" for i in range(7) for _ in range(3)]
    each = agreement(change.repeat(3, axis=1), loss.repeat(3, axis=1), documents=names)
    assert (each.value, each.low, each.high) == pytest.approx((alone.value, alone.low, alone.high), abs=0.06)
    both = [Excerpt(one.name, one.text, "x") for one in texts]
    check = ablate_layers(loaded, both, replace(SPEC, skip_layers=(0, 4, 5)), settings=SETTINGS)
    assert check.documents == from_json(Ablation, to_json(check)).documents == ("x", "x")
    assert "excerpts of one document" in str(check)


def test_layers_that_cost_what_alr_says_agree_fully_and_the_reverse_not_at_all():
    loss = np.arange(5.0)[:, None] + np.linspace(0, 0.1, MIN_TEXTS)
    same, reverse = agreement(loss, loss), agreement(-loss, loss)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    assert (reverse.value, reverse.low, reverse.high) == pytest.approx((-1, -1, -1))


def test_too_little_to_compare_is_undefined():
    loss = np.random.default_rng(0).normal(size=(5, 8))
    assert math.isnan(agreement(loss[:2], loss[:2]).value)
    assert math.isnan(agreement(np.zeros((5, 8)), loss).value)
    few = agreement(loss[:, : MIN_TEXTS - 1], loss[:, : MIN_TEXTS - 1])
    assert few.value == pytest.approx(1) and math.isnan(few.low) and math.isnan(few.high)
    holed = loss.copy()
    holed[2, 3] = np.nan
    rest = np.delete(loss, 2, axis=0)
    assert agreement(loss, holed) == agreement(rest, rest)


# Suggestions by ablation


def test_the_costliest_layers_are_skipped_by_what_was_measured():
    cost = np.array([0.004, 0.122, 0.033, -0.01])[:, None] + np.array([-0.001, 0, 0.001])
    check = ablation_of(cost, layers=(0, 20, 15, 3))
    assert suggest_by_ablation(check).layers == (15, 20)
    assert suggest_by_ablation(check, threshold=0.05).layers == (20,)
    assert suggest_by_ablation(check, threshold=1.0).layers == ()
    for count, layers in enumerate([(), (20,), (15, 20), (0, 15, 20)]):
        assert suggest_by_ablation(check, rule="count", count=count).layers == layers
    assert suggest_by_ablation(check, rule="gap").layers == (20,)
    words = suggest_by_ablation(check).rule
    assert "layer 20 +0.122, layer 15 +0.033" in words and "3 excerpts. So few only give a hint." in words
    assert "30 % kept by low norm" in words


def test_a_layer_whose_cost_may_as_well_be_none_is_not_suggested_by_threshold():
    check = ablation_of([[0.5, -0.3, 0.4, -0.2, 0.5, -0.1], [0.125] * 6])
    assert check.nll_change.mean(axis=1).min() > 0.1 - 1e-9
    assert suggest_by_ablation(check, threshold=0.1).layers == (1,)
    assert suggest_by_ablation(ablation_of([[0.2]])).layers == (0,)  # of one text there is no interval
    assert "hint" not in suggest_by_ablation(check).rule


def test_bad_requests_for_a_suggestion_are_refused():
    with pytest.raises(ValueError, match="rule must be one of"):
        suggest_by_ablation(ablation_of([[0.1]]), rule="median")
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="count must be from 0 to 1"):
            suggest_by_ablation(ablation_of([[0.1]]), rule="count", count=wrong)
