"""Figures over many texts and of plans say what the data say. Structure only: how they look is checked by eye."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from app.figures import (
    Line,
    front,
    head_over_texts,
    layer_costs,
    means_by_layer,
    order_agreement,
    ratio_map,
)
from app.figures.style import FULL_GREY, PAGE, PRIMARY, PURPLE, error_bars


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def levels(figure: go.Figure) -> dict[str, float]:
    """Of each named straight line its height."""
    return {shape.name: shape.y0 for shape in figure.layout.shapes if shape.name and shape.y0 == shape.y1}


def a_line(kind: str, change: float = 0.1) -> Line:
    mib = np.array([0.5, 1.0])
    change = np.array([change, change / 2])
    return Line(mib, change, change - 0.01, change + 0.02, np.array([0.3, 0.5]), kind)


def test_error_bars_reach_from_the_low_end_to_the_high_one_and_are_none_where_there_is_no_end():
    bars = error_bars(np.array([1.0, 2.0]), np.array([0.5, np.nan]), np.array([1.75, np.nan]), color="red")
    assert list(bars["array"]) == [0.75, 0] and list(bars["arrayminus"]) == [0.5, 0]


# one head over texts


def test_a_head_has_a_point_a_text_and_none_where_gamma_is_undefined():
    values, without = np.array([-0.5, np.nan, 0.25]), np.array([0.1, 0.2, 0.3])
    figure = head_over_texts(values, without, ["a", "<b>", "$c$"], mean=-0.125, low=-0.4, high=0.2)
    shown = trace(figure, "Γ")
    assert list(shown.x) == [0, 2] and list(shown.y) == [-0.5, 0.25] and list(shown.text) == ["a", "&#36;c&#36;"]
    hollow = trace(figure, "without the first token")
    assert list(hollow.y) == [0.1, 0.2, 0.3] and hollow.text[1] == "&lt;b&gt;" and "open" in hollow.marker.symbol
    assert levels(figure)["mean"] == -0.125
    (band,) = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert (band.y0, band.y1) == (-0.4, 0.2)
    assert figure.layout.yaxis.range == (-1.05, 1.05)


def test_a_head_on_one_text_has_no_band():
    figure = head_over_texts(np.array([0.5]), np.array([0.5]), ["a"], mean=0.5, low=np.nan, high=np.nan)
    assert not [shape for shape in figure.layout.shapes if shape.type == "rect"]


# layers over texts


def test_layers_have_their_means_with_bars_and_chance_is_marked():
    mean = np.array([1.2, np.nan, 0.8])
    figure = means_by_layer(mean, mean - 0.1, mean + 0.2)
    shown = trace(figure, "layer, mean and 95 % interval")
    assert list(shown.x) == [0, 2] and list(shown.y) == [1.2, 0.8]
    np.testing.assert_allclose(shown.error_y.array, 0.2)
    np.testing.assert_allclose(shown.error_y.arrayminus, 0.1)
    assert levels(figure)["chance"] == 1 and figure.layout.xaxis.range == (-0.5, 2.5)


def test_the_agreement_of_halves_is_drawn_against_what_counts_as_stable():
    figure = order_agreement(np.array([1, 2, 3]), np.array([0.5, 0.8, 0.95]), np.array([0.4, 0.7, 0.9]), stable=0.9)
    assert list(trace(figure, "Spearman").y) == [0.5, 0.8, 0.95] and list(trace(figure, "Kendall").y) == [0.4, 0.7, 0.9]
    assert levels(figure) == {"stable from 0.9 on": 0.9}


def test_an_agreement_below_zero_stays_in_the_picture():
    figure = order_agreement(np.array([1]), np.array([-0.8]), np.array([-0.6]), stable=0.9)
    assert figure.layout.yaxis.range[0] <= -0.8


def test_what_a_layer_costs_is_a_numbered_point_with_bars_both_ways():
    ratio, change = np.array([0.8, 1.4]), np.array([0.01, 0.2])
    figure = layer_costs([1, 5], ratio, (ratio - 0.1, ratio + 0.1), change, (change - 0.01, change + 0.03))
    (points,) = [trace for trace in figure.data if trace.mode == "markers+text"]
    assert list(points.x) == [0.8, 1.4] and list(points.y) == [0.01, 0.2] and list(points.text) == ["1", "5"]
    np.testing.assert_allclose(points.error_x.array, 0.1)
    np.testing.assert_allclose(points.error_y.array, 0.03)
    np.testing.assert_allclose(points.error_y.arrayminus, 0.01)


# maps of a plan


def test_the_map_of_ratios_runs_from_0_to_1_with_layer_0_at_the_top():
    ratios = np.array([[1.0, 0.25], [0.5, 0.75], [0.1, 0.0]])
    figure = ratio_map(ratios)
    np.testing.assert_array_equal(figure.data[0].z, ratios)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 1)
    assert figure.layout.yaxis.range == (2.5, -0.5) and figure.layout.xaxis.range == (-0.5, 1.5)


@pytest.mark.parametrize(("shape", "written"), [((6, 4), True), ((80, 8), False)])
def test_cells_have_numbers_only_where_there_is_room(shape, written):
    assert any(trace.mode == "text" for trace in ratio_map(np.ones(shape)).data[1:]) == written
    assert len(ratio_map(np.ones((80, 8))).to_json()) < 50_000


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_are_readable_on_every_ratio(dark):
    """WCAG contrast of text and cell, recomputed here from the colours along the whole scale."""

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def channels(color):
        return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])

    page, full = (np.array(of[dark]) / 255 for of in (PAGE, PURPLE))
    ratios = np.linspace(0, 1, 256).reshape(16, 16)
    for trace in ratio_map(ratios, dark=dark).data[1:]:
        text = luminance(channels(trace.textfont.color))
        for layer, head in zip(trace.y, trace.x, strict=True):
            cell = luminance(page + ratios[layer, head] * (full - page))
            assert (max(text, cell) + 0.05) / (min(text, cell) + 0.05) >= 4.5


# the front


def test_a_front_has_a_line_a_way_with_its_intervals_and_the_full_cache_in_grey():
    figure = front({"uniform": a_line("uniform"), "plan": a_line("plan", 0.05)}, full_mib=2.5)
    plan = trace(figure, "plan")
    assert list(plan.x) == [0.5, 1.0] and list(plan.y) == [0.05, 0.025]
    np.testing.assert_allclose(plan.error_y.array, 0.02)
    np.testing.assert_allclose(plan.error_y.arrayminus, 0.01)
    full = trace(figure, "full cache")
    assert (list(full.x), list(full.y), full.marker.color) == ([2.5], [0], FULL_GREY)


def test_kinds_of_ways_are_told_apart_without_colour_and_ways_of_a_kind_by_marker_too():
    kinds = ["uniform", "uniform", "plan", "plan", "plan", "baseline", "baseline"]
    figure = front({f"way {i}": a_line(kind) for i, kind in enumerate(kinds)}, full_mib=2)
    drawn = [trace(figure, f"way {i}") for i in range(len(kinds))]
    assert [t.line.dash for t in drawn] == ["dash", "dash", "solid", "solid", "solid", "dot", "dot"]
    assert len({(t.line.dash, t.marker.symbol) for t in drawn}) == len(kinds)
    assert [("open" in t.marker.symbol) for t in drawn] == [kind != "plan" for kind in kinds]
    assert drawn[0].line.color == PRIMARY and drawn[5].line.color == FULL_GREY


def test_a_way_may_have_any_name():
    figure = front({"<img src=x> $x$": a_line("plan")}, full_mib=2)
    text = json.dumps(json.loads(figure.to_json()))
    assert "<img" not in text and "$x$" not in text


def test_an_empty_front_is_the_full_cache_alone():
    assert [trace.name for trace in front({}, full_mib=2).data] == ["full cache"]


def test_only_the_ways_named_have_intervals_to_see_and_all_say_theirs():
    lines = {f"way {i}": a_line("plan") for i in range(3)}
    whole, some = front(lines, full_mib=2), front(lines, full_mib=2, intervals=["way 2"])
    assert [t.error_y.array is not None for t in some.data[:3]] == [False, False, True]
    assert repr(trace(some, "way 2")) == repr(trace(whole, "way 2"))
    assert [t.customdata for t in some.data[:3]] == [t.customdata for t in whole.data[:3]]


def test_a_line_that_towers_over_the_plans_leaves_the_view_which_says_so():
    lines = {"plan": a_line("plan"), "uniform": a_line("uniform", 0.15), "far <off>": a_line("baseline", 3.0)}
    figure = front(lines, full_mib=2.0)
    low, high = figure.layout.yaxis.range
    assert low < 0 and 0.17 < high < 0.3
    (said,) = figure.layout.annotations
    assert said.text == "↑ far &lt;off&gt; (double-click)" and len(figure.data) == 4
    near = front({name: lines[name] for name in ("plan", "uniform")}, full_mib=2.0)
    assert near.layout.yaxis.range is None and not near.layout.annotations
