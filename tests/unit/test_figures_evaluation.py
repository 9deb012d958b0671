"""Drawings of results say what the results say. Structure only: how they look is checked by eye, in a browser."""

import json
import math
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from analysis.errors import SettingsError
from analysis.evaluation.results import FULL
from app.figures import Curve, length_depth_maps, score_by_bytes, score_by_position
from app.figures.style import FULL_GREY
from app.report.evaluation import section
from app.report.writing import Drawing, Section
from tests.support.evaluation import passkeys_of, predictions_of


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def ends(line: go.Scatter) -> list[tuple[float, float]]:
    """The ends of the bars that are drawn."""
    return [
        (y - below, y + above)
        for y, below, above in zip(line.y, line.error_y.arrayminus, line.error_y.array, strict=True)
    ]


def drawing(of: Section, title: str) -> Drawing:
    (found,) = [each for each in of.drawings if each.title.startswith(title)]
    return found


def curve(*means: float) -> Curve:
    mean = np.array(means)
    names = tuple(f"method {i}" for i in range(len(mean)))
    return Curve(np.arange(1.0, len(mean) + 1), mean, mean - 0.1, mean + 0.2, names)


# the figures


@pytest.mark.parametrize("draw", [score_by_bytes, score_by_position])
def test_a_line_has_its_means_its_intervals_and_a_marker_of_its_own_and_the_full_cache_is_grey(draw):
    lines = {"low norm": curve(0.5, 0.75), "<img> $x$": curve(0.25, 0.5)}
    figure = draw(lines, full=curve(1.0), score="share found", most=1)
    low, other, full = (trace(figure, name) for name in ("low norm", "&lt;img&gt; &#36;x&#36;", "full cache"))
    assert list(low.customdata) == [1, 2] and list(low.y) == [0.5, 0.75]
    np.testing.assert_allclose(ends(low), [(0.4, 0.7), (0.65, 0.95)])
    assert low.text[1] == "method 1<br>0.750, 95 % 0.650 to 0.950"
    assert low.line.color != other.line.color and low.marker.symbol != other.marker.symbol
    assert full.line.color == FULL_GREY and list(full.y) == [1]
    low_end, high_end = figure.layout.yaxis.range
    assert low_end < 0 < 1 < high_end and figure.layout.yaxis.title.text == "share found"
    assert "<img" not in figure.to_json()


def test_a_line_looks_the_same_whether_there_is_a_full_cache_or_not():
    with_full, without = (score_by_bytes({"a": curve(1), "b": curve(2)}, full=full, score="x", most=None)
                          for full in (curve(3), None))  # fmt: skip
    assert repr(trace(with_full, "b")) == repr(trace(without, "b"))
    assert not [shape for shape in without.layout.shapes]


def test_lines_of_equal_scores_do_not_hide_each_other():
    drawn = score_by_bytes({name: curve(0, 0) for name in "abcd"}, full=None, score="x", most=1).data
    sizes = [line.marker.size for line in drawn]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4  # the last is on top


def test_intervals_at_the_same_bytes_stand_side_by_side_and_others_at_their_place():
    same = score_by_bytes({name: curve(0.5) for name in "abc"}, full=None, score="x", most=1).data
    places = [line.x[0] for line in same]
    assert np.diff(places) == pytest.approx([0.012] * 2) and places[1] == 1  # of the largest, 1 MiB
    assert all("%{customdata:.2f} MiB" in line.hovertemplate and list(line.customdata) == [1] for line in same)
    apart = replace(curve(0.5), x=np.array([2.0]))
    drawn = score_by_bytes({"a": curve(0.5), "b": apart}, full=None, score="x", most=1).data
    assert [line.x[0] for line in drawn] == [1, 2]


def test_an_undefined_score_is_named_and_not_drawn_as_a_number():
    figure = score_by_position({"a": curve(1, math.nan, 2), "b": curve(math.nan)}, full=None, score="x", most=None)
    undefined = trace(figure, "a (undefined at 1 of 3)")
    assert np.isnan(undefined.y[1]) and undefined.error_y.array[1] == 0
    assert undefined.text[1].endswith(", no interval")
    assert trace(figure, "b (undefined at 1 of 1)")


@pytest.mark.parametrize(
    ("means", "most", "kind"),
    [((1.0, 1.5), None, None), ((1.0, 20.0), None, "log"), ((0.0, 20.0), None, None), ((-1.0, 20.0), None, None)],
)
def test_scores_far_apart_have_a_logarithmic_axis_with_whole_numbers(means, most, kind):
    axis = score_by_bytes({"a": curve(*means)}, full=None, score="x", most=most).layout.yaxis
    assert axis.type == kind
    if kind:
        named = dict(zip(axis.tickvals, axis.ticktext, strict=True))
        assert (named[0.5], named[1], named[20], named[1000]) == ("0.5", "1", "20", "1,000")


def test_a_map_has_a_panel_a_method_with_depth_0_at_the_top_and_one_scale():
    values = np.array([[1.0, 0.5], [0.0, math.nan]])
    panels = {name: values for name in ("full cache", "low norm 0.5", "random 0.5", "<b> 0.5")}
    figure = length_depth_maps(panels, lengths=[400, 1000], depths=[0, 0.5], samples=np.array([[4, 4], [4, 0]]))
    shares = [one for one in figure.data if one.type == "heatmap" and one.coloraxis]
    assert [note.text for note in figure.layout.annotations] == [
        "full cache", "low norm 0.5", "random 0.5", "&lt;b&gt; 0.5",
    ]  # fmt: skip
    assert len(shares) == 4 and len({one.xaxis for one in shares}) == 4
    for one in shares:
        np.testing.assert_array_equal(one.z, values)
        assert list(one.x) == ["400", "1,000"] and list(one.y) == ["0 %", "50 %"]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert {axis.autorange for axis in list(figure.select_yaxes())[:4]} == {"reversed"}


def test_the_cells_of_a_map_are_written_and_an_undefined_one_is_grey_with_a_dash():
    values = np.array([[1.0, 0.5, math.nan]])
    figure = length_depth_maps({"a": values}, lengths=[1, 2, 3], depths=[0.25], samples=np.array([[2, 2, 0]]))
    written = {
        (x, text) for one in figure.data if one.type == "scatter" for x, text in zip(one.x, one.text, strict=True)
    }
    assert written == {("1", "100%"), ("2", "50%"), ("3", "–")}
    (grey,) = [one for one in figure.data if one.type == "heatmap" and not one.coloraxis]
    np.testing.assert_array_equal(np.isfinite(grey.z), [[False, False, True]])
    (dash,) = [one for one in figure.data if one.type == "scatter" and "–" in one.text]
    assert dash.textfont.color is None  # the page's: it is read in light and dark


# results


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval as its author writes it."""
    middle, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


FOUND = passkeys_of({
    FULL: {(400, 0.1): [1, 1], (400, 0.9): [1, 1], (1000, 0.1): [1, 1], (1000, 0.9): [1, 1]},
    "low_norm 0.25": {(400, 0.1): [1, 1], (400, 0.9): [1, 0], (1000, 0.1): [0, 0], (1000, 0.9): [1, 0]},
})  # fmt: skip


def test_shares_are_drawn_against_bytes_with_wilsons_interval_and_n_is_in_the_title():
    drawn = drawing(section(FOUND), "Passkey against bytes, n = 8")
    line = trace(drawn.figure, "low norm")
    assert list(line.x) == [1] and list(line.y) == [0.5]
    np.testing.assert_allclose(ends(line), [wilson(4, 8)], atol=1e-5)
    assert list(trace(drawn.figure, "full cache").x) == [4]
    np.testing.assert_allclose(ends(trace(drawn.figure, "full cache")), [wilson(8, 8)], atol=1e-5)
    assert drawn.table["method"] == ["full cache", "low norm 0.25"] and drawn.table["score"] == [1, 0.5]


def test_the_map_of_a_method_holds_its_shares_by_depth_and_length():
    drawn = drawing(section(FOUND), "Passkey by length and depth, n = 2 in each cell")
    full, low = [one for one in drawn.figure.data if one.type == "heatmap" and one.coloraxis]
    np.testing.assert_array_equal(full.z, np.ones((2, 2)))
    np.testing.assert_array_equal(low.z, [[1, 0], [0.5, 0.5]])  # depth 0.1, then 0.9
    table = drawn.table
    assert list(zip(table["tokens"], table["depth"], table["low norm 0.25"], strict=True)) == [
        (400, 0.1, 1), (1000, 0.1, 0), (400, 0.9, 0.5), (1000, 0.9, 0.5),
    ]  # fmt: skip


def test_a_length_without_a_depth_is_an_undefined_cell():
    places = {(400, 0.1): [1], (400, 0.9): [1], (1000, 0.1): [0]}
    drawn = drawing(section(passkeys_of({FULL: places})), "Passkey by length and depth, n = 1 in each")
    (full, grey) = [one for one in drawn.figure.data if one.type == "heatmap"]
    np.testing.assert_array_equal(full.z, [[1, 0], [1, math.nan]])
    np.testing.assert_array_equal(np.isfinite(grey.z), [[False, False], [False, True]])


def test_where_the_full_cache_finds_nothing_the_page_says_so():
    nothing = section(passkeys_of({FULL: {(400, 0.1): [0, 0]}, "low_norm 0.25": {(400, 0.1): [0, 0]}}))
    assert any("full cache scores 0" in words for words in nothing.words)
    assert not any("full cache scores 0" in words for words in section(FOUND).words)


def test_the_perplexity_ratio_is_drawn_against_bytes_with_the_interval_of_two_documents_from_one_to_the_other():
    """Resampling two documents draws one alone half of the time: the 95 % interval is from the lower to the higher."""
    results = predictions_of({"low_norm 0.5": [[math.log(2)] * 4, [math.log(8)] * 4]})
    drawn = drawing(section(results), "Prediction against bytes, n = 2").figure
    line = trace(drawn, "low norm")
    assert list(line.x) == [1] and list(line.y) == pytest.approx([4])  # the geometric mean of 2 and 8
    np.testing.assert_allclose(ends(line), [(2, 8)])
    full = trace(drawn, "full cache")
    assert (list(full.x), list(full.y), ends(full)) == ([2], [1], [(1, 1)]) and full.text[0].endswith("no interval")
    assert "perplexity ratio" in drawn.layout.yaxis.title.text


def test_predictions_are_drawn_by_position_a_figure_for_each_score_and_budget():
    change = [[0.0, 0.0, 1.0, 3.0]] * 2
    results = predictions_of({"low_norm 0.5": change, "random 0.5": change, "low_norm 0.25": change, "my plan": change})
    names = ("nll", "perplexity_ratio", "accuracy")
    of = section(results, by_position=names)
    titles = [each.title for each in of.drawings[1:]]
    assert titles == [
        f"{title} by position{budget}, n = 2"
        for budget in (", budget 0.5", ", budget 0.25", "")
        for title in ("NLL", "Perplexity ratio", "Accuracy")
    ]
    nll = drawing(of, "NLL by position, budget 0.5").figure
    assert {line.name for line in nll.data} == {"full cache", "low norm", "random"}
    assert list(trace(nll, "low norm").x) == [1, 2, 3, 4] and list(trace(nll, "low norm").y) == [2, 2, 3, 5]
    ratio = trace(drawing(of, "Perplexity ratio by position, budget 0.25").figure, "low norm")
    assert list(ratio.y) == pytest.approx([1, 1, math.e, math.e**3])
    plan = trace(drawing(of, "Accuracy by position, n").figure, "my plan")
    assert list(plan.y) == [0, 1, 0, 1]


def test_many_positions_are_means_of_neighbours_and_no_point_stands_on_a_few_tokens():
    ramp = [[float(i) for i in range(339)]] * 2
    line = trace(
        drawing(section(predictions_of({"low_norm 0.5": ramp}), by_position=["nll"]), "NLL").figure, "low norm"
    )
    width = int(line.x[1] - line.x[0])
    assert 8 <= len(line.x) <= 16 and 339 - (len(line.x) - 1) * width > width / 2
    assert line.y[0] == pytest.approx(2 + (width - 1) / 2)


def test_without_the_full_cache_there_is_an_nll_and_no_ratio():
    results = predictions_of({"low_norm 0.5": [[1.0] * 2] * 2}, full=False)
    of = section(results, by_position=["nll", "perplexity_ratio"])
    assert [each.title for each in of.drawings] == [
        "Prediction against bytes, n = 2", "NLL by position, budget 0.5, n = 2",
    ]  # fmt: skip
    assert list(trace(of.drawings[0].figure, "low norm").y) == [3]


def test_what_no_document_defines_is_undefined_in_drawings_and_table():
    known = predictions_of({"low_norm 0.5": [[0.5, 0.0], [0.5, 0.0]]})
    lost = [row if row.method == FULL else replace(row, score=None, nats=(2.5, None)) for row in known.rows]
    results = replace(known, rows=tuple(lost))
    figure = drawing(section(results, by_position=["nll"]), "NLL").figure
    line = trace(figure, "low norm (undefined at 1 of 2)")
    assert line.y[0] == 2.5 and math.isnan(line.y[1])
    by_bytes = drawing(section(results), "Prediction against bytes").figure
    assert trace(by_bytes, "low norm (undefined at 1 of 1)")
    assert "undefined" in section(results).table["score"]


def test_the_table_tells_each_interval_in_a_cell_and_few_samples_are_warned_of():
    of = section(predictions_of({"low_norm 0.5": [[0.25] * 2, [0.75] * 2]}))
    assert of.table["method"] == ["full cache", "low norm 0.5"] and of.table["change"][1] == "0.500 (0.250 to 0.750)"
    assert any("2 samples they are too narrow" in words for words in of.words)
    many = section(predictions_of({"low_norm 0.5": [[0.25] * 2] * 6}))
    assert not any("too narrow" in words for words in many.words)


def test_equal_differences_have_no_interval_rather_than_one_without_width():
    lost = section(passkeys_of({FULL: {(400, 0.1): [1] * 5}, "keydiff 0.5": {(400, 0.1): [0] * 5}}))
    assert lost.table["change"] == ["", "−1.000 (no interval: all 5 are equal)"]
    assert "(no interval" not in lost.table["score"][0]  # Wilson's has a width


def test_a_policy_is_called_the_same_in_table_legend_and_notes():
    found = passkeys_of({FULL: {(400, 0.1): [1]}, "low_norm 0.5": {(400, 0.1): [1]}, "keydiff 0.5": {(400, 0.1): [1]}})
    of = section(replace(found, notes=("last_query 0.1 is left out: it holds more.", "A text is_short.")))
    assert of.table["method"] == ["full cache", "low norm 0.5", "KeyDiff 0.5"]
    assert {line.name for line in of.drawings[0].figure.data} == {"full cache", "low norm", "KeyDiff"}
    assert of.words[-2:] == ("attention of the last query 0.1 is left out: it holds more.", "A text is_short.")


def test_results_of_a_task_that_is_not_registered_are_refused():
    with pytest.raises(SettingsError, match="task must be one of"):
        section(replace(FOUND, task="no such task"))


def test_figures_travel_as_json():
    for of in (section(FOUND), section(predictions_of({"low_norm 0.5": [[0.25] * 2] * 6}))):
        assert all(json.loads(each.figure.to_json())["data"] for each in of.drawings)


def test_predictions_at_other_positions_in_each_sample_have_no_curve_and_still_a_score():
    results = predictions_of({"low_norm 0.5": [[0.5, 0.0], [0.5, 0.0]]})
    moved = [replace(row, context=7) if row.sample == "s1" else row for row in results.rows]
    of = section(replace(results, rows=tuple(moved)))
    assert [each.title for each in of.drawings] == ["Prediction against bytes, n = 2"]


def test_nothing_measured_is_an_empty_figure():
    for draw in (score_by_bytes, score_by_position):
        assert not draw({}, full=None, score="x", most=None).data
    assert not length_depth_maps({}, lengths=[], depths=[], samples=np.zeros((0, 0))).data
