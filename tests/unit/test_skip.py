"""Suggested skip lists, by each rule, worked out by hand; lists as people write them."""

import numpy as np
import pytest

from analysis import Plan, RecordError, SettingsError, studies
from analysis.plans.skip import RULES, skip_list, suggest_skip_layers
from analysis.records import to_json
from analysis.studies import layer_alr
from analysis.words import counted
from l2kv import CompressionSpec
from tests.support.runs import run_of, study_of

RANKS = np.arange(1.0, 41.0)


def run_of_losses(*shares):
    """A run in whose layers so large a share of the attention is in the worst order for low norm, the rest in the best.

    Normalised ALR rises with the share, from 0 to 2, as long as the ideal order of the mixture is that of one of them.
    """
    best, worst = RANKS[::-1] / RANKS.sum(), RANKS**3 / (RANKS**3).sum()
    return run_of([[RANKS]] * len(shares), [[best * (1 - share) + worst * share] for share in shares])


def made_study(losses):
    """A study of [N, L] normalised ALR, of one head."""
    alr = np.asarray(losses, float)[..., None]
    return study_of(alr - 1, alr=alr, alr_chance=np.where(np.isnan(alr), np.nan, 1.0))


def test_by_count_the_worst_are_skipped():
    run = run_of_losses(0.2, 0.9, 0.4, 0.8)
    assert layer_alr(studies.study_of(run))[0].argsort().tolist() == [0, 2, 3, 1]
    for count, layers in enumerate([(), (1,), (1, 3), (1, 2, 3), (0, 1, 2, 3)]):
        suggestion = suggest_skip_layers(studies.study_of(run), rule="count", count=count)
        assert suggestion.layers == layers and f"Skip {counted(count, 'layer')}, those" in suggestion.rule
    assert suggest_skip_layers(studies.study_of(run), "high_norm", rule="count", count=2).layers == (
        0,
        2,
    )  # the mirror's worst
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="count must be from 0 to 4"):
            suggest_skip_layers(studies.study_of(run), rule="count", count=wrong)


def test_by_gap_the_layers_above_the_widest_gap_of_the_worse_half_are_skipped():
    #                     sorted: 1.9 1.8 | 1.0 0.9 0.8 0.2; the gap at 0.8 is wider than those of 0.1, but not worst
    suggestion = suggest_skip_layers(made_study([[0.9, 1.9, 0.2, 1.8, 1.0, 0.8]]), rule="gap")
    assert suggestion.layers == (1, 3)
    assert "0.800 of normalised ALR wide, the median gap 0.100" in suggestion.rule


@pytest.mark.parametrize(
    "losses,why",
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5], "the widest is 0.100"),  # even steps
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.1], "the widest is 0.100"),  # the one that stands out parts the best layer
        ([1.0, 1.0, 1.0, 1.0], "no gap stands out"),
        ([1.5, 0.1], "three layers"),
    ],
)
def test_where_no_gap_stands_out_none_is_suggested(losses, why):
    suggestion = suggest_skip_layers(made_study([losses]), rule="gap")
    assert suggestion.layers == () and suggestion.rule.startswith("Skip none") and why in suggestion.rule


def test_a_list_hangs_on_the_mean_of_all_texts_not_on_one():
    losses = [[1.4, 0.5, 0.9], [0.9, 0.3, 1.0], [1.0, 0.1, np.nan]]  # means 1.1, 0.3, and 0.95 where it is defined
    suggestion = suggest_skip_layers(made_study(losses))
    assert suggestion.layers == (0,) and "3 texts of 9 tokens" in suggestion.rule
    assert suggest_skip_layers(made_study(losses), "high_norm").layers == (1, 2)  # 2 less those: 0.9, 1.7, 1.05
    runs = [run_of_losses(0.1, 0.9, 0.5), run_of_losses(0.1, 0.2, 0.9), run_of_losses(0.1, 0.2, 0.9)]
    mean = np.mean([layer_alr(studies.study_of(run))[0] for run in runs], axis=0)
    suggestion = suggest_skip_layers(studies.study_of(*runs), rule="count", count=1)
    assert suggestion.layers == (int(mean.argmax()),) == (2,) and "3 texts of 40 tokens" in suggestion.rule


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_without_an_order_is_skipped_by_every_rule(rule):
    run = run_of([[RANKS]] * 2 + [[np.ones(40)]] + [[RANKS]], [[1 / RANKS]] * 4)
    suggestion = suggest_skip_layers(studies.study_of(run), rule=rule, count=1)
    assert suggestion.layers == (2,) and "Of those skipped, 1 because norms" in suggestion.rule


def test_the_words_count_the_layers_that_are_skipped_not_those_asked_for():
    run = run_of([[RANKS]] + [[np.ones(40)]] * 3, [[1 / RANKS]] * 4)
    suggestion = suggest_skip_layers(studies.study_of(run), rule="count", count=1)
    assert suggestion.layers == (1, 2, 3)
    assert "Skip 3 layers, those" in suggestion.rule and "Of those skipped, 3 because" in suggestion.rule


def test_where_low_norm_is_undefined_so_is_random():
    losses = [[0.5, np.nan, 1.5], [0.7, np.nan, 1.2]]
    for policy in ("low_norm", "high_norm", "random"):
        assert suggest_skip_layers(made_study(losses), policy, rule="count", count=1).layers == (1,)
    assert suggest_skip_layers(made_study(losses), "random", rule="threshold", threshold=1.1).layers == (1,)


def test_bad_requests_are_refused():
    one, other = run_of_losses(0.2, 0.9), run_of_losses(0.2, 0.9, 0.1)
    with pytest.raises(ValueError, match="rule must be one of threshold, count, gap"):
        suggest_skip_layers(studies.study_of(one), rule="median")
    for wrong in ([], [one, other]):
        with pytest.raises(ValueError, match="of one model"):
            studies.study_of(*wrong)
    with pytest.raises(SettingsError, match="low_norm, high_norm, random: ALR speaks of these; got 'streaming'"):
        suggest_skip_layers(studies.study_of(one), "streaming")
    for wrong in (np.nan, np.inf, -1.0):
        with pytest.raises(SettingsError, match="threshold must be a number from 0 on"):
            suggest_skip_layers(studies.study_of(one), threshold=wrong)


@pytest.mark.parametrize(
    "text,layers",
    [
        ("0, 1, 12", (0, 1, 12)),
        ("[1,0]", (0, 1)),
        ("3 3\n2", (2, 3)),
        ("", ()),
        ("[]", ()),
        (to_json(Plan("m", CompressionSpec(skip_layers=(4, 2)))), (2, 4)),
    ],
)
def test_a_list_is_read_as_people_write_it(text, layers):
    assert skip_list(text) == layers


@pytest.mark.parametrize("text", ["zero", "-1", "1.5", "0;1", "[[0]]", "1" * 9, "²", '{"skip": [0]}'])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(RecordError, match=r"no list of layers|not a plan"):
        skip_list(text)


def test_a_layer_that_the_model_does_not_have_is_refused():
    assert skip_list("0, 5", n_layers=6) == (0, 5)
    for text in ("0, 6", to_json(Plan("m", CompressionSpec(skip_layers=(6,))))):
        with pytest.raises(RecordError, match="layer 6, but the layers are 0 to 5"):
            skip_list(text, n_layers=6)
