"""Studies of many texts: metrics against slow loops, studies that are resumed, and their files."""

import dataclasses
import json
import math
import os
import random
import re
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from analysis import alr, correlation, records
from analysis import studies as measured
from analysis.__main__ import main
from analysis.defaults import RECENT_WINDOW
from analysis.demo import presets
from analysis.errors import RecordError, SettingsError, TextError
from analysis.metrics import METRICS, PROBES, STATUSES, Metric, gamma, metrics
from analysis.models.digest import digest_of
from analysis.models.load import LoadedModel
from analysis.plans.curves import LossCurves, curves_of, loss_curves
from analysis.statistics import stability
from analysis.studies import Study, head_means, layer_alr, load_study, save_study, study
from analysis.texts.excerpts import Excerpt, excerpts
from analysis.verdicts import answer, verdicts
from tests.support.runs import run_of, study_of

TEXTS = presets.bundled_texts()
KEATS = TEXTS["The Tomb of Keats (Oscar Wilde, 1877)"]


@pytest.fixture(scope="module")
def texts(loaded) -> tuple[Excerpt, ...]:
    return excerpts(loaded.tokenizer, {"Keats": KEATS}, n_tokens=60, at_most=4)


@pytest.fixture(scope="module")
def whole(loaded, texts) -> Study:
    """The study in one go, without a file."""
    return study(loaded, texts)


def assert_same(one: Study, other: Study) -> None:
    for field in dataclasses.fields(Study):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        else:
            assert a == b, field.name


# Metrics


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("probe", PROBES)
def test_each_metric_is_a_number_per_head_where_its_status_is_ok_and_nan_elsewhere(name, probe):
    ranks = np.arange(1.0, 9.0)
    rows = np.array([[1 / ranks, ranks], [ranks, ranks], [np.zeros(8), np.ones(8)]])
    run = run_of([[ranks], [np.ones(8)], [ranks]], rows, recent=[rows * (ranks <= 6), rows * (ranks <= 7)])
    figures = metrics(run, probe=probe)
    place = list(METRICS).index(name)
    assert figures.values.shape == figures.status.shape == (len(METRICS), 3, 2)
    np.testing.assert_array_equal(np.isfinite(figures.of(name)), figures.status[place] == 0)
    words = [STATUSES[i] for i in figures.status[place].ravel()]
    constant, even = ("constant norms", "no attention") if METRICS[name].ranks else ("ok", "ok")
    # Constant norms are said first by `analysis.measures`; in layer 2 there is no attention, then attention like any.
    assert words == ["ok", "ok", constant, constant, "no attention", even]
    assert METRICS[name].about


def test_synthetic_heads_read_minus_one_zero_and_plus_one():
    """Attention that falls with the norm, that does not care for which end of the norms it is at, and that rises."""
    ranks = np.arange(1.0, 402)
    run = run_of([[ranks]], [[1 / ranks, (ranks - 201) ** 2, ranks]])
    figures = metrics(run)
    assert figures.of("gamma")[0] == pytest.approx([-1, 0, 1], abs=1e-6)
    assert figures.of("normalised_alr")[0] == pytest.approx([0, 1, 2], abs=1e-6)
    assert figures.of("spearman")[0] == pytest.approx([-1, 0, 1], abs=1e-6)
    # 201 of 401 are kept: the mirror shares the middle one, and half of the two ends is at the low end (of equals the
    # earlier, so one more).
    assert figures.of("overlap")[0] == pytest.approx([1, 101 / 201, 1 / 201])


def test_overlap_and_entropy_by_hand():
    """Kept by norm: tokens 0, 1, 2 (of the equal norms the earlier); ideal: 0, 3 and of the equal ones 1."""
    run = run_of([[[1.0, 2.0, 3.0, 3.0, 9.0]]], [[[0.25, 0.125, 0.0, 0.5, 0.125]]])
    figures = metrics(run)
    assert figures.of("overlap")[0, 0] == pytest.approx(2 / 3)
    assert figures.of("entropy")[0, 0] == pytest.approx(0.25 * 2 + 0.125 * 3 * 2 + 0.5 * 1)
    assert figures.of("entropy_normalised")[0, 0] == pytest.approx(1.75 / math.log2(5))


def test_entropy_is_of_shares_and_normalised_by_what_a_window_lets_see():
    even = run_of([[np.arange(1.0, 9.0)]], [[[0.1] * 8]])
    assert metrics(even).of("entropy")[0, 0] == pytest.approx(3, abs=1e-6)
    assert metrics(even).of("entropy_normalised")[0, 0] == pytest.approx(1, abs=1e-6)
    run = run_of([[np.arange(1.0, 9.0)]], [[[0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1]]])
    windowed = dataclasses.replace(run, windows=(5,), layer_kinds=("sliding",))  # 4 and the query's own
    assert metrics(windowed).of("entropy_normalised")[0, 0] == pytest.approx(1, abs=1e-6)
    assert np.isnan(metrics(windowed).of("gamma")[0, 0])
    assert np.isfinite(metrics(windowed, probe="all queries").of("gamma")[0, 0])  # each key has had its queries


def test_a_probe_is_the_attention_that_all_metrics_are_of():
    rng = np.random.default_rng(0)
    norm, row, received = (rng.gamma(1, size=(2, 2, 30)) for _ in range(3))
    run, swapped = run_of(norm, row, received), run_of(norm, received, row)
    np.testing.assert_array_equal(metrics(run, probe="all queries").values, metrics(swapped).values)
    np.testing.assert_allclose(metrics(run).of("gamma"), correlation(run))
    np.testing.assert_allclose(metrics(run).of("gamma_skip_first"), correlation(run, skip_first=1))
    np.testing.assert_allclose(metrics(run).of("alr_per_token"), alr(run) / 30)
    np.testing.assert_allclose(metrics(run).of("normalised_alr"), alr(run) / metrics(run).of("alr_chance"))
    np.testing.assert_allclose(metrics(run, probe="all queries").of("spearman"), correlation(swapped, "spearman"))
    np.testing.assert_allclose(metrics(run).of("sink_share"), row[..., 0] / row.sum(-1), rtol=1e-6)
    with pytest.raises(ValueError, match="next token, last queries, all queries"):
        metrics(run, probe="last query")


def test_alr_of_layers_over_chance_counts_heads_by_what_there_is_to_lose(loaded, texts, whole):
    from analysis import capture

    for row, (_, text, _) in zip(layer_alr(whole), texts, strict=True):
        found = metrics(capture(loaded, text))
        by_layer = [sum(alr) / sum(chance) for alr, chance in zip(found.of("alr"), found.of("alr_chance"), strict=True)]
        np.testing.assert_allclose(row, by_layer, rtol=1e-9)
    undefined = study_of(np.zeros((3, 2, 2)), alr=np.full((3, 2, 2), np.nan), alr_chance=np.full((3, 2, 2), np.nan))
    assert np.isnan(layer_alr(undefined)).all()


# Running, resuming, refusing


def test_a_study_holds_what_the_metrics_say_of_each_capture(loaded, texts, whole):
    from analysis import capture

    assert whole.complete and whole.names == tuple(excerpt.name for excerpt in texts)
    for i, (_, text, _) in enumerate(texts):
        run = capture(loaded, text)
        assert whole.n_tokens[i] == run.n_tokens
        for probe in PROBES:
            expected = metrics(run, probe=probe)
            for name in METRICS:
                np.testing.assert_allclose(whole.of(name, probe=probe)[i], expected.of(name), rtol=1e-9)
    assert set(whole.status_of("gamma").ravel()) == {"ok"}
    np.testing.assert_allclose(head_means(whole).mean, whole.of("gamma").mean(axis=0))
    with pytest.raises(SettingsError, match="metric must be one of gamma"):
        whole.of("delta")


@pytest.mark.parametrize("after", [1, 3])
def test_a_study_that_was_cancelled_goes_on_where_it_stopped(tmp_path, loaded, texts, whole, after):
    path, seen = tmp_path / "study.safetensors", []

    class Cancelled(Exception):
        pass

    def stop(so_far):
        seen.append((len(so_far.names), so_far.texts, so_far.names[-1]))
        if len(so_far.names) == after:
            raise Cancelled

    with pytest.raises(Cancelled):
        study(loaded, texts, path, on_text=stop)
    assert seen == [(i + 1, 4, texts[i][0]) for i in range(after)]
    half = load_study(path)
    assert len(half.names) == after and not half.complete
    seen.clear()
    told = []
    again = study(loaded, iter(texts), path, on_text=seen.append, progress=lambda *step: told.append(step))
    assert_same(again, whole)
    assert set(told) == {(i, 4, "texts") for i in range(after, 5)} and told == sorted(told)
    assert [len(so_far.names) for so_far in seen] == list(range(after + 1, 5))
    assert_same(load_study(path), whole)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_cancelled_capture_leaves_the_texts_before_it(tmp_path, loaded, texts, whole):
    path, calls = tmp_path / "study.safetensors", []

    def stop(done, total, what):
        calls.append(done)
        if path.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(loaded, texts, path, progress=stop)
    assert len(load_study(path).names) == 1
    assert_same(study(loaded, texts, path), whole)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, TextError, None], ids=str)
def test_the_table_is_written_now_and_then_and_however_the_study_ends(tmp_path, loaded, texts, monkeypatch, ends):
    """Of 12 texts the first two at once, and none of the others by the clock: it stands still."""
    from analysis import studies as module

    path, written = tmp_path / "study.safetensors", []

    def save(so_far, path, real=module.save_study):
        written.append(len(so_far.names))
        return real(so_far, path)

    monkeypatch.setattr(module, "save_study", save)
    monkeypatch.setattr(module, "_EACH", 2)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    given = [(f"{i}", texts[0][1]) for i in range(12)]
    if ends is TextError:
        given[7] = ("the eighth", " ")

    def interrupt(so_far):
        if ends is KeyboardInterrupt and len(so_far.names) == 7:
            raise KeyboardInterrupt

    with pytest.raises(ends) if ends else nullcontext():
        study(loaded, given, path, on_text=interrupt)
    assert written == [1, 2, 7 if ends else 12]
    assert load_study(path).names == tuple(map(str, range(written[-1])))


def test_a_finished_study_runs_nothing_again_and_more_texts_are_added(tmp_path, loaded, texts, whole):
    path = tmp_path / "study.safetensors"
    study(loaded, texts[:2], path)
    study(loaded, texts[:2], path, progress=lambda *_: pytest.fail("it ran"))
    assert_same(study(loaded, texts, path), whole)


def test_other_texts_and_other_models_are_refused_with_the_reason(tmp_path, loaded, texts, models):
    path = tmp_path / "study.safetensors"
    study(loaded, texts[:2], path)
    before = path.read_bytes()
    (name, text, _), second = texts[:2]
    other = LoadedModel(models("llama"), loaded.tokenizer, "books-5m")
    model = models("books-5m")
    for given, loaded_, reason in (
        ([(name, text + "."), second], loaded, "of text 0, 'Keats 0' has changed"),
        ([second, (name, text)], loaded, "of text 0, it was 'Keats 0', and is now 'Keats 1'"),
        ([(name, text)], loaded, "holds 2 texts already, and 1 were given"),
        (texts[:2], other, "another model: books-5m"),
    ):
        with pytest.raises(RecordError, match=reason):
            study(loaded_, given, path)
    weight = model.model.layers[3].mlp.up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.001)
    try:
        with pytest.raises(RecordError, match="whose weights"):
            study(loaded, texts[:2], path)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert path.read_bytes() == before


def test_a_text_that_cannot_be_run_is_named_and_those_before_it_are_kept(tmp_path, loaded, texts):
    path = tmp_path / "study.safetensors"
    with pytest.raises(TextError, match="the empty one: The text is empty"):
        study(loaded, [texts[0], ("the empty one", " ")], path)
    assert load_study(path).names == (texts[0][0],)
    with pytest.raises(TextError, match="no texts"):
        study(loaded, [])
    with pytest.raises(TextError, match="10,000 texts at most, got 10,001"):
        study(loaded, texts[:1] * 10_001)


def test_no_capture_outlives_its_text(loaded, texts, monkeypatch):
    from analysis import recorder

    real, arrays, alive = recorder.capture, [], []

    def watched(*args, **options):
        alive.append(sum(array() is not None for array in arrays))
        run = real(*args, **options)
        arrays.extend(weakref.ref(getattr(run, name)) for name in ("pooled_attention", "probe_attention", "key_norm"))
        return run

    monkeypatch.setattr(recorder, "capture", watched)
    study(loaded, texts)
    assert alive == [0, 0, 0, 0] and len(arrays) == 12


# Files


def test_a_study_knows_what_each_text_is_an_excerpt_of(tmp_path, loaded, texts, whole):
    assert whole.documents == ("Keats",) * 4
    path = tmp_path / "study.safetensors"
    done = study(loaded, [texts[0], ("alone", texts[1].text)], path)
    assert done.documents == load_study(path).documents == ("Keats", "alone")


OLD_NAMES = {"gamma_skip_first": "gamma_without_sink", "normalised_alr": "alr_against_chance"}
WITHOUT_CURVES = {"curves": None, "curve_status": None, "curve_gammas": None}


def aged(path, version):
    """The file as the second or the third version wrote it."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["header"])
        arrays = {name: file.get_tensor(name) for name in ("n_tokens", "values", "status")}
    del header["protect_last"]
    if version == 2:
        del header["documents"]
    header["metrics"] = [OLD_NAMES.get(name, name) for name in header["metrics"]]
    save_file(arrays, path, metadata={"header": json.dumps(header), "l2kv_study": str(version)})


@pytest.mark.parametrize("version", [2, 3])
def test_a_study_of_an_older_version_opens_and_is_resumed(tmp_path, loaded, texts, whole, version):
    path = tmp_path / "study.safetensors"
    study(loaded, texts[:2], path)
    aged(path, version)
    old = load_study(path)
    assert old.documents == (() if version == 2 else ("Keats", "Keats")) and old.curves is None
    np.testing.assert_array_equal(old.of("gamma_skip_first"), whole.of("gamma_skip_first")[:2])
    np.testing.assert_array_equal(old.of("normalised_alr"), whole.of("normalised_alr")[:2])
    with pytest.raises(SettingsError, match=r"too old to hold loss curves.*l2kv study"):
        curves_of(old)
    assert_same(study(loaded, texts, path), dataclasses.replace(whole, **WITHOUT_CURVES))


# Its metrics are its own


@contextmanager
def registered(name: str, metric: Metric):
    METRICS.register(name, metric)
    try:
        yield
    finally:
        METRICS.remove(name)


HALF_OF_GAMMA = Metric("Half of Γ", "half of Γ", lambda row: gamma(row) / 2, low=-0.5, high=0.5)


@pytest.mark.parametrize("model", ["books-5m", "smollm2"])
def test_a_study_that_was_made_before_a_metric_was_added_opens_and_says_all_that_it_said(model):
    def told(of: Study) -> list:
        losses = layer_alr(of)
        return [answer(of), verdicts(of).tolist(), str(stability(losses)), head_means(of).mean.tolist(), of.metrics]

    path = presets.bundled_results(model).study
    before = told(load_study(path))
    with registered("half_of_gamma", HALF_OF_GAMMA):
        old = load_study(path)
        assert told(old) == before
        with pytest.raises(SettingsError, match=r"metric must be one of gamma, .*'half_of_gamma'.* l2kv study"):
            old.of("half_of_gamma")


def test_a_study_with_a_metric_that_is_registered_no_more_opens(tmp_path, loaded, texts):
    path = tmp_path / "study.safetensors"
    with registered("half_of_gamma", HALF_OF_GAMMA):
        made = study(loaded, texts[:2], path)
    read = load_study(path)
    assert_same(read, made)
    np.testing.assert_allclose(read.of("half_of_gamma"), read.of("gamma") / 2)
    assert answer(read) == answer(made)


def test_a_study_is_resumed_with_its_own_metrics_after_another_was_registered(tmp_path, loaded, texts, whole):
    path = tmp_path / "study.safetensors"
    study(loaded, texts[:2], path)
    with registered("half_of_gamma", HALF_OF_GAMMA):
        assert_same(study(loaded, texts, path), whole)


def test_a_study_with_a_metric_that_is_registered_no_more_is_not_resumed_and_says_which(tmp_path, loaded, texts):
    path = tmp_path / "study.safetensors"
    with registered("half_of_gamma", HALF_OF_GAMMA):
        study(loaded, texts[:2], path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"holds half_of_gamma, which cannot be measured now.*l2kv study"):
        study(loaded, texts, path)
    assert path.read_bytes() == before


def test_a_study_is_resumed_with_its_own_recent_window_and_probes(tmp_path, loaded, texts):
    from analysis import capture

    path = tmp_path / "study.safetensors"
    runs = [capture(loaded, excerpt.text) for excerpt in texts]
    begun = measured.study_of(runs[0], probes=["all queries"], protect_last=7)
    first = dataclasses.replace(begun, weights=digest_of(loaded), names=texts[0][:1], documents=("Keats",))
    save_study(first, path)
    done = study(loaded, texts, path)
    alone = measured.study_of(*runs, probes=["all queries"], protect_last=7)
    assert (done.protect_last, done.probes, done.names) == (7, ("all queries",), tuple(text.name for text in texts))
    for name in ("values", "curves", "curve_gammas"):
        np.testing.assert_array_equal(getattr(done, name), getattr(alone, name))


# Its loss curves


def test_the_curves_of_a_study_are_those_of_the_captures_of_its_texts(loaded, texts, whole):
    from analysis import capture

    documents = [excerpt.document for excerpt in texts]
    runs = [capture(loaded, excerpt.text) for excerpt in texts]
    ours = curves_of(whole)
    plain = loss_curves(*runs, protect_last=RECENT_WINDOW, documents=documents)
    for field in dataclasses.fields(LossCurves):
        one, other = getattr(ours, field.name), getattr(plain, field.name)
        if field.name == "captures":
            assert one == () and len(other) == 4
        elif field.name == "study":
            assert one is whole and other is None
        elif isinstance(other, np.ndarray) and other.dtype == float:
            np.testing.assert_allclose(one, other, atol=1e-6, err_msg=field.name)
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=field.name)
        else:
            assert one == other, field.name


def test_a_plan_can_be_made_from_a_study(tmp_path, loaded, texts, whole):
    from analysis import capture, plan

    read = load_study(save_study(whole, tmp_path / "study.safetensors"))
    runs = [capture(loaded, excerpt.text) for excerpt in texts]
    made = plan(curves_of(read), 0.7)
    from_captures = plan(loss_curves(*runs, protect_last=RECENT_WINDOW), 0.7)
    assert made.expected_loss == pytest.approx(from_captures.expected_loss, abs=1e-6)
    assert made.to_spec().protect_last == RECENT_WINDOW


def test_a_run_is_a_study_of_one_of_which_plans_are_made_alike(loaded, texts):
    from analysis import capture, plan

    runs = [capture(loaded, excerpt.text) for excerpt in texts]
    for given in (runs[:1], runs):
        curves = curves_of(measured.study_of(*given))
        plain = loss_curves(*given, protect_last=RECENT_WINDOW)
        np.testing.assert_allclose(curves.low, plain.low, atol=1e-6)
        assert curves.least_bin == plain.least_bin
        made = [plan(of, 0.7) for of in (measured.study_of(*given), given, curves, plain)]
        for one in made[:-1]:
            assert one.expected_loss == pytest.approx(made[-1].expected_loss, abs=1e-6)
            assert one.protect_last == RECENT_WINDOW
    assert plan(runs[0], 0.7).expected_loss == plan(runs[:1], 0.7).expected_loss
    # The layers that are suggested come of a study as of captures; what looks at single tokens does not.
    by_study, by_runs = (plan(of, 0.9, "skip_suggested").to_spec() for of in (measured.study_of(*runs), runs))
    assert by_study == by_runs
    with pytest.raises(SettingsError, match="adakv looks at single tokens"):
        plan(measured.study_of(*runs), 0.7, "adakv")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, error):
    path = save_study(study_of(np.zeros((2, 1, 1))), tmp_path / "study.safetensors")
    before = path.read_bytes()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr({"save_file": records, "fsync": os, "replace": Path}[step], step, fail)
    with pytest.raises(RecordError if isinstance(error, OSError) else KeyboardInterrupt):
        save_study(study_of(np.ones((3, 1, 1))), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def tampered(path, *, header=None, whole_header=None, arrays=None, **metadata):
    with safe_open(path, framework="numpy") as file:
        old, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new = old | {"header": json.dumps(whole_header or json.loads(old["header"]) | (header or {}))} | metadata
    save_file(tensors | (arrays or {}), path, metadata=new)


CURVES = {
    "curves": np.zeros((8, 3, 1, 1, 5), np.float32),
    "curve_status": np.zeros((8, 1, 1), np.uint8),
    "curve_gammas": np.zeros((8, 1, 1)),
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"l2kv_study": "1"}, "version 1 cannot be read"),
        ({"l2kv_study": "5"}, "version 5"),
        ({"header": {"probes": ["next token", "all queries"]}}, "shape"),
        ({"header": {"metrics": ["gamma"]}}, "shape"),
        ({"header": {"metrics": ["gamma"] * 12}}, "twice"),
        ({"header": {"metrics": [5] * 12}}, r"\$\.metrics"),
        ({"header": {"metrics": "gamma"}}, r"\$\.metrics"),
        ({"header": {"model": 5}}, r"\$\.model"),
        ({"header": {"names": ["\ud800"] * 8}}, "surrogate"),
        ({"header": {"names": ["one"]}}, "shape"),
        ({"header": {"texts": 3}}, "got 8 of 3 texts"),
        ({"header": {"texts": 10**400}}, "not a study that can be read"),
        ({"header": {"texts": 20_000}}, "1 to 10,000 texts"),
        ({"header": {"names": ["x"] * 10_001}}, "1 to 10,000 texts"),
        ({"header": {"digests": ["x"]}}, "do not fit 8 texts"),
        ({"header": {"documents": ["x"]}}, "do not fit 8 texts"),
        ({"header": {"documents": [1] * 8}}, r"\$\.documents"),
        ({"header": {"texts": "8"}}, r"\$\.texts"),
        ({"header": {"curves": [1.0]}}, "curves"),
        ({"header": {"n_tokens": [1]}, "arrays": {"extra": np.ones(2)}}, "hold extra"),
        ({"arrays": {"n_tokens": np.ones(8)}}, "type int64, got float64"),
        ({"arrays": {"status": np.full((8, 3, 12, 1, 1), 9, np.uint8)}}, "where the status is ok"),
        ({"arrays": {"values": np.full((8, 3, 12, 1, 1), np.nan)}}, "where the status is ok"),
        ({"arrays": {"values": np.zeros(3)}}, "shape"),
        ({"arrays": CURVES | {"curves": np.full((8, 3, 1, 1, 5), np.nan, np.float32)}}, "curves hold values"),
        ({"arrays": CURVES | {"curves": np.zeros((8, 3, 1, 1, 1), np.float32)}}, "none that a study can have"),
        ({"arrays": CURVES | {"curves": np.zeros((8, 2, 1, 1, 5), np.float32)}}, "shape"),
        ({"arrays": CURVES | {"curve_status": np.full((8, 1, 1), 9, np.uint8)}}, "none that a study can have"),
        ({"arrays": {"curves": CURVES["curves"]}}, "together"),
    ],
    ids=str,
)
def test_a_study_that_was_tampered_with_is_refused(tmp_path, changes, reason):
    path = save_study(study_of(np.zeros((8, 1, 1))), tmp_path / "study.safetensors")
    tampered(path, **changes)
    with pytest.raises(RecordError, match=reason):
        load_study(path)


@pytest.mark.parametrize(
    ("n", "layers", "heads"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)], ids=["no texts", "no layers", "no heads"]
)
def test_a_study_of_nothing_is_refused(tmp_path, n, layers, heads):
    with pytest.raises(ValueError, match="a study is of 1 to 10,000 texts, and of heads"):
        study_of(np.zeros((n, layers, heads)))
    path, shape = save_study(study_of(np.zeros((1, 1, 1))), tmp_path / "study.safetensors"), (n, 3, 12, layers, heads)
    header = {"names": ["x"] * n, "digests": [""] * n, "layer_kinds": ["full"] * layers, "texts": n}
    arrays = {"values": np.zeros(shape), "status": np.zeros(shape, np.uint8), "n_tokens": np.full(n, 9)}
    tampered(path, header=header, arrays=arrays)
    with pytest.raises(RecordError, match="and of heads"):
        load_study(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 99])
def test_a_foreign_file_is_refused_and_not_written_over(tmp_path, loaded, texts, content):
    path = tmp_path / "study.safetensors"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="not a study that can be read"):
        study(loaded, texts, path)
    assert path.read_bytes() == content
    with pytest.raises(RecordError, match="no file"):
        load_study(tmp_path / "none")
    save_file({"a": np.ones(3)}, path)
    with pytest.raises(RecordError, match="but not a study"):
        load_study(path)
    with pytest.raises(RecordError, match="cannot be written"):
        save_study(study_of(np.zeros((1, 1, 1))), path / "below")


def test_a_cut_file_does_not_pass_for_a_study(tmp_path):
    path = save_study(study_of(np.zeros((2, 1, 1))), tmp_path / "study.safetensors")
    content = path.read_bytes()
    for end in random.Random(0).sample(range(len(content)), 200):
        path.write_bytes(content[:end])
        with pytest.raises(RecordError):
            load_study(path)


# The command


def test_the_command_prints_a_row_per_layer_and_the_answer_and_goes_on(tmp_path, capsys):
    text, out = tmp_path / "keats.txt", tmp_path / "study.safetensors"
    text.write_text("\n".join(TEXTS.values()))
    command = ["study", str(text), "-o", str(out), "-m", "books-5m", "--tokens", "40", "--device", "cpu", "--excerpts"]
    assert main([*command, "2"]) == 0
    assert "This study cannot tell" in capsys.readouterr().out
    assert main([*command, "7"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "books-5m, 7 texts of 40 tokens" and len(told) == 4 + 6 + 2
    assert told[2].startswith("next token: ")
    done = load_study(out)
    assert done.names == tuple(f"keats {i}" for i in range(7))
    assert f"Does low norm predict attention in books-5m? {answer(done)}" in told
    assert main([*command, "7", "--probe", "last-queries"]) == 0
    by_last = capsys.readouterr().out.splitlines()
    assert by_last[2].startswith("last queries: ") and by_last[4:10] != told[4:10]
    assert f"Does low norm predict attention in books-5m? {answer(done, probe='last queries')}" in by_last
    assert main([*command, "7", "--probe", "last"]) == 2
    assert "next-token, last-queries, all-queries, got 'last'" in capsys.readouterr().err
    assert main([*command, "3"]) == 2
    assert "7 texts already" in capsys.readouterr().err


def test_the_command_prints_a_metric_of_each_layer(tmp_path, capsys):
    text, out = tmp_path / "keats.txt", tmp_path / "study.safetensors"
    text.write_text(KEATS)
    command = [
        "study",
        str(text),
        "-o",
        str(out),
        "-m",
        "books-5m",
        "--tokens",
        "40",
        "--device",
        "cpu",
        "--excerpts",
        "2",
        "--metric",
    ]
    assert main([*command, "entropy-normalised"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert METRICS["entropy_normalised"].about in told[3]
    by_head = load_study(out).of("entropy_normalised").mean(axis=0)
    columns = re.split("  +", told[4])
    assert columns[0] == "layer" and columns[-4:] == ["Normalised entropy", "lowest", "highest", "verdicts"]
    for layer, line in enumerate(told[5:11]):
        mean, heads = re.split("  +", line)[-4], by_head[layer].tolist()
        (low, least), (high, most) = re.findall(r"head (\d+): (\S+)", line)
        assert float(mean.split()[0]) == pytest.approx(sum(heads) / 8, rel=0.01)
        assert (int(low), int(high)) == (heads.index(min(heads)), heads.index(max(heads)))
        assert (float(least), float(most)) == pytest.approx((min(heads), max(heads)), rel=0.01)
    assert main([*command, "normalised_alr", "--json"]) == 0  # the mean of heads, beside the layer's own
    for layer, row in enumerate(json.loads(capsys.readouterr().out)["rows"]):
        read = load_study(out)
        assert row["layer_alr"]["value"] == pytest.approx(layer_alr(read)[:, layer].mean())
        assert row["normalised_alr"]["value"] == pytest.approx(read.of("normalised_alr")[:, layer].mean())
    assert main([*command, "entropy of it"]) == 2
    assert "'--metric': metric must be one of gamma, gamma_skip_first" in capsys.readouterr().err


def test_an_interrupted_command_keeps_what_was_done(tmp_path, capsys, monkeypatch):
    from contextlib import nullcontext

    from analysis.cli import measures as command

    text, out = tmp_path / "keats.txt", tmp_path / "study.safetensors"
    text.write_text(KEATS)

    def interrupt(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "shown", lambda unit: nullcontext(interrupt))
    assert main(["study", str(text), "-o", str(out), "-m", "books-5m", "--tokens", "40", "--excerpts", "4"]) == 130
    assert "goes on" in capsys.readouterr().err and len(load_study(out).names) == 2
