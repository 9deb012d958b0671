"""The figures say what the data say. Structure only: how they look is checked by eye, in a browser."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from app.figures import (
    head_map,
    head_quadrant,
    layer_alr,
    length_depth_maps,
    loss_curves,
    norm_and_attention,
    norm_attention_scatter,
    pooled_map,
    ratio_map,
    style,
)
from app.figures.style import PRIMARY

KILOBYTE = 1000
HOSTILE = ["<s>", "$x$", "<br>", '&lt; "q"', "%{x}", "a" * 500]
SHOWN = ["&lt;s&gt;", "&#36;x&#36;", "&lt;br&gt;", '&amp;lt; "q"', "%{x}", "a" * 39 + "…"]


def size(figure: go.Figure) -> int:
    return len(figure.to_json())


def gammas(n_layers: int = 3, n_heads: int = 4) -> np.ndarray:
    return np.linspace(-1, 1, n_layers * n_heads).reshape(n_layers, n_heads)


def clickable(figure: go.Figure) -> go.Scatter:
    """The one trace that answers a click on a map."""
    (trace,) = [trace for trace in figure.data if trace.customdata is not None]
    return trace


def written(figure: go.Figure) -> list[go.Scatter]:
    """The traces that write numbers into cells."""
    return [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "text"]


def tokens(n_tokens: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Key norms, attention with a sink at position 0 that takes 80 %, and labels."""
    generator = np.random.default_rng(0)
    attention = generator.random(n_tokens)
    attention *= 0.2 / attention.sum()
    attention[0] = 0.8
    return generator.normal(14, 2, n_tokens), attention, [f"␣word{i}" for i in range(n_tokens)]


# head maps


@pytest.mark.parametrize(("diverging", "low"), [(True, -1), (False, 0)])
def test_the_map_shows_the_values_on_a_stated_scale(diverging, low):
    values = np.abs(gammas()) if not diverging else gammas() / 2
    figure = head_map(values, title="Γ", diverging=diverging)
    np.testing.assert_array_equal(figure.data[0].z, values)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (low, 1)  # diverging: fixed, whatever the data reach


def test_two_maps_can_share_a_scale():
    assert head_map(gammas() + 1, title="ALR", diverging=False, zmax=2.5).data[0].zmax == 2.5


def test_every_cell_has_one_marker_that_names_it():
    trace = clickable(head_map(gammas(5, 3), title="Γ", diverging=True))
    named = [tuple(pair) for pair in trace.customdata]
    assert sorted(named) == [(layer, head) for layer in range(5) for head in range(3)]
    assert named == list(zip(trace.y, trace.x, strict=True))


def test_a_click_can_reach_the_page():
    figure = head_map(gammas(), title="Γ", diverging=True)
    trace = clickable(figure)
    assert trace.hovertemplate and trace.marker.size <= 14  # wider than a cell, they steal clicks
    assert (figure.layout.hovermode, figure.layout.hoverdistance) == ("closest", -1)
    assert all(other.hoverinfo == "skip" for other in figure.data if other is not trace)
    assert isinstance(json.loads(figure.to_json())["data"][-1]["customdata"], list)  # not a base64 block


def test_layer_0_is_at_the_top_and_cells_are_whole():
    figure = head_map(gammas(3, 4), title="Γ", diverging=True)
    assert figure.layout.yaxis.range == (2.5, -0.5)
    assert figure.layout.xaxis.range == (-0.5, 3.5)


def test_an_undefined_cell_is_grey_and_says_why():
    values = gammas(2, 2)
    status = np.array([["ok", "constant norms <1e-5"], ["sink only", "ok"]], dtype=object)
    values[0, 1] = np.nan
    figure = head_map(values, title="Γ", diverging=True, status=status)
    np.testing.assert_array_equal(np.isfinite(figure.data[1].z), [[False, True], [False, False]])
    fine, undefined, noted, also_fine = clickable(figure).text
    assert undefined == "Γ undefined: constant norms &lt;1e-5"
    assert noted.endswith(": sink only")
    assert (fine, also_fine) == ("Γ −1.00", "Γ +1.00")


@pytest.mark.parametrize(("diverging", "numbers"), [(True, {"−0.50", "+0.00", "–"}), (False, {"0.00", "–"})])
def test_a_small_map_has_its_numbers_written(diverging, numbers):
    values = np.array([[-0.5 if diverging else 0.0, -0.001 if diverging else 0.0, np.nan]])
    figure = head_map(values, title="Γ", diverging=diverging)
    assert {text for trace in written(figure) for text in trace.text} == numbers


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_are_readable_on_every_colour(dark):
    """WCAG contrast of text and cell, recomputed here from the colours along the whole scale."""

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def at(value):
        full = style.PURPLE if value < 0 else style.ORANGE
        return [(x + abs(value) * (y - x)) / 255 for x, y in zip(style.PAGE[dark], full[dark], strict=True)]

    values = np.linspace(-1, 1, 144).reshape(12, 12)
    traces = written(head_map(values, title="Γ", diverging=True, dark=dark))
    assert sum(len(trace.text) for trace in traces) == 144
    for trace in traces:
        text = luminance([int(trace.textfont.color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        for layer, head in zip(trace.y, trace.x, strict=True):
            cell = luminance(at(values[layer, head]))
            assert (max(text, cell) + 0.05) / (min(text, cell) + 0.05) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_every_map_has_the_colour_of_the_page_at_0(dark):
    maps = (
        head_map(gammas(), title="Γ", diverging=True, dark=dark),
        head_map(abs(gammas()), title="ALR", diverging=False, dark=dark),
        ratio_map(abs(gammas()), dark=dark),
        pooled_map(np.eye(2), tokens_per_bin=1, n_tokens=2, dark=dark),
        length_depth_maps({"a": np.ones((1, 1))}, lengths=[1], depths=[0], samples=np.ones((1, 1)), dark=dark),
    )
    for figure in maps:
        scale = dict(figure.layout.coloraxis.colorscale or figure.data[0].colorscale)
        assert scale[0.5 if len(scale) == 3 else 0] == f"rgb{style.PAGE[dark]}"


@pytest.mark.parametrize(("n_layers", "n_heads"), [(1, 1), (6, 8), (32, 32), (80, 64)])
def test_layers_stay_clickable_and_ticks_apart(n_layers, n_heads):
    figure = head_map(np.zeros((n_layers, n_heads)), title="Γ", diverging=True)
    plot_height = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    assert plot_height / n_layers >= 14
    assert figure.layout.height <= 560 or n_layers > 32
    assert plot_height / len(figure.layout.yaxis.tickvals) >= 16
    assert len(figure.layout.xaxis.tickvals) <= 12


def test_a_large_map_stays_small_on_the_wire():
    assert size(head_map(gammas(80, 64), title="Γ", diverging=True)) < 400 * KILOBYTE


# the quadrant


def test_the_quadrant_places_the_defined_heads_on_fixed_axes():
    gamma, without = gammas(2, 2) / 2, -gammas(2, 2) / 2
    without[0, 1] = np.nan
    figure = head_quadrant(gamma, without, np.array([[0.0, 0.5], [0.9, 0.1]]))
    trace = clickable(figure)
    assert sorted(map(tuple, trace.customdata)) == [(0, 0), (1, 0), (1, 1)]
    for (layer, head), x, y in zip(trace.customdata, trace.x, trace.y, strict=True):
        assert (x, y) == (gamma[layer, head], without[layer, head])
    assert figure.layout.xaxis.range == figure.layout.yaxis.range == (-1.05, 1.05)


def test_a_larger_sink_share_is_a_larger_disc_drawn_below():
    trace = clickable(head_quadrant(gammas(1, 3), gammas(1, 3), np.array([[0.1, 0.9, 0.4]])))
    assert [head for _, head in trace.customdata] == [1, 2, 0]
    assert list(trace.marker.size) == sorted(trace.marker.size, reverse=True)
    assert list(trace.text) == ["90%", "40%", "10%"]


def test_each_quadrant_is_named_on_its_own_side():
    notes = head_quadrant(gammas(), gammas(), np.abs(gammas())).layout.annotations
    named = {(note.x > 0, note.y > 0): note.text for note in notes}
    assert "follows the paper" in named[False, False]
    assert "sink only" in named[False, True]
    assert "mirror: keep HIGH norms" in named[True, True]
    assert "sink hides it" in named[True, False]


# one head


@pytest.mark.parametrize("draw", [norm_and_attention, norm_attention_scatter])
def test_hostile_labels_arrive_escaped(draw):
    options = dict(rho=0.1, n=6) if draw is norm_attention_scatter else {}
    figure = draw(np.arange(6.0), np.full(6, 1 / 6), HOSTILE, **options)
    assert {text for trace in figure.data for text in trace.text} == set(SHOWN)


def test_zeros_are_lifted_to_a_labelled_floor_and_hover_tells_the_truth():
    attention = np.array([0.9, 0.1, 0.0, 1e-12])
    figure = norm_and_attention(np.arange(4.0), attention, list("abcd"))
    lower = figure.data[1]
    assert lower.y.min() == pytest.approx(1e-7)  # six decades below 0.9, down to a power of ten
    assert lower.customdata[2][1] == 0
    assert figure.layout.yaxis2.type == "log" and figure.layout.yaxis2.ticktext[0] == "≤ 0.00001 %"
    assert "100 %" in figure.layout.yaxis2.ticktext
    low, high = figure.layout.yaxis2.range
    assert 10**low < lower.y.min() and lower.y.max() < 10**high


def test_positions_stay_true_where_the_sink_is_left_out():
    norm, attention, labels = (part[1:] for part in tokens(10))
    scatter = norm_attention_scatter(norm, attention, labels, rho=None, n=9, first_position=1)
    assert len(scatter.data) == 1  # no token is marked as the first
    assert scatter.data[0].customdata[0][2] == 1


def test_a_long_text_is_thinned_without_losing_what_stands_out():
    norm, attention, labels = tokens(32768)
    norm[20001], attention[9999] = 99.0, 0.7
    figure = norm_and_attention(norm, attention, labels)
    drawn = {int(x) for trace in figure.data for x in trace.x}
    assert {0, 9999, 20001, 32767} <= drawn and len(drawn) <= style.MOST_POINTS
    assert f"{len(drawn):,} of 32,768" in figure.layout.xaxis.title.text
    assert size(figure) < 600 * KILOBYTE
    assert size(norm_attention_scatter(norm, attention, labels, rho=0.0, n=32768)) < 600 * KILOBYTE


@pytest.mark.parametrize(
    ("rho", "stated"), [(-0.421, "= −0.42"), (0.4, "= +0.40"), (None, "undefined"), (np.nan, "undefined")]
)
def test_rho_is_stated_with_its_sign_and_n(rho, stated):
    figure = norm_attention_scatter(*tokens(5), rho=rho, n=311)
    assert figure.layout.annotations[0].text == f"Spearman ρ {stated}, all queries, n = 311"


def test_the_sink_has_a_marker_of_its_own():
    others, sink = norm_attention_scatter(*tokens(5), rho=0.0, n=5).data
    assert len(others.x) == 4 and len(sink.x) == 1
    assert sink.customdata[0][2] == 0 and sink.marker.symbol != others.marker.symbol


def test_loss_curves_are_thinned_but_keep_their_ends():
    fraction = np.linspace(0, 1, 32769)
    names = ("keep low norm", "keep high norm", "ideal order", "random order")
    figure = loss_curves(fraction, dict.fromkeys(names, fraction**2))
    for curve in figure.data:
        assert len(curve.x) <= 500
        assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 100, 1)
    assert figure.data[0].line.color == PRIMARY


def test_the_loss_at_a_ratio_counts_the_tokens_the_method_evicts():
    """keep_ratio 0.55 of n = 10 keeps ceil(5.5) = 6 and evicts 4: the 5th point, not an interpolation."""
    lost = np.array([0, 1, 2, 3, 44, 55, 66, 77, 88, 99, 100]) / 100
    figure = loss_curves(np.arange(11) / 10, {"keep low norm": lost}, keep_ratio=0.55)
    assert figure.data[0].name == "keep low norm: 44.0% lost"
    assert "40 % of the tokens evicted" in figure.layout.legend.title.text
    assert figure.layout.shapes[0].x0 == pytest.approx(45)


@pytest.mark.parametrize("evicted", range(1, 101))
def test_the_loss_at_a_round_ratio_is_not_off_by_one(evicted):
    figure = loss_curves(np.arange(101) / 100, {"ideal order": np.arange(101) / 100}, keep_ratio=1 - evicted / 100)
    assert figure.data[0].name == f"ideal order: {evicted}.0% lost"


def test_where_the_rest_is_protected_the_loss_is_that_of_all_that_may_be_evicted():
    figure = loss_curves(np.arange(7) / 10, {"keep low norm": np.arange(7) / 20}, keep_ratio=0.1)
    assert figure.data[0].name == "keep low norm: 30.0% lost" and figure.data[0].x[-1] == pytest.approx(60)
    assert "60 % of the tokens evicted" in figure.layout.legend.title.text


def test_the_pooled_map_hides_the_future_and_tells_ranges_and_shares():
    pooled = np.array([[1, 0, 0], [0.36, 0.64, 0], [0.25, 0.25, 0.5]])
    figure = pooled_map(pooled, tokens_per_bin=4, n_tokens=10)
    trace = figure.data[0]
    np.testing.assert_allclose(trace.z[1], [0.6, 0.8, np.nan], rtol=1e-6)  # square roots
    np.testing.assert_allclose(trace.customdata, pooled, rtol=1e-6)
    assert list(trace.x) == list(trace.y) == ["0–3", "4–7", "8–9"]  # the last bin is not full
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert "√" in trace.colorbar.title.text and trace.colorbar.ticktext[-1] == "100 %"


def test_the_pooled_map_travels_as_float32():
    pooled = np.tri(128) / np.arange(1, 129)[:, None]
    assert size(pooled_map(pooled, tokens_per_bin=256, n_tokens=32768)) < 250 * KILOBYTE


# per layer


def test_layers_show_heads_their_mean_the_threshold_and_what_is_skipped():
    ratio = np.array([[1.5, np.nan], [0.5, 0.7]])
    figure = layer_alr(ratio, np.array([1.5, 0.6]), threshold=0.8, skipped=[0])
    heads, layers = figure.data
    assert [tuple(pair) for pair in heads.customdata] == [(0, 0), (1, 0), (1, 1)]
    assert list(heads.x) == [0, 1, 1] and list(layers.y) == [1.5, 0.6]
    lines = [(shape.name, shape.y0) for shape in figure.layout.shapes if shape.type == "line"]
    shaded = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
    assert lines == [("chance", 1.0), ("threshold 0.80", 0.8)] and shaded == [(-0.5, 0.5)]


# all of them

NOTHING = np.full((2, 3), np.nan)
ONE = np.ones(1)
EXTREMES = {
    "all heads undefined": lambda: head_map(NOTHING, title="Γ", diverging=True),
    "no ALR": lambda: head_map(NOTHING, title="ALR", diverging=False),
    "ALR all zero": lambda: head_map(np.zeros((2, 3)), title="ALR", diverging=False),
    "infinite": lambda: head_map(np.full((1, 1), np.inf), title="ALR", diverging=False),
    "empty quadrant": lambda: head_quadrant(NOTHING, NOTHING, NOTHING),
    "one token": lambda: norm_and_attention(ONE, ONE, ["a"]),
    "no attention": lambda: norm_and_attention(np.arange(3.0), np.zeros(3), list("abc")),
    "undefined attention": lambda: norm_and_attention(np.full(3, np.nan), np.full(3, np.nan), list("abc")),
    "no tokens": lambda: norm_and_attention(np.empty(0), np.empty(0), []),
    "one token, scatter": lambda: norm_attention_scatter(ONE, ONE, ["a"], rho=None, n=1),
    "no attention, scatter": lambda: norm_attention_scatter(ONE, np.zeros(1), ["a"], rho=None, n=1),
    "a long text undefined": lambda: norm_and_attention(np.full(5000, np.nan), np.zeros(5000), ["a"] * 5000),
    "no loss": lambda: loss_curves(np.linspace(0, 1, 2), {"ideal order": np.zeros(2)}, keep_ratio=1.0),
    "undefined loss": lambda: loss_curves(np.arange(2), {"ideal order": np.full(2, np.nan)}, keep_ratio=0.5),
    "no curves": lambda: loss_curves(np.zeros(1), {}),
    "one bin": lambda: pooled_map(np.ones((1, 1)), tokens_per_bin=1, n_tokens=1),
    "empty bins": lambda: pooled_map(np.zeros((2, 2)), tokens_per_bin=2, n_tokens=3),
    "undefined layers": lambda: layer_alr(NOTHING, np.full(2, np.nan), threshold=1.0, skipped=[]),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_an_extreme_input_gives_a_figure_that_can_be_sent(case):
    figure = EXTREMES[case]()
    sent = json.loads(figure.to_json())
    assert sent["layout"]["paper_bgcolor"] == style.CLEAR
    assert "layout" not in sent["layout"]["template"]  # the page's theme decides, not Plotly's
    for name in ("xaxis", "yaxis", "yaxis2"):
        span = sent["layout"].get(name, {}).get("range")
        assert span is None or np.isfinite(span).all()


def test_the_same_data_give_the_same_figure():
    """A figure that differs between two runs of the page loses the reader's selection."""
    first, second = (head_map(gammas(), title="Γ", diverging=True).to_json() for _ in range(2))
    assert first == second
