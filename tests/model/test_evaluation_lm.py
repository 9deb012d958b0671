"""Prediction by position against the masked forward pass and a slow loop; perplexity by hand; tokens counted."""

import json
import math
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis import TextError, records
from analysis.__main__ import main
from analysis.demo import presets
from analysis.errors import SettingsError
from analysis.evaluation.lm import LmSettings
from analysis.evaluation.passkey import PasskeySettings
from analysis.evaluation.results import FULL, LIVE, ONCE, Results, Row
from analysis.evaluation.run import evaluate, samples_of
from analysis.evaluation.tasks import TASKS
from analysis.evaluation.work import estimate, work_of
from analysis.texts.tokens import tokenize
from l2kv import CompressionSpec
from tests.support.oracle import masked_forward

TEXT = presets.bundled_texts()["The Tomb of Keats (Oscar Wilde, 1877)"]
TEXTS = [("a", TEXT[:500]), ("b", TEXT[600:1100])]
TASKS_TO_RUN = [
    ("lm", LmSettings(20, 4)),
    ("lm", LmSettings(chunk_size=9)),
    ("passkey", PasskeySettings((120, 160), (0.5,), 2)),
]
PAPERS = CompressionSpec(0.9, prune_after=20, schedule="reference", skip_layers=(0, 1))


def surprise(logits, token):
    """-ln of the probability of a token, in plain Python floats."""
    row = [float(x) for x in logits]
    top = max(row)
    return math.log(sum(math.exp(x - top) for x in row)) + top - row[token]


@pytest.mark.parametrize("spec", [None, CompressionSpec(0.4, protect_last=6), CompressionSpec(0.3, skip_layers=(1, 2))])
@pytest.mark.parametrize("settings", [LmSettings(40, 20), LmSettings(chunk_size=60)])
def test_nll_and_hits_by_position_are_those_of_a_pass_with_the_evicted_tokens_masked(loaded, spec, settings):
    first = 1 if settings.chunk_size else 40
    chunks = [1] * 59 if settings.chunk_size else [39, *[1] * 20]
    results = evaluate(loaded, "lm", {"it": spec}, texts=TEXTS, settings=settings)
    assert results.positions.tolist() == list(range(first, 60))
    for (_, text), nats, hits, row in zip(TEXTS, results.nats("it"), results.hits("it"), results.of("it"), strict=True):
        ids = torch.from_numpy(tokenize(loaded.tokenizer, text).ids[:60])[None]
        logits = masked_forward(loaded.model, ids[:, :-1], chunks, spec or CompressionSpec(1.0))[0][0]
        expected = [surprise(logits[i - 1], int(ids[0, i])) for i in range(first, 60)]
        assert nats.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert row.score == pytest.approx(statistics.fmean(expected), rel=1e-4)
        likeliest = [max(range(logits.shape[1]), key=logits[i - 1].tolist().__getitem__) for i in range(first, 60)]
        assert hits.tolist() == [token == int(ids[0, first + i]) for i, token in enumerate(likeliest)]
        assert row.compressed == ("" if spec is None else LIVE if settings.chunk_size else ONCE)


def test_a_chunk_is_what_the_papers_loop_makes_of_it(loaded):
    """Token by token from the first on, and after each the cache of a layer cut to a share of what it holds."""
    (row,) = evaluate(loaded, "lm", {"it": PAPERS}, texts=TEXTS[:1], settings=LmSettings(chunk_size=50)).rows
    ids = torch.from_numpy(tokenize(loaded.tokenizer, TEXTS[0][1]).ids[:50])[None]
    logits, kept = masked_forward(loaded.model, ids[:, :-1], [1] * 49, PAPERS)
    expected = [surprise(logits[0, i - 1], int(ids[0, i])) for i in range(1, 50)]
    assert row.nats == pytest.approx(expected, rel=1e-3, abs=1e-4)
    held = 0
    for _ in range(49):
        held += 1
        held = held if held < 20 else math.ceil(round(0.9 * held, 9))
    assert {len(head) for layer in kept[2:] for head in layer[0]} == {held} and held < 20
    assert row.nbytes == (2 * 49 + 4 * held) * 4 * 2 * 32 * 4  # 6 layers, two skipped; 4 heads, 2 x 32 float32
    assert (row.context, row.decoded) == (0, 49)


def made(nats, hits=None, *, methods=None):
    """Results of nats/token [method][sample][T], after a prompt of 10."""
    methods = methods or {FULL: None, "half": CompressionSpec()}
    rows = tuple(
        Row(
            name, f"s{i}", statistics.fmean(one), 64, context=9, decoded=len(one), nats=tuple(one),
            hits=tuple(hits[k][i]) if hits else (0,) * len(one),
        )
        for k, name in enumerate(methods)
        for i, one in enumerate(nats[k])
    )  # fmt: skip
    return Results("m", "", "lm", {}, methods, rows)


def test_perplexity_and_its_ratio_are_worked_out_by_hand():
    ln = math.log
    results = made(
        [[[ln(2), ln(8)], [ln(4), ln(4)]], [[ln(4), ln(16)], [ln(8), ln(2)]]],
        [[[1, 0], [1, 1]], [[0, 0], [1, 0]]],
    )
    full, half = results.summary(TASKS["lm"])
    assert full["perplexity"].value == pytest.approx(4) and half["perplexity"].value == pytest.approx(32**0.5)
    assert full["perplexity_ratio"].value == 1 and half["perplexity_ratio"].value == pytest.approx(
        2**0.5
    )  # doubled for one text of two
    assert half["change"].value == pytest.approx(ln(2) / 2)
    assert (full["accuracy"].value, half["accuracy"].value) == (0.75, 0.25)
    assert results.positions.tolist() == [10, 11]
    at = {(row["method"], row["position"]): row for row in results.by_position()}
    assert at[FULL, 10]["perplexity"].value == pytest.approx(8**0.5) and at[FULL, 10]["accuracy"].value == 1
    assert at["half", 10]["nll"].value == pytest.approx(ln(32) / 2)
    assert at["half", 11]["change"].value == pytest.approx(0, abs=1e-12)  # twice one text's, half the other's
    (of_full, of_half) = results.by_position(width=5)
    assert of_full["nll"].value == pytest.approx(ln(4)) and of_half["position"] == 10
    three = made([[[1.0, 2, 6], [3, 4, 8]]], methods={FULL: None}).by_position(width=2)
    assert [(row["position"], row["nll"].value) for row in three] == [(10, 2.5), (12, 7)]
    with pytest.raises(SettingsError, match="width must be 1"):
        results.by_position(width=0)


def test_where_nothing_is_predicted_or_not_at_the_same_positions_there_is_no_curve():
    rows = (Row("a", "x", 1.0, 0, context=9, decoded=1, nats=(1.0,), hits=(1,)),)
    longer = replace(rows[0], sample="y", context=10)
    for some in ((Row("a", "x", 1.0, 0),), (*rows, longer)):
        with pytest.raises(SettingsError, match="no NLL by position"):
            Results("m", "", "lm", {}, {"a": None}, some).by_position()
    undefined = replace(rows[0], nats=(None,), score=None)
    assert np.isnan(Results("m", "", "lm", {}, {"a": None}, (undefined,)).nats("a")).all()
    assert "perplexity" not in Results("m", "", "p", {}, {"a": None}, (Row("a", "x", 0.3, 0),)).summary(TASKS["lm"])[0]


def test_flat_rows_and_data_frames_hold_what_a_cell_is(loaded, tmp_path):
    methods = {FULL: None, "random": CompressionSpec(policy="random", seed=5)}
    results = evaluate(loaded, "lm", methods, texts=TEXTS, settings=LmSettings(20, 3))
    frame = results.frame()
    assert len(frame) == 4 and frame.groupby("method").size().to_dict() == {FULL: 2, "random": 2}
    last = frame.iloc[-1]
    assert (last["model"], last["sample"], last["seed"], last["compressed"]) == ("books-5m", "b", 5, ONCE)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    assert (tmp_path / "rows.csv").read_text().count("\n") == 5


def test_without_a_text_the_bundled_ones_are_spread_over(loaded):
    results = evaluate(loaded, "lm", {FULL: None}, settings=LmSettings(40, 3))
    assert set(results.documents) == set(presets.bundled_prose()) and len(results.samples) == 16
    assert results.notes == () and results.settings["prompt_tokens"] == 40
    short = evaluate(loaded, "lm", {FULL: None}, settings=LmSettings(5000, 3))
    shortest = min(len(tokenize(loaded.tokenizer, text)) for text in presets.bundled_prose().values())
    assert short.settings["prompt_tokens"] + 3 + 8 == shortest and "bundled texts are short" in short.notes[0]
    assert LmSettings(chunk_size=3000).within(400).n_tokens == 400 == LmSettings(3000, 5).within(400).n_tokens
    assert LmSettings(30, 5).within(400) == LmSettings(30, 5)
    for wrong in (1, -5):
        with pytest.raises(SettingsError, match="chunk_size must be 2"):
            LmSettings(chunk_size=wrong)


def test_past_the_trained_length_rotary_models_are_warned_of_and_others_refused(loaded, monkeypatch):
    monkeypatch.setattr(loaded.config, "max_position_embeddings", 32)
    results = evaluate(loaded, "lm", {FULL: None}, texts=TEXTS, settings=LmSettings(30, 10))
    assert len(results.notes) == 1 and "beyond the 32 that books-5m was trained on" in results.notes[0]
    assert results.positions[-1] == 39 and np.isfinite(results.nats(FULL)).all()
    assert evaluate(loaded, "lm", {FULL: None}, texts=TEXTS, settings=LmSettings(20, 5)).notes == ()
    monkeypatch.setattr(loaded.config, "rope_parameters", None)
    with pytest.raises(TextError, match="has positions for"):
        evaluate(loaded, "lm", {FULL: None}, texts=TEXTS, settings=LmSettings(30, 10))


# ---------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("task,settings", TASKS_TO_RUN)
def test_tokens_are_counted_as_they_are_run(loaded, task, settings):
    methods = {
        FULL: None,
        "a": CompressionSpec(),
        "again": CompressionSpec(),
        "seen": CompressionSpec(policy="accumulated"),
    }
    texts = TEXTS if task == "lm" else None
    ran = {"context": 0, "after": 0}

    def counted(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen = kwargs["past_key_values"].get_seq_length()
        live = getattr(settings, "chunk_size", 0)
        ran["context" if seen == 0 and not live else "after"] += ids.numel()

    hook = loaded.model.base_model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        results = evaluate(loaded, task, methods, texts=texts, settings=settings)
    finally:
        hook.remove()
    work = results.work()
    assert (work.prefilled, work.decoded) == (ran["context"], ran["after"])
    context = sum(row.context for row in results.of(FULL))
    assert work.saved == 2 * context and work.prefilled == context  # one pass for three specs
    most = work_of(samples_of(loaded, task, texts=texts, settings=settings)[0], methods)
    assert (most.prefilled, most.saved) == (work.prefilled, work.saved) and most.decoded >= work.decoded
    assert task == "passkey" or most == work


@pytest.mark.parametrize("task,settings", TASKS_TO_RUN)
def test_an_estimate_is_made_of_what_was_timed(loaded, monkeypatch, task, settings):
    clock = iter(range(1000))
    monkeypatch.setattr("analysis.evaluation.work.perf_counter", lambda: next(clock))  # each second ticks once
    methods = {FULL: None, "a": CompressionSpec(), "b": CompressionSpec(0.2)}
    texts = TEXTS if task == "lm" else None
    found = estimate(loaded, task, methods, texts=texts, settings=settings)
    samples = samples_of(loaded, task, texts=texts, settings=settings)[0]
    rows = 2 * 3  # two texts, or two keys at each length, by three methods as one batch
    assert found.decode_rate == pytest.approx(3 * rows)  # three steps a second, of all rows
    assert (found.prefill_rate > 0) == (not getattr(settings, "chunk_size", 0))
    steps = 3 * sum(len(sample.target) or sample.new_tokens for sample in samples) / rows
    prefilled = found.work.prefilled / found.prefill_rate if found.prefill_rate else 0
    assert found.seconds == pytest.approx(steps / 3 + prefilled)
    assert estimate(loaded, task, {}, texts=texts, settings=settings).seconds == 0
    assert loaded.model.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------------------------- command line


def test_the_quick_form_of_the_papers_readme_works_and_continues(capsys, tmp_path):
    quick = ["evaluate", "lm", "--model-id", "books-5m", "--chunk-size", "60", "--keep-ratio", "0.9"]
    quick += ["--prune-after", "20", "--skip-layers", "0,1", "--protect-last", "0", "--policies", "low_norm"]
    quick += ["--output-dir", str(tmp_path / "out")]
    assert main(quick) == 0
    told = capsys.readouterr()
    assert "compressed: live from the first token" in told.out and "perplexity ratio" in told.out
    assert re.search(r"about \d+ s: at most [\d,]+ tokens one by one", told.err)
    results = records.load(Results, tmp_path / "out" / "lm.jsonl")
    assert results.methods["low_norm 0.9"] == PAPERS and results.settings["chunk_size"] == 60
    assert set(results.documents) == set(presets.bundled_prose())
    assert main([*quick, "--by-position", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["position"] for row in told["rows"] if row["method"] == FULL] == [1, 21, 41]
    assert told["work"]["decoded"] == sum(row["decoded"] for row in told["results"])
    assert main([*quick, "--schedule", "seen"]) == 2
    assert "another compression 'random 0.9'" in capsys.readouterr().err
    assert main([*quick, "--schedule", "never"]) == 2 and "schedule must be one of" in capsys.readouterr().err
    assert main(["evaluate", "passkey", "--by-position", "5"]) == 2 and "No such option" in capsys.readouterr().err


def test_without_a_chunk_the_schedule_is_of_the_tokens_seen(tmp_path):
    out = tmp_path / "rows.jsonl"
    once = ["evaluate", "lm", "-m", "books-5m", "--prompt-tokens", "30", "--new-tokens", "3", "-o", str(out)]
    assert main([*once, "--keep-ratios", "0.5", "--policies", "low_norm"]) == 0
    results = records.load_any([Results], out)
    assert results.methods["low_norm 0.5"].schedule == "seen" and results.of("low_norm 0.5")[0].compressed == ONCE
