"""Each layer compressed alone: its cost against single measurements, the agreement against a plain loop."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis import RecordError, TextError, capture
from analysis.demo import presets
from analysis.evaluation.run import continuation_nll
from analysis.metrics import alr
from analysis.plans import ablation
from analysis.plans.ablation import CausalCheck, agreement, causal_check, head_costs, suggest_by_cost
from analysis.plans.skip import layer_loss
from analysis.statistics import MIN_TEXTS, RESAMPLES
from analysis.texts.excerpts import excerpts
from analysis.texts.tokens import tokenize
from l2kv import CompressionSpec

KEATS = presets.bundled_texts()["The Tomb of Keats (Oscar Wilde, 1877)"]
SPEC = CompressionSpec(keep_ratio=0.3)
LENGTHS = {"prompt_tokens": 24, "new_tokens": 4}


@pytest.fixture(scope="module")
def texts(loaded) -> list[str]:
    return [excerpt.text for excerpt in excerpts(loaded.tokenizer, {"Keats": KEATS}, n_tokens=32, at_most=2)]


def test_the_cost_of_a_layer_is_that_of_compressing_it_and_no_other(loaded, texts):
    calls = []
    check = causal_check(loaded, texts, SPEC, **LENGTHS, on_done=lambda *call: calls.append(call))
    assert list(dict.fromkeys(calls)) == [(i, 2 * (2 + 6)) for i in range(17)]
    assert calls.count((0, 16)) > 6 and calls.count((2, 16)) == 1 + 4  # in the middle of a capture; at every token
    assert check.layers == tuple(range(6)) and check.nll_change.shape == check.loss.shape == (6, 2)
    for i, text in enumerate(texts):
        full = continuation_nll(loaded, text, None, **LENGTHS)
        run = capture(loaded, text[: tokenize(loaded.tokenizer, text).spans[23, 1]])
        assert run.n_tokens == 24
        np.testing.assert_allclose(check.loss[:, i], layer_loss(run).by_layer)
        np.testing.assert_allclose(check.paper[:, i], alr(run).mean(axis=1))
        for layer in range(6):
            # The same cache said in another way: all layers are kept whole by their ratio but one.
            whole = {other: 1.0 for other in range(6) if other != layer}
            alone = continuation_nll(loaded, text, replace(SPEC, layer_ratios=whole), **LENGTHS)
            assert check.nll_change[layer, i] == pytest.approx(alone - full, abs=1e-5)
    assert abs(check.nll_change).max() > 1e-3
    by_paper = stats.spearmanr(check.nll_change.mean(axis=1), check.paper.mean(axis=1)).statistic
    assert check.paper_agreement.value == pytest.approx(by_paper)
    assert "over 6 layers and 2 texts" in str(check) and "no interval" in str(check)
    assert f"the paper's ALR and that cost: {check.paper_agreement}." in str(check)


def test_the_cost_of_a_head_is_that_of_compressing_it_and_no_other(loaded, texts):
    spec = CompressionSpec(keep_ratio=0.9, head_ratios={(3, 1): 0.2, (5, 0): 0.4})
    calls = []
    costs = head_costs(loaded, texts, spec, **LENGTHS, on_done=lambda *call: calls.append(call))
    heads = loaded.config.num_key_value_heads
    assert costs.shape == (2, 6, heads) and calls[-1] == (2 * (1 + 6 * heads),) * 2
    for layer, head, ratio in ((3, 1, 0.2), (5, 0, 0.4), (0, 1, 0.9)):
        rows = [[1.0] * heads for _ in range(6)]
        rows[layer][head] = ratio
        for i, text in enumerate(texts):
            full, alone = (
                continuation_nll(loaded, text, s, **LENGTHS) for s in (None, replace(spec, head_ratios=rows))
            )
            assert costs[i, layer, head] == pytest.approx(alone - full, abs=1e-5)
    assert abs(costs[:, 3, 1]).max() > 1e-4
    with pytest.raises(TextError):
        head_costs(loaded, [], spec, **LENGTHS)


def test_a_check_is_read_back_as_it_was_written(loaded, texts):
    check = causal_check(loaded, texts[:1], replace(SPEC, skip_layers=(0, 4, 5)), **LENGTHS)
    read = CausalCheck.from_json(check.to_json())
    assert read.to_json() == check.to_json() and str(read) == str(check)
    undefined = replace(check, loss=np.where(np.arange(3)[:, None] == 1, np.nan, check.loss))
    assert np.isnan(CausalCheck.from_json(undefined.to_json()).loss[:, 0]).tolist() == [False, True, False]


def test_a_check_from_before_the_papers_alr_was_kept_says_nothing_of_it():
    content = json.loads(made_check().to_json())
    del content["paper"]
    old = CausalCheck.from_json(json.dumps(content))
    assert old.paper is None and old.paper_agreement is None and "paper" not in str(old)
    assert CausalCheck.from_json(old.to_json()).to_json() == old.to_json()


def made_check() -> CausalCheck:
    numbers = np.arange(3.0)[:, None]
    return CausalCheck("made up", SPEC, (0, 1, 2), numbers, numbers, agreement(numbers, numbers), numbers)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"layers": [0, -1, 2]}, "layers numbers"),
        ({"loss": [[1.0], [2.0]]}, "a row for each of 3 layers"),
        ({"paper": [[1.0], [2.0]]}, "a row for each of 3 layers"),
        ({"nll_change": [[10**400], [1], [2]]}, "too large"),
        ({"loss": [[], [], []], "nll_change": [[], [], []], "paper": None}, "a row for each"),
        ({"layers": [], "loss": [], "nll_change": [], "paper": None}, "a row for each"),
        ({"loss": [["x"], [1], [2]]}, "could not convert"),
        ({"nll_change": [[1.0], [2.0, 3.0], [4.0]]}, "not a causal check"),
        ({"spec": {"policy": "worst"}}, "policy must be one of"),
        ({"l2kv_causal": 2}, "version 1"),
        ({"documents": ["x", "y"]}, "documents must be 1 names"),
        ({"documents": [3]}, "documents must be 1 names"),
    ],
)
def test_a_strangers_check_is_refused_with_the_reason(change, reason):
    with pytest.raises(RecordError, match=reason):
        CausalCheck.from_json(json.dumps(json.loads(made_check().to_json()) | change))


def test_layers_that_the_spec_skips_are_not_compared(loaded, texts):
    check = causal_check(loaded, texts[:1], replace(SPEC, policy="high_norm", skip_layers=(0, 4, 5)), **LENGTHS)
    assert check.layers == (1, 2, 3) and check.loss.shape == (3, 1)
    low = causal_check(loaded, texts[:1], replace(SPEC, skip_layers=(0, 4, 5)), **LENGTHS)
    np.testing.assert_allclose(check.loss, 2 - low.loss)  # the mirror of one measurement


def test_it_is_cancelled_by_raising(loaded, texts):
    class Cancelled(Exception):
        pass

    def stop(done, total):
        if done == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        causal_check(loaded, texts, SPEC, **LENGTHS, on_done=stop)


def test_what_cannot_be_measured_is_refused_with_the_reason(loaded, texts):
    with pytest.raises(TextError, match="no texts"):
        causal_check(loaded, [], SPEC, **LENGTHS)
    with pytest.raises(TextError, match="prompt of 24"):
        causal_check(loaded, ["Too short by far."], SPEC, **LENGTHS)
    with pytest.raises(ValueError, match="low_norm, high_norm"):
        causal_check(loaded, texts, replace(SPEC, policy="keydiff"), **LENGTHS)
    with pytest.raises(ablation.ModelError, match="no layer"):
        causal_check(loaded, texts, replace(SPEC, skip_layers=tuple(range(6))), **LENGTHS)


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


def test_the_agreement_resamples_documents_and_a_check_keeps_them(loaded, texts):
    """Where all excerpts of a document are one text, as the documents alone would have it."""
    rng = np.random.default_rng(1)
    loss = rng.normal(size=(5, 7))
    change = 0.5 * loss + rng.normal(size=(5, 7))
    alone, names = agreement(change, loss), [f"d{i}" for i in range(7) for _ in range(3)]
    each = agreement(change.repeat(3, axis=1), loss.repeat(3, axis=1), documents=names)
    assert (each.value, each.low, each.high) == pytest.approx((alone.value, alone.low, alone.high), abs=0.06)
    check = causal_check(loaded, texts, replace(SPEC, skip_layers=(0, 4, 5)), documents=["x", "x"], **LENGTHS)
    assert check.documents == CausalCheck.from_json(check.to_json()).documents == ("x", "x")
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


# Suggestions by cost


def check_of(cost, spec=SPEC, layers=None):
    """A check of layers with these costs, [K, N] nats a token."""
    cost = np.asarray(cost, float)
    layers = tuple(range(len(cost))) if layers is None else layers
    return CausalCheck("made up", spec, layers, cost, np.ones_like(cost), agreement(cost, np.ones_like(cost)))


def test_the_costliest_layers_are_skipped_by_what_was_measured():
    cost = np.array([0.004, 0.122, 0.033, -0.01])[:, None] + np.array([-0.001, 0, 0.001])
    check = check_of(cost, layers=(0, 20, 15, 3))
    assert suggest_by_cost(check).layers == (15, 20)
    assert suggest_by_cost(check, threshold=0.05).layers == (20,)
    assert suggest_by_cost(check, threshold=1.0).layers == ()
    for count, layers in enumerate([(), (20,), (15, 20), (0, 15, 20)]):
        assert suggest_by_cost(check, rule="count", count=count).layers == layers
    assert suggest_by_cost(check, rule="gap").layers == (20,)
    words = suggest_by_cost(check).rule
    assert "layer 20 +0.122, layer 15 +0.033" in words and "3 texts. So few only give a hint." in words
    assert "30% kept by low norm" in words


def test_a_layer_whose_cost_may_as_well_be_none_is_not_suggested_by_threshold():
    check = check_of([[0.5, -0.3, 0.4, -0.2, 0.5, -0.1], [0.125] * 6])
    assert check.nll_change.mean(axis=1).min() > 0.1 - 1e-9
    assert suggest_by_cost(check, threshold=0.1).layers == (1,)
    assert suggest_by_cost(check_of([[0.2]])).layers == (0,)  # of one text there is no interval
    assert "hint" not in suggest_by_cost(check).rule


def test_bad_requests_for_a_suggestion_are_refused():
    with pytest.raises(ValueError, match="rule must be one of"):
        suggest_by_cost(check_of([[0.1]]), rule="median")
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="count must be from 0 to 1"):
            suggest_by_cost(check_of([[0.1]]), rule="count", count=wrong)
