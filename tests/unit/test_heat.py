"""The map that is clicked: what its cells say, how they are coloured, and which one a click means."""

import json

import numpy as np
import pytest

from app.figures.heat import Scale, clickable_map, map_height, outlines
from app.figures.style import luminance

GAMMA = Scale("Γ", -1, 1, diverging=True)


def a_map(values, scale=GAMMA, **options):
    values = np.asarray(values, dtype=float)
    names = np.array([f"L{i} Q{h}" for i, h in np.ndindex(values.shape)]).reshape(values.shape)
    given = dict(kv_heads=1, names=names, notes=np.full(values.shape, "ok")) | options
    return json.loads(json.dumps(clickable_map(values, scale, **given), allow_nan=False))


def cells(option):
    return option["series"][0]["data"]


def test_each_cell_has_its_name_its_value_and_what_is_said_of_it():
    option = a_map([[0.5, -1], [np.nan, 0]], notes=np.array([["a", "b"], ["constant norms", "d"]]))
    assert [cell["name"] for cell in cells(option)] == ["L0 Q0", "L0 Q1", "L1 Q0", "L1 Q1"]
    assert [cell["value"][:2] for cell in cells(option)] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert [cell["value"][3] for cell in cells(option)] == [
        "Γ +0.50: a", "Γ −1.00: b", "Γ undefined: constant norms", "Γ +0.00: d"
    ]  # fmt: skip


def test_an_undefined_cell_is_grey_whatever_the_scale_says_of_its_number():
    defined, undefined = cells(a_map([[0.5, np.nan]]))
    assert "visualMap" not in defined
    assert undefined["visualMap"] is False and undefined["itemStyle"]["color"].startswith("rgba(138")


@pytest.mark.parametrize("dark", [False, True])
def test_zero_is_as_clear_as_the_page_and_the_ends_are_alike_and_full(dark):
    scale = a_map([[0.0]], dark=dark)["visualMap"]
    colours = scale["inRange"]["color"]
    assert (scale["min"], scale["max"]) == (-1, 1) and len(colours) % 2 == 1
    shares = [float(colour.rstrip(")").rsplit(",", 1)[1]) for colour in colours]
    assert shares == pytest.approx(abs(np.linspace(-1, 1, len(colours))).tolist())


def test_a_sequential_scale_begins_clear_and_ends_at_the_largest_value_or_where_it_is_told_to():
    scale = a_map([[0.1, 0.4]], Scale("Lost", percent=True))["visualMap"]
    assert (scale["min"], scale["max"]) == (0, 0.4) and scale["text"] == ["40%", "0%"]
    assert scale["inRange"]["color"][0].endswith(",0)") and scale["inRange"]["color"][-1].endswith(",1)")
    assert a_map([[0.1]], Scale("nALR", 0, 2))["visualMap"]["max"] == 2
    assert a_map([[np.nan]], Scale("ALR"))["visualMap"]["max"] == 1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("value", np.linspace(-1, 1, 21))
def test_numbers_in_cells_can_be_read_on_every_colour(value, dark):
    option = a_map([[value]], dark=dark)
    colours = option["visualMap"]["controller"]["inRange"]["color"]  # as they are over the page
    under = colours[round((value + 1) / 2 * (len(colours) - 1))]
    behind = luminance([tuple(int(part) / 255 for part in under[4:-1].split(","))])[0]
    ink = {"#000000": 0.0, "#FFFFFF": 1.0}[cells(option)[0]["label"]["color"]]
    assert (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05) >= 4.5


def test_a_large_map_has_no_numbers_in_its_cells_and_fits_a_screen():
    option = a_map(np.zeros((32, 32)), kv_heads=8)
    assert option["series"][0]["label"]["show"] is False and "label" not in cells(option)[0]
    assert len(json.dumps(option)) < 200_000
    assert map_height(32) <= 560 and map_height(80) >= 80 * 9


def test_a_box_lies_around_the_open_cell_and_a_dashed_one_around_the_pinned():
    pinned, opened = outlines((4, 8), (1, 2)).split("</div>")[:2]
    down = (map_height(4) - 80) / 4
    assert "left: calc(38px + (100% - 44px) / 8 * 2)" in pinned and f"top: calc(22px + {down:.6f}px * 1)" in pinned
    assert "width: calc((100% - 44px) / 8)" in pinned and f"height: {down:.6f}px" in pinned and "dashed" in pinned
    assert "* var(--l2kv-head))" in opened and "* var(--l2kv-layer))" in opened and "solid" in opened
    assert outlines((4, 8)).count("<div") == 1


def test_cells_that_are_filtered_out_are_faded():
    faded, shown = cells(a_map([[0.5, 0.5]], shown=np.array([[False, True]])))
    assert faded["itemStyle"]["opacity"] < 0.2 and "itemStyle" not in shown


def test_a_layer_of_which_there_is_nothing_to_tell_says_so_once_across_its_cells():
    told, silent = (cells(a_map(np.zeros((2, 3)), skipped={1: "skipped"}))[at : at + 3] for at in (3, 0))
    assert [cell["label"]["formatter"] for cell in told if cell["label"]["show"]] == ["skipped"]
    assert not any("formatter" in cell["label"] for cell in silent)


def test_lines_part_the_query_heads_of_each_kv_head():
    heads, groups = a_map(np.zeros((2, 6)), kv_heads=3)["xAxis"]
    assert len(heads["data"]) == 6 and groups["data"] == ["KV 0", "KV 1", "KV 2"] and groups["splitLine"]["show"]
    assert not a_map(np.zeros((2, 6)))["xAxis"][1]["splitLine"]["show"]
