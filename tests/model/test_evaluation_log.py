"""An evaluation that is killed and resumed gives the table of an undisturbed one, to the last bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis import TextError, records
from analysis.demo import presets
from analysis.errors import RecordError
from analysis.evaluation import batches, run
from analysis.evaluation.lm import LM, LmSettings
from analysis.evaluation.log import digest_of_sample
from analysis.evaluation.passkey import PasskeySettings
from analysis.evaluation.results import FULL, Results
from analysis.evaluation.run import evaluate, samples_of
from analysis.evaluation.tasks import TASKS
from analysis.preview import prefill
from l2kv import CompressionSpec

TEXT = "\n".join(presets.bundled_texts().values())
TEXTS = [(f"text {i}", TEXT[300 * i : 300 * i + 400]) for i in range(7)]
SETTINGS = LmSettings(30, 4)
METHODS = {
    FULL: None,
    "half": CompressionSpec(protect_last=4),
    "random": CompressionSpec(0.3, policy="random", seed=3),
    "attention": CompressionSpec(0.4, policy="accumulated"),
    "half again": CompressionSpec(protect_last=4),
}


@pytest.fixture(autouse=True)
def three_rows_a_batch(monkeypatch):
    monkeypatch.setattr(batches, "TOKENS_AT_ONCE", 3 * 34)


def lm(loaded, out=None, *, methods=METHODS, settings=SETTINGS, **options) -> Results:
    return evaluate(loaded, "lm", methods, texts=TEXTS, settings=settings, out=out, **options)


@pytest.fixture(scope="module")
def undisturbed(loaded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "TOKENS_AT_ONCE", 3 * 34)
        return lm(loaded)


def test_a_file_holds_what_is_returned_with_and_without_it(loaded, undisturbed, tmp_path):
    out = tmp_path / "deep" / "rows.jsonl"
    assert lm(loaded, out) == undisturbed == records.load(Results, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 1 + 7 * 5 and lines[0]["l2kv_results"] == 2 and "rows" not in lines[0]
    assert lines[0]["run"]["threads"] == torch.get_num_threads() and lines[0]["run"]["packages"]["torch"]
    saved = records.save(undisturbed, tmp_path / "saved.jsonl")
    assert sorted(saved.read_text().splitlines()) == sorted(out.read_text().splitlines())  # one format


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked, so that torch is there at once")
def test_killed_at_random_moments_the_table_comes_out_the_same(loaded, undisturbed, tmp_path):
    fork, rng = multiprocessing.get_context("fork"), random.Random(0)
    started = time.perf_counter()
    lm(loaded, tmp_path / "timed.jsonl")
    takes = time.perf_counter() - started
    kills, halfway, table = 0, 0, 0
    while kills < 20:
        out, table, child = tmp_path / f"{table}.jsonl", table + 1, None
        while child is None or child.exitcode:
            child = fork.Process(target=lm, args=(loaded, out))
            child.start()
            child.join(rng.uniform(0.1, 0.8) * takes)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
            child.join()
            halfway += out.exists() and 1 < len(out.read_text().splitlines()) < 36
        assert records.load(Results, out) == undisturbed
        assert len(out.read_text().splitlines()) == 36  # no row twice
    assert halfway >= 10


def test_a_last_line_half_written_is_dropped_wherever_it_ends(loaded, undisturbed, tmp_path):
    whole = records.save(undisturbed, tmp_path / "whole.jsonl").read_bytes()
    header, rng = whole.index(b"\n") + 1, random.Random(1)
    for end in (header, header + 1, len(whole) - 1, *(rng.randrange(header, len(whole)) for _ in range(5))):
        out = tmp_path / f"{end}.jsonl"
        out.write_bytes(whole[:end])
        if end < len(whole) - 1:
            with pytest.raises(RecordError, match=r"of 35 are there; run a stopped evaluation again"):
                records.load(Results, out)
        assert lm(loaded, out) == undisturbed == records.load(Results, out)


def test_what_a_file_holds_is_not_computed_again(loaded, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    some = {name: METHODS[name] for name in ("half", FULL)}
    lm(loaded, out, methods=some)
    passes = []
    monkeypatch.setattr(run, "prefill", lambda *args: passes.append(args[1].shape[0]) or prefill(*args))
    seen = []
    later = lm(loaded, out, progress=lambda *call: seen.append(call[:2]))
    assert passes == [3, 3, 1]  # random and attention by one pass, for each of three batches of texts
    assert seen == sorted(seen) and (seen[0], seen[-1]) == ((3, 28), (28, 28))
    for method in METHODS:
        assert later.scores(method) == pytest.approx(undisturbed.scores(method), rel=1e-6)
    passes.clear()
    assert lm(loaded, out) == later and passes == []
    assert list(records.load(Results, out).methods) == ["half", FULL, "random", "attention", "half again"]
    assert lm(loaded, out, methods=some).methods == some and passes == []


def test_methods_added_later_are_batches_of_their_own_in_a_resumed_file_too(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "TOKENS_AT_ONCE", 16 * 34)  # all seven texts by a few specs at once
    out, some = tmp_path / "rows.jsonl", {name: METHODS[name] for name in ("half", "random")}
    lm(loaded, out, methods=some)
    added = lm(loaded, out)
    assert added.run.together == (("half", "random"), (FULL, "attention", "half again"))
    lines = out.read_text().splitlines(keepends=True)
    for n in (1, 5, 12, len(lines) - 1):  # lost: rows of the first methods, or of those added
        out.write_text("".join(lines[:n]))
        lm(loaded, out, methods=some)
        assert lm(loaded, out) == added
        assert {row.key: row for row in records.load(Results, out).rows} == {row.key: row for row in added.rows}


def test_a_file_of_another_evaluation_is_refused_and_left_as_it_is(loaded, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    lm(loaded, out)
    before = out.read_bytes()
    with pytest.raises(RecordError, match=r"another settings: new_tokens was 4, is 5"):
        lm(loaded, out, settings=LmSettings(30, 5))
    with pytest.raises(RecordError, match=r"another run: samples was 7, is 6"):
        evaluate(loaded, "lm", METHODS, texts=TEXTS[:6], settings=SETTINGS, out=out)
    with pytest.raises(RecordError, match=r"another compression 'half'"):
        lm(loaded, out, methods={"half": CompressionSpec(0.2)})
    with pytest.raises(RecordError, match=r"another model: it was books-5m, is other"):
        lm(replace(loaded, name="other"), out)
    with pytest.raises(RecordError, match=r"another task"):
        evaluate(loaded, "passkey", METHODS, settings=PasskeySettings((120,), (0.5,), 1), out=out)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(RecordError, match=r"another run: threads was 1, is 7.*Use the same"):
        lm(loaded, out)
    monkeypatch.undo()
    with pytest.raises(RecordError, match=r"another run: tokens_at_once was 102, is 16384"):
        lm(loaded, out)
    assert out.read_bytes() == before
    for text in ("", "A text of mine.\n", '{"l2kv_plan": 1}\n', "[]\n", "3\n"):
        out.write_text(text)
        with pytest.raises(RecordError):
            lm(loaded, out)
        assert out.read_text() == text  # a user's file is never written over
    with pytest.raises(RecordError, match=r"cannot be written"):
        lm(loaded, "/proc/rows.jsonl")


def test_answers_are_written_and_gone_on_with_too(loaded, tmp_path):
    out, settings = tmp_path / "rows.jsonl", PasskeySettings((120,), (0.0, 1.0), 2)
    results = evaluate(loaded, "passkey", METHODS, settings=settings, out=out)
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:9]))
    assert evaluate(loaded, "passkey", METHODS, settings=settings, out=out) == results == records.load(Results, out)


def test_keys_tell_models_tasks_samples_specs_and_batches_apart(loaded, undisturbed, monkeypatch):
    assert len({row.key for row in undisturbed.rows}) == 7 * 4  # equal specs have equal keys
    assert [row.key for row in undisturbed.of("half")] == [row.key for row in undisturbed.of("half again")]
    keys = {row.key for row in undisturbed.rows}
    monkeypatch.setattr(run, "digest_of", lambda _: "another model")
    assert not keys & {row.key for row in lm(loaded).rows}
    monkeypatch.undo()
    assert not keys & {row.key for row in lm(loaded).rows}  # other batches
    monkeypatch.setattr(batches, "TOKENS_AT_ONCE", 3 * 34)
    assert keys == {row.key for row in lm(loaded).rows}
    TASKS.register("a_toy", replace(LM, version=2))
    try:
        toy = evaluate(loaded, "a_toy", METHODS, texts=TEXTS, settings=SETTINGS)
    finally:
        TASKS.remove("a_toy")
    assert not keys & {row.key for row in toy.rows}
    sample = samples_of(loaded, "lm", texts=TEXTS, settings=SETTINGS)[0][0]
    others = [
        replace(sample, name="b"),
        replace(sample, context=sample.context[1:]),
        replace(sample, question=sample.target[:1]),
        replace(sample, answer="b"),
        replace(sample, at={"depth": 0.5}),
        replace(sample, context=sample.context[:-1], question=np.concatenate([sample.context[-1:], sample.question])),
    ]
    assert len({digest_of_sample(one) for one in (sample, *others)}) == 1 + len(others)


def test_a_cancelled_evaluation_keeps_its_rows(loaded, undisturbed, tmp_path):
    out = tmp_path / "rows.jsonl"

    def stop(done, total, what):
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm(loaded, out, progress=stop)
    assert len(out.read_text().splitlines()) > 10
    with pytest.raises(TextError):
        evaluate(loaded, "lm", METHODS, texts=[("a", "Too short.")], out=out)
    assert lm(loaded, out) == undisturbed
