"""The tokens of a head by position: which are drawn, where, and how those are told apart that are kept."""

import json
import re

import numpy as np
import pytest

from app.figures import style
from app.figures.positions import norm_and_attention


def option(norm, attention, labels=None, **options):
    norm, attention = np.asarray(norm, float), np.asarray(attention, float)
    made = norm_and_attention(norm, attention, labels or [f"t{i}" for i in range(len(norm))], **options)
    return json.loads(json.dumps(made, allow_nan=False))


def rows(made):
    """position -> [label, key norm, attention in %, log10 of what is drawn of it]."""
    return {row[0]: row[1:] for data in made["dataset"] for row in data["source"]}


def test_a_token_is_drawn_by_its_norm_above_and_its_attention_below():
    made = option([3, 1.23456], [0.25, 0.01], ["a", "<b>"])
    assert rows(made) == {0: ["a", 3, 25, pytest.approx(-0.6021)], 1: ["<b>", 1.235, 1, -2]}
    assert [(one["yAxisIndex"], one["encode"]["y"]) for one in made["series"]] == [(0, 2), (1, 4)]
    assert not made["legend"]["show"]


@pytest.mark.parametrize("label", ["{b}", "{@[2]}", "$&", "$$"])
def test_a_token_that_reads_like_a_place_of_the_hover_text_is_itself_there(label):
    drawn = rows(option([1], [1], [label]))[0][0]
    assert drawn.replace("\N{WORD JOINER}", "") == label  # which is seen
    assert not re.search(r"\{[@\w]|\$[$&`'\d]", drawn)


def test_kept_tokens_are_solid_and_evicted_hollow():
    kept = np.arange(10) % 3 == 0
    made = option(np.arange(10), np.full(10, 0.1), kept=kept)
    for series in made["series"]:
        positions = [row[0] for row in made["dataset"][series["datasetIndex"]]["source"]]
        assert positions == np.flatnonzero(kept if series["name"] == "kept" else ~kept).tolist()
        assert (series["itemStyle"]["color"] == "transparent") == (series["name"] == "evicted")
    assert made["legend"]["data"] == ["kept", "evicted"]
    assert [series["name"] for series in option([1.0], [1.0], kept=np.array([True]))["series"]] == ["kept"] * 2


def test_zeros_are_lifted_to_a_labelled_floor_and_hover_tells_the_truth():
    made = option(np.arange(4), [0.9, 0.1, 0.0, 1e-12])
    _, _, told, drawn = rows(made)[2]
    _, values, names = made["yAxis"]
    assert told == 0 and drawn == -7 == values["min"]  # six decades below 0.9, down to a power of ten
    assert names["data"][0] == "≤ 0.00001 %" and names["data"][-1] == "100 %"
    assert values["max"] - values["min"] == len(names["data"]) - 1  # the names stand at the powers of ten


def test_positions_stay_true_where_the_sink_is_left_out():
    made = option([1, 2], [0.5, 0.5], first_position=1)
    assert list(rows(made)) == [1, 2]
    assert made["xAxis"][0]["min"] < 1 < 2 < made["xAxis"][0]["max"]


def test_a_long_text_is_thinned_without_losing_what_stands_out():
    generator = np.random.default_rng(0)
    norm, attention = generator.normal(14, 2, 32768), generator.random(32768) / 32768
    norm[20001], attention[9999] = 99.0, 0.7
    made = option(norm, attention, kept=norm < 14)
    drawn = set(rows(made))
    assert {0, 9999, 20001, 32767} <= drawn and len(drawn) <= style.MOST_POINTS
    assert f"{len(drawn):,} of 32,768" in made["xAxis"][1]["name"]


@pytest.mark.parametrize(
    ("norm", "attention"), [([], []), ([1], [1]), ([1, 2], [0, 0]), ([np.nan] * 3, [np.nan] * 3), ([1, 1], [1, 1e-9])]
)
def test_an_extreme_input_gives_a_chart_that_can_be_sent(norm, attention):
    made = option(norm, attention)
    assert made["yAxis"][1]["min"] < made["yAxis"][1]["max"]
    assert len(rows(made)) == len(norm)
