"""One number, one program: a metric of a run is one value in the library, a study, the command line, the report and
the app."""

import json
import re

import numpy as np
import pytest

from analysis import correlation, load_run
from analysis.demo.presets import bundled_results
from analysis.metrics import METRICS, PROBES, Metric, gamma
from analysis.studies import study_of
from analysis.workspace import digest_of_file
from app import library
from app.cli import main
from app.report import report

DEMO = bundled_results("books-5m").demo


def of_rows(rows, name, shape) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float).reshape(shape)


def forget_what_was_worked_out():
    for values in (library.study_of_run, library.values_of):
        values.cache_clear()


SIX_DIGITS = 5.1e-6
"""What a page's data are rounded to: half of the last of six digits, of a number that begins with 1."""


def in_report(page: str) -> dict:
    *_, data = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, flags=re.S)
    return json.loads(data)["runs"][0]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(("name", "method"), [("spearman", "spearman"), ("gamma", "gini")])
def test_a_metric_of_a_run_is_one_value_wherever_it_is_told(name, method, probe, capsys):
    run = load_run(DEMO)
    value = correlation(run, method, probe=probe)
    assert main(["heads", str(DEMO), "--probe", probe.replace(" ", "-"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    np.testing.assert_array_equal(of_rows(told["rows"], name, value.shape), value)
    np.testing.assert_array_equal(study_of(run).of(name, probe=probe)[0], value)
    np.testing.assert_array_equal(library.values_of(digest_of_file(DEMO), 0, probe).of(name), value)
    if probe == "next token":
        heads = in_report(report([run]))
        assert heads["probe"] == probe
        np.testing.assert_allclose(heads["heads"][name], value, rtol=SIX_DIGITS)


def test_a_metric_that_is_registered_is_told_everywhere(capsys):
    """With nothing else touched."""
    forget_what_was_worked_out()
    METRICS.register("half_of_gamma", Metric("Half of Γ", "half of Γ", lambda row: gamma(row) / 2))
    try:
        run = load_run(DEMO)
        value = correlation(run) / 2
        assert main(["heads", str(DEMO), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        np.testing.assert_array_equal(of_rows(told["rows"], "half_of_gamma", value.shape), value)
        np.testing.assert_array_equal(library.values_of(digest_of_file(DEMO), 0).of("half_of_gamma"), value)
        page = report([run])
        np.testing.assert_allclose(in_report(page)["heads"]["half_of_gamma"], value, rtol=SIX_DIGITS)
        assert "Half of Γ" in page
    finally:
        METRICS.remove("half_of_gamma")
        forget_what_was_worked_out()
