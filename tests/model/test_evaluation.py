"""Evaluations against slow loops and the masked forward pass; passkeys on a model that only reads; presets found."""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis import TextError, records
from analysis.__main__ import main
from analysis.demo import finding, presets
from analysis.demo.finding import BREAKS_SPEC, CALM_SPEC, Criteria, find_presets
from analysis.demo.presets import FoundPresets, Preset
from analysis.demo.questions import SEARCHES, NotFoundError, Question, Search, find_task_presets
from analysis.errors import RecordError, SettingsError
from analysis.evaluation import batches, run
from analysis.evaluation.benchmarks import NeedleSettings, RulerSettings
from analysis.evaluation.lm import LmSettings
from analysis.evaluation.needle import Needle
from analysis.evaluation.passkey import (
    FILLER,
    PASSKEY,
    PasskeySettings,
    passkey_prompt,
    passkey_sample,
    passkey_sentence,
    passkey_text,
    passkeys,
)
from analysis.evaluation.prompts import found
from analysis.evaluation.results import FULL, Results, Row
from analysis.evaluation.run import evaluate, measure
from analysis.evaluation.task import Scoring
from analysis.evaluation.tasks import TASKS
from analysis.models.load import BUNDLED_MODELS, LoadedModel
from analysis.preview import prefill
from analysis.texts.excerpts import Excerpt, excerpts_from
from analysis.texts.tokens import passages, tokenize
from analysis.timelines import Timeline
from l2kv import CompressionSpec
from tests.support.evaluation import continuation_nll
from tests.support.models import build
from tests.support.oracle import masked_forward

TEXT = presets.bundled_texts()["The Tomb of Keats (Oscar Wilde, 1877)"]


def surprise(logits, token):
    """-ln of the probability of a token, in plain Python floats."""
    row = [float(x) for x in logits]
    top = max(row)
    return math.log(sum(math.exp(x - top) for x in row)) + top - row[token]


# --------------------------------------------------------------------------------------------------------- prediction


def test_with_the_whole_cache_the_continuation_is_plain_prediction(loaded):
    ids = tokenize(loaded.tokenizer, TEXT).ids[:70]
    with torch.no_grad():
        logits = loaded.model(torch.from_numpy(ids)[None]).logits[0]
    expected = sum(surprise(logits[i - 1], ids[i]) for i in range(50, 70)) / 20
    for spec in (None, CompressionSpec(keep_ratio=1.0)):
        assert continuation_nll(loaded, TEXT, spec, prompt_tokens=50, new_tokens=20) == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.parametrize(
    "spec",
    [
        CompressionSpec(keep_ratio=0.5),
        CompressionSpec(keep_ratio=0.5, protect_last=8),
        CompressionSpec(keep_ratio=0.3, policy="high_norm", skip_layers=(1, 2)),
    ],
)
def test_a_compressed_continuation_is_that_of_a_pass_with_the_evicted_tokens_masked(loaded, spec):
    ids = torch.from_numpy(tokenize(loaded.tokenizer, TEXT).ids[:60])[None]
    logits, _ = masked_forward(loaded.model, ids[:, :-1], (39, *[1] * 20), spec)
    expected = sum(surprise(logits[0, i - 1], int(ids[0, i])) for i in range(40, 60)) / 20
    value = continuation_nll(loaded, TEXT, spec, prompt_tokens=40, new_tokens=20)
    assert value == pytest.approx(expected, rel=1e-4)
    assert abs(value - continuation_nll(loaded, TEXT, None, prompt_tokens=40, new_tokens=20)) > 1e-3


def lm(loaded, texts, methods, *, prompt_tokens=30, new_tokens=4, progress=lambda *_: None) -> Results:
    named = [(str(i), text) for i, text in enumerate(texts)]
    settings = LmSettings(prompt_tokens, new_tokens)
    return evaluate(loaded, "lm", methods, texts=named, settings=settings, progress=progress)


@pytest.mark.parametrize("policy", ["low_norm", "accumulated", "signed_norm", "fastgen"])
def test_a_text_among_others_is_continued_as_if_alone_however_they_are_batched(loaded, monkeypatch, policy):
    texts, directions = [TEXT[:400], TEXT[400:900], TEXT[900:1400]], (("low", "high", "high", "low"),) * 6
    needs = {"directions": directions} if policy == "signed_norm" else {}
    spec = CompressionSpec(0.4, protect_last=4, policy=policy, **needs)
    methods = {"whole": None, "some": spec}
    together = lm(loaded, texts, methods)
    monkeypatch.setattr(batches, "TOKENS_AT_ONCE", 2 * 34)  # two rows, and then the third
    in_two = lm(loaded, texts, methods)
    for name, spec in methods.items():
        for text, one, other in zip(texts, together.of(name), in_two.of(name), strict=True):
            alone = continuation_nll(loaded, text, spec, prompt_tokens=30, new_tokens=4)
            assert (one.score, other.score) == pytest.approx((alone, alone), rel=1e-5)
        # The prompt has 30 tokens; 12 is 0.4 of them. 6 layers, 4 heads, 2 x 32 float32.
        held = {row.nbytes for row in (*together.of(name), *in_two.of(name))}
        assert held == {(30 if spec is None else 12) * 6 * 4 * 2 * 32 * 4}


def test_texts_of_other_lengths_are_batches_of_their_own(loaded):
    short, long = TEXT[:400], TEXT[400:1000]
    samples = [
        run.TASKS["lm"].build(loaded, LmSettings(prompt, 3), [Excerpt(name, text)])[0]
        for name, prompt, text in (("a", 20, short), ("b", 20, long), ("c", 30, short), ("d", 20, short))
    ]
    assert [len(batch) for batch in batches.batches(samples)] == [2, 1, 1]
    rows = measure(loaded, samples, {"half": CompressionSpec()})
    for row, (prompt, text) in zip(rows, ((20, short), (20, long), (30, short), (20, short)), strict=True):
        alone = continuation_nll(loaded, text, CompressionSpec(), prompt_tokens=prompt, new_tokens=3)
        assert row.score == pytest.approx(alone, rel=1e-5)


def test_a_context_is_run_once_for_all_specs_and_equal_specs_once(loaded, monkeypatch):
    passes = []
    monkeypatch.setattr(run, "prefill", lambda *args: passes.append(args[1].shape) or prefill(*args))
    seen = []
    methods = {"a": CompressionSpec(), FULL: None, "same": CompressionSpec(), "b": CompressionSpec(0.2)}
    found = lm(loaded, [TEXT[:400], TEXT[400:900]], methods, progress=lambda *call: seen.append(call))
    assert passes == [(2, 29)] and seen[-1] == (6, 6, "scores")  # two texts by three specs
    assert [row.score for row in found.of("a")] == [row.score for row in found.of("same")]
    assert list(found.methods) == ["a", FULL, "same", "b"] and len(found.rows) == 8


def test_changes_are_differences_to_the_full_cache_text_by_text(loaded):
    texts, specs = [TEXT[:400], TEXT[400:900]], {"half": CompressionSpec(), "all": CompressionSpec(keep_ratio=1.0)}
    seen = []
    results = lm(loaded, texts, {FULL: None, **specs}, new_tokens=5, progress=lambda *call: seen.append(call[:2]))
    assert results.full == FULL and list(dict.fromkeys(seen)) == [(0, 6), (6, 6)]
    half = results.change("half")
    for i, text in enumerate(texts):
        nll = [continuation_nll(loaded, text, s, prompt_tokens=30, new_tokens=5) for s in (CompressionSpec(), None)]
        assert half[i] == pytest.approx(nll[0] - nll[1], abs=1e-6)
    assert results.interval(half).value == pytest.approx(sum(half) / 2)
    assert results.change("all").tolist() == pytest.approx([0, 0], abs=1e-5)
    with pytest.raises(SettingsError, match="lack the full cache"):
        lm(loaded, texts[:1], {"half": CompressionSpec()}).change("half")


def test_bad_requests_are_refused_and_leave_the_model_as_it_was(loaded):
    with pytest.raises(TextError, match=r"^it: the text has .* tokens; 4000 are needed for the prompt, 3 after"):
        continuation_nll(loaded, TEXT, None, prompt_tokens=4000, new_tokens=3)
    with pytest.raises(ValueError, match="prompt_tokens must be 2"):
        continuation_nll(loaded, TEXT, None, prompt_tokens=1, new_tokens=3)
    with pytest.raises(ValueError, match="layer 9"):
        continuation_nll(loaded, TEXT, CompressionSpec(skip_layers=(9,)), prompt_tokens=20, new_tokens=3)
    foreign = LoadedModel(build("llama"), loaded.tokenizer, "foreign")  # of 160 tokens
    with pytest.raises(TextError, match="do not belong together"):
        continuation_nll(foreign, TEXT, None, prompt_tokens=20, new_tokens=3)
    with pytest.raises(TextError, match="do not belong together"):
        evaluate(foreign, "passkey", {"full": None}, settings=PasskeySettings((200,), (0.5,), 1))
    with pytest.raises(SettingsError, match="Did you mean 'passkey'"):
        evaluate(loaded, "passkeys", {})
    with pytest.raises(SettingsError, match="must be LmSettings"):
        evaluate(loaded, "lm", {"full": None}, texts=[("a", TEXT)], settings=PasskeySettings())
    with pytest.raises(TextError, match="no texts"):
        evaluate(loaded, "lm", {"full": None}, texts=())
    with pytest.raises(SettingsError, match="two samples have the same name"):
        evaluate(loaded, "lm", {"full": None}, texts=[("a", TEXT), ("a", TEXT)], settings=LmSettings(20, 3))
    assert loaded.model.config._attn_implementation == "sdpa"


def test_a_batch_can_be_cancelled_at_every_layer_of_each_of_its_passes(loaded):
    calls = []
    texts, methods = [TEXT[:400], TEXT[400:900]], {"some": CompressionSpec(), FULL: None}
    lm(loaded, texts, methods, new_tokens=3, progress=lambda *call: calls.append(call[:2]))
    # Both texts, and both methods, are one batch: 6 layers read it, 2 caches are made of that, 3 tokens are predicted.
    assert calls == [(0, 4)] * (6 + 2 + 3 * 6) + [(4, 4)]

    class Cancelled(Exception):
        pass

    def stop(done, total, what):
        raise Cancelled

    with pytest.raises(Cancelled):
        lm(loaded, texts, {FULL: None}, progress=stop)
    assert loaded.model.config._attn_implementation == "sdpa"


# ----------------------------------------------------------------------------------------------------------- passkeys


@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("n_tokens", [110, 300, 500])
def test_a_passkey_prompt_has_the_length_and_the_depth_asked_for(loaded, n_tokens, depth):
    text = passkey_text(loaded.tokenizer, 40302, n_tokens=n_tokens, depth=depth)
    filler = len(loaded.tokenizer(f" {FILLER}", add_special_tokens=False).input_ids)
    assert n_tokens - filler < len(tokenize(loaded.tokenizer, text)) <= n_tokens
    before, after = text.split(passkey_sentence(40302))
    before, after = before.count(FILLER), after.count(FILLER)
    assert abs(before - depth * (before + after)) <= 0.5
    prompt = passkey_sample(loaded.tokenizer, 40302, n_tokens=n_tokens, depth=depth)
    decoded = [loaded.tokenizer.decode(part, skip_special_tokens=True) for part in (prompt.context, prompt.question)]
    assert decoded[1] == " What is the pass key? The pass key is" and "".join(decoded) == text
    assert len(prompt.context) + len(prompt.question) <= n_tokens


def test_a_passkey_prompt_that_cannot_be_is_refused(loaded):
    with pytest.raises(TextError, match=r"takes .* tokens without any filler, more than the 30"):
        passkey_sample(loaded.tokenizer, 40302, n_tokens=30, depth=0)
    with pytest.raises(ValueError, match="depth must be from 0 to 1"):
        passkey_sample(loaded.tokenizer, 40302, n_tokens=300, depth=1.5)


def test_keys_have_five_digits_and_come_again():
    assert len(set(passkeys(20))) == 20 and all(10_000 <= key <= 99_999 for key in passkeys(20))
    assert passkeys(5) == passkeys(5) != passkeys(5, seed=1)


@pytest.fixture
def answering(loaded, monkeypatch):
    """In place of the model, `answer(context, question, spec)` gives the text that is said, token by token."""

    def install(answer):
        def decode_one_token(model, ids, cache):
            if "answers" not in cache:
                rows = zip(cache["rows"], ids.tolist(), strict=True)
                texts = [answer(sample.context.tolist(), asked, spec) for (spec, sample), asked in rows]
                cache["answers"] = [iter(loaded.tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
            return torch.tensor([[next(one, loaded.tokenizer.eos_token_id)] for one in cache["answers"]])

        monkeypatch.setattr(run, "prepared", lambda _: nullcontext())
        monkeypatch.setattr(run, "prefilled", lambda loaded, of_pass: lambda spec: spec)
        monkeypatch.setattr(run, "joined", lambda loaded, cells, caches: {"rows": cells.rows()})
        monkeypatch.setattr(run, "decode_one_token", decode_one_token)
        monkeypatch.setattr(run, "cache_nbytes", lambda cache, slack=True: 0)

    return install


@pytest.fixture
def reader(loaded, answering):
    """A stand-in for a model that finds every key which its cache still holds, and says it."""

    def install(says=" {key}."):
        def answer(context, question, spec):  # keeps the latest tokens, so that what is told early is lost first
            assert loaded.tokenizer.decode(question) == " What is the pass key? The pass key is"
            held = context[-math.ceil(spec.keep_ratio * len(context)) :] if spec else context
            told = re.findall(r"(\d{5}) is the pass key", loaded.tokenizer.decode(held))
            return says.format(key=told[0]) if told else " lost"

        answering(answer)

    return install


def test_a_key_is_found_as_long_as_the_cache_holds_it(loaded, reader):
    reader()
    seen = []
    methods = {"full": None, "half": CompressionSpec(keep_ratio=0.5), "little": CompressionSpec(keep_ratio=0.01)}
    settings = PasskeySettings(lengths=(300, 500), depths=(0.0, 1.0), keys=3)
    results = evaluate(loaded, "passkey", methods, settings=settings, progress=lambda *call: seen.append(call[:2]))
    assert len(results.rows) == 36 and list(dict.fromkeys(seen)) == [(0, 36), (18, 36), (36, 36)]  # by length
    found = {name: results.scores_by(name, "n_tokens", "depth") for name in methods}
    assert all(len(scores) == 3 for grid in found.values() for scores in grid.values())
    for length in (300, 500):
        assert [found["full"][length, depth].sum() for depth in (0.0, 1.0)] == [3, 3]
        assert [found["half"][length, depth].sum() for depth in (0.0, 1.0)] == [0, 3]
    assert found["little"][300, 1.0].sum() == 0  # 3 tokens do not hold the sentence
    by_length = results.scores_by("half", "n_tokens")
    assert list(by_length) == [(300,), (500,)] and [scores.mean() for scores in by_length.values()] == [0.5, 0.5]
    assert {row.text for row in results.of("little")} == {" lost"[: len(row.text)] for row in results.of("little")}


@pytest.mark.parametrize(
    "says,right",
    [(" {key}.", True), ("{key}", True), ("\n {key}", True), (" the {key}", True), (" 1{key}", False), (" ", False)],
)
def test_a_key_counts_where_it_is_the_first_number(loaded, reader, says, right):
    reader(says=says)
    sample = passkey_sample(loaded.tokenizer, 53128, n_tokens=200, depth=0.5)
    (row,) = measure(loaded, [sample], {"full": None}, scoring=PASSKEY.scoring)
    assert row.score == right == found(sample.answer, row.text)  # as a preset and the page Generate have it
    assert row.at == {"n_tokens": 200, "depth": 0.5}


def test_passkeys_run_on_a_real_model_and_stop_when_told_to(loaded):
    policies = ("low_norm", "random", "accumulated")  # the last is measured as the model reads: a pass of its own
    specs = {policy: CompressionSpec(policy=policy, protect_last=8) for policy in policies}

    def stop(done, total, what):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, "passkey", specs, settings=PasskeySettings((120,), (0.5,), 1), progress=stop)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "spec", [None, CompressionSpec(keep_ratio=0.3), CompressionSpec(keep_ratio=0.4, policy="high_norm", protect_last=6)]
)
def test_the_answer_is_what_a_pass_with_the_evicted_tokens_masked_would_say(loaded, spec):
    sample = passkey_sample(loaded.tokenizer, 53128, n_tokens=150, depth=0.5)
    context, question = len(sample.context), len(sample.question)
    ids = torch.from_numpy(np.concatenate([sample.context, sample.question]))[None]
    for step in range(5):  # the question is asked after compression, in one pass, and then token by token
        chunks = (context, question, *[1] * step)
        logits, _ = masked_forward(loaded.model, ids, chunks, spec or CompressionSpec(keep_ratio=1.0))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    said = loaded.tokenizer.decode(ids[0, context + question :]).strip()
    assert len(said) >= 4
    samples = [replace(sample, name="right", answer=said), replace(sample, name="wrong", answer=said[:-1] + "#")]
    right, wrong = measure(loaded, samples, {"it": spec}, scoring=PASSKEY.scoring)
    assert (right.score, wrong.score) == (1, 0) and right.text.strip() == said
    pairs = context + question if spec is None else math.ceil(spec.keep_ratio * (context + question))
    assert right.nbytes == pairs * 6 * 4 * 2 * 32 * 4  # after the question, however long the answer is


@pytest.mark.parametrize(
    "spec", [None, CompressionSpec(0.4, protect_last=6), CompressionSpec(0.5, policy="accumulated")]
)
def test_answers_that_are_generated_together_are_those_of_each_alone_each_to_its_own_end(loaded, spec):
    whole = [passkey_sample(loaded.tokenizer, key, n_tokens=150, depth=0.5) for key in passkeys(4)]
    length = min(len(one.context) for one in whole)
    samples = [  # of one length, and to be ended after 2, 5, 8 and 11 characters
        replace(one, name=str(i), context=one.context[:length], new_tokens=9, answer="x" * (2 + 3 * i))
        for i, one in enumerate(whole)
    ]
    scoring = Scoring(lambda sample, text: float(len(text)), lambda sample, text: len(text) >= len(sample.answer))
    assert [len(batch) for batch in batches.batches(samples)] == [4]
    together = measure(loaded, samples, {"it": spec}, scoring=scoring)
    assert together == tuple(measure(loaded, [one], {"it": spec}, scoring=scoring)[0] for one in samples)
    assert len({row.decoded for row in together}) > 1


def test_every_task_is_registered_with_what_is_shown_of_it():
    for name, task in TASKS.items():
        assert task.title and task.about.endswith(".") and task.unit and name == name.lower()
        assert task.settings() == task.settings()  # all have defaults


@pytest.mark.parametrize(
    "task,settings",
    [
        ("ruler", RulerSettings(tasks=("niah_single_1", "niah_multikey_1"), lengths=(400,), samples=2)),
        ("needle", NeedleSettings(lengths=(400,), depths=(0, 1), samples=2)),
    ],
)
def test_a_benchmark_is_scored_by_its_own_rule_on_what_the_model_says(loaded, answering, task, settings):
    samples = TASKS[task].build(loaded, settings, [])
    known = {tuple(sample.context.tolist()): sample.example for sample in samples}

    def answer(context, question, spec):
        return " It is " + ", ".join(known[tuple(context)].references) if spec is None else " I do not know"

    answering(answer)
    results = evaluate(loaded, task, {FULL: None, "half": CompressionSpec()}, settings=settings)
    assert len(results.samples) == len(known) == 4
    assert (results.scores(FULL) == 100).all() and (results.scores("half") == 0).all()
    assert {row.at["task"] for row in results.rows} == {sample.example.task for sample in samples}
    rows = results.summary(TASKS[task])
    full, half = rows[0]["score"], rows[-1]["score"]
    assert (full.value, full.high, half.value, half.low) == (100, 100, 0, 0)
    assert rows[-1]["change"].value == -100 and (0 < half.high < 100) == TASKS[task].share
    for sample in samples:  # the question comes after what is compressed
        assert sample.example.question.strip() in loaded.tokenizer.decode(sample.question)


def test_a_task_of_a_file_needs_one(loaded):
    for task in ("longbench", "longbench2", "frame"):
        with pytest.raises(SettingsError, match="give its path"):
            evaluate(loaded, task, {FULL: None})


def test_rulers_own_file_is_run_instead_of_examples_that_are_made(loaded, answering, tmp_path):
    answering(lambda context, question, spec: " 48213 ")
    line = {
        "input": "The special magic number is 48213.\nWhat is the special magic number mentioned in the provided text?",
        "outputs": ["48213"],
        "answer_prefix": " The number is",
    }
    path = tmp_path / "niah_single_1" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'outputs': ['77777']})}\n")
    settings = RulerSettings(path=str(path))
    results = evaluate(loaded, "ruler", {FULL: None}, settings=settings)
    assert results.scores(FULL).tolist() == [100, 0]
    (row,) = results.summary(TASKS["ruler"])  # a file says no length: the task is the only axis
    assert (row["task"], row["samples"], row["score"].value) == ("niah_single_1", 2, 50) and "n_tokens" not in row
    with pytest.raises(SettingsError, match="give its path or texts"):
        evaluate(loaded, "ruler", {FULL: None}, settings=settings, texts={"a": TEXT})


def test_a_haystack_is_made_of_the_texts_that_are_given(loaded):
    settings = NeedleSettings(lengths=(200,), depths=(0.5,), samples=1)
    texts = excerpts_from({"a": "Only grass. " * 99, "b": "And hay. " * 99})
    (sample,) = TASKS["needle"].build(loaded, settings, texts)
    said = loaded.tokenizer.decode(sample.context, skip_special_tokens=True).replace(Needle().text, "")
    assert set(re.findall(r"\w+", said)) <= {"Only", "grass", "And", "hay"}


def test_texts_that_a_task_does_not_take_and_settings_that_leave_no_samples_are_refused(loaded):
    with pytest.raises(TextError, match="The task passkey takes no texts, got 1"):
        evaluate(loaded, "passkey", {FULL: None}, texts=[("a", TEXT)])
    with pytest.raises(TextError, match="The task passkey has no samples"):
        evaluate(loaded, "passkey", {FULL: None}, settings=PasskeySettings(lengths=()))


# ------------------------------------------------------------------------------------------------------------ results


def test_results_are_read_back_as_they_were_written_and_flat_rows_hold_all_of_them(loaded, reader, tmp_path):
    reader()
    methods = {FULL: None, "half": CompressionSpec(head_ratios={(0, 1): 0.2})}
    results = evaluate(loaded, "passkey", methods, settings=PasskeySettings((120,), (0.0, 0.5), 2))
    path = records.save(results, tmp_path / "results.json")
    assert records.load(Results, path) == results
    assert results.settings == {"lengths": [120], "depths": [0.0, 0.5], "keys": 2, "seed": 0}
    assert len(results.weights) == 64 and results.model == "books-5m" and results.task == "passkey"
    row = results.table()[-1]
    assert (row["method"], row["n_tokens"], row["depth"]) == ("half", 120, 0.5) and len(results.table()) == 8


def test_results_that_do_not_fit_together_are_refused(tmp_path):
    rows = tuple(Row(method, sample, 1.0, 0) for method in ("a", "b") for sample in "xy")
    made = Results("m", "", "lm", {}, {"a": None, "b": CompressionSpec()}, rows)
    undefined = replace(made, rows=(replace(rows[0], score=None), *rows[1:]))
    again = records.from_json(Results, records.to_json(undefined))
    assert again == undefined and np.isnan(again.scores("a")).tolist() == [True, False]
    for wrong in (rows[:3], (*rows, rows[0]), (replace(rows[0], method="c"), *rows[1:])):
        header = records.to_json(made).split("\n")[0]
        text = "\n".join([header, *(json.dumps(vars_of(row)) for row in wrong)])
        with pytest.raises(RecordError, match=r"one row for each sample|do not have: c"):
            records.from_json(Results, text)


def vars_of(row):
    return {"method": row.method, "sample": row.sample, "score": row.score, "nbytes": row.nbytes}


def test_intervals_resample_documents():
    scores = np.random.default_rng(0).normal(size=4).repeat(4)
    rows = tuple(Row("a", str(i), float(score), 0, document=str(i // 4)) for i, score in enumerate(scores))
    results = Results("m", "", "lm", {}, {"a": None}, rows)
    alone = replace(results, rows=tuple(replace(row, document="") for row in rows))
    assert results.documents == tuple("0000111122223333") and alone.documents == alone.samples
    wide, narrow = (each.interval(each.scores("a")) for each in (results, alone))
    assert wide.value == narrow.value and wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


# ----------------------------------------------------------------------------------------------------------- passages


def test_passages_are_consecutive_whole_sentences_that_keep_their_tokens(loaded):
    text = "\n".join(presets.bundled_texts().values()) + " Mr. J. Smith came. He left."
    found = list(passages(loaded.tokenizer, text, at_least=40, at_most=90, following=10))
    assert len(found) >= 5
    position = 0
    for passage in found:
        start = text.index(passage.prompt, position)
        position = start + len(passage.prompt)
        assert text[position:].startswith(passage.following)
        assert re.search(r"[.!?][\"'”’)\]]*$", passage.prompt) and not passage.prompt.endswith(("Mr.", " J."))
        ids = tokenize(loaded.tokenizer, passage.prompt).ids
        assert 40 <= passage.prompt_tokens == len(ids) <= 90
        whole = tokenize(loaded.tokenizer, passage.prompt + passage.following).ids
        assert (whole[: len(ids)] == ids).all() and len(whole) >= len(ids) + 10
    assert list(passages(loaded.tokenizer, "No end to this", at_least=2, at_most=9)) == []


# ------------------------------------------------------------------------------------------------------------ presets

EASY = Criteria(calm=1e6, breaks=-1e6, new_tokens=4, lengths=(40, 60), most=5)
TEXTS = {"anne": presets.bundled_texts()["Anne of Avonlea (L. M. Montgomery, 1909)"], "keats": TEXT}


def test_presets_are_the_first_passages_that_meet_the_criteria_with_the_figures_measured(loaded):
    seen = []
    found = find_presets(loaded, TEXTS, criteria=EASY, tasks=False, progress=lambda *call: seen.append(call[:2]))
    assert seen == sorted(seen) and (seen[0], seen[-1]) == ((0, 15), (15, 15)) and found.model == "books-5m"
    calm, breaks = found.presets
    assert TEXTS["anne"].startswith(calm.text) and calm.text == breaks.text
    assert (calm.spec, breaks.spec) == (CALM_SPEC, BREAKS_SPEC)
    n = len(tokenize(loaded.tokenizer, calm.text))
    for preset in found.presets:
        full, after = (
            continuation_nll(loaded, TEXTS["anne"], spec, prompt_tokens=n, new_tokens=4) for spec in (None, preset.spec)
        )
        assert f"these {n} of anne goes from {full:.3f} to {after:.3f} nats/token ({after - full:+.3f})" in preset.why
        assert "This passage was picked: 5 of 5 tried" in preset.why
    for source, text in TEXTS.items():  # both texts are tried, each under its own name
        assert any(source == name and p.prompt in text for name, p in finding._candidates(loaded, TEXTS, EASY))
        assert all(p.prompt in TEXTS[name] for name, p in finding._candidates(loaded, TEXTS, EASY))


@pytest.mark.parametrize("name,spec,best", [("calm", CALM_SPEC, min), ("breaks", BREAKS_SPEC, max)])
def test_where_nothing_meets_a_criterion_it_fails_and_says_how_near_the_best_came(loaded, name, spec, best):
    impossible = {"calm": Criteria(calm=0.0), "breaks": Criteria(calm=1e6, breaks=1e6)}[name]
    criteria = replace(EASY, calm=impossible.calm, breaks=impossible.breaks)
    changes = []
    for source, passage in finding._candidates(loaded, TEXTS, criteria):
        at = TEXTS[source].index(passage.prompt)
        nll = [
            continuation_nll(loaded, TEXTS[source][at:], s, prompt_tokens=passage.prompt_tokens, new_tokens=4)
            for s in (None, spec)
        ]
        changes.append(nll[1] - nll[0])
    nearest = best(map(abs, changes)) if name == "calm" else best(changes)
    with pytest.raises(NotFoundError, match=rf"None of 5 passages meets the criterion {name}: ") as error:
        find_presets(loaded, TEXTS, criteria=criteria, tasks=False)
    assert f"{nearest:.3f} nats/token" in str(error.value)


def test_texts_too_short_for_any_passage_are_refused(loaded):
    with pytest.raises(TextError, match="Give longer texts"):
        find_presets(loaded, {"short": "A word. Another word."}, tasks=False)


@pytest.fixture
def says(loaded, answering):
    """A stand-in for a model: a cache says the answer where `knows(prompt, spec)`, and something else elsewhere."""

    def install(knows):
        def answer(context, question, spec):
            prompt = loaded.tokenizer.decode([*context, *question], skip_special_tokens=True)
            return " it is 48213." if knows(prompt, spec) else " it is 99999."

        answering(answer)

    return install


def search(prompts, **changes):
    low, random = CompressionSpec(protect_last=8), CompressionSpec(protect_last=8, policy="random")
    asked = [Question(prompt, "48213") for prompt in prompts]
    whole = {"the full cache": None, "low norm": low}
    return replace(Search("Key", "It shows.", low, lambda loaded: asked, whole, {"random": random}), **changes)


def test_a_task_preset_is_the_first_prompt_on_which_each_cache_does_as_the_search_says(loaded, says):
    says(lambda prompt, spec: spec is None or spec.policy == "low_norm" or prompt == "An easy prompt")
    seen = []
    (preset,) = find_task_presets(
        loaded,
        [search(["An easy prompt", "Prompt number one", "Prompt number two"])],
        progress=lambda *call: seen.append(call[:2]),
    )
    assert (preset.text, preset.answer, preset.chat) == ("Prompt number one", "48213", False)
    assert preset.spec == CompressionSpec(protect_last=8) and seen[-1] == (9, 9)
    assert "This prompt was picked: in books-5m 2 of 3 tried show this." in preset.why


def test_where_no_prompt_meets_a_search_it_says_what_each_cache_did(loaded, says):
    says(lambda prompt, spec: spec is None or prompt == "An easy prompt")
    with pytest.raises(NotFoundError) as error:
        find_task_presets(loaded, [search(["An easy prompt", "Prompt number one", "Prompt number two"])])
    told = "the full cache finds it in 3 of 3; low norm finds it in 1 of 3; random loses it in 2 of 3"
    assert told in str(error.value) and "--without-tasks" in str(error.value)


def test_questions_through_a_template_are_left_out_where_there_is_none(loaded, says):
    says(lambda prompt, spec: True)
    chat = search([], candidates=lambda _: [Question("Which?", "48213", chat=True)])
    assert find_task_presets(loaded, [chat]) == ()


def test_all_caches_of_a_search_protect_the_same_tokens_and_skip_the_same_layers():
    for one in SEARCHES:
        specs = [spec for spec in (one.spec, *one.found_by.values(), *one.lost_by.values()) if spec is not None]
        assert len({(spec.protect_first, spec.protect_last, spec.skip_layers, spec.keep_ratio) for spec in specs}) == 1
        assert None in one.found_by.values()  # a preset is offered only where the full cache finds the answer
        expected = {**one.found_by, **one.lost_by}  # what is set beside it ends otherwise
        assert one.contrast is None or (one.contrast in one.found_by.values()) != (one.spec in one.found_by.values())
        assert one.contrast is None or one.contrast in expected.values()


def test_found_presets_are_read_back_as_they_were_and_offered_after_the_texts(tmp_path):
    spec = CompressionSpec(keep_ratio=0.3, protect_last=16, skip_layers=(0, 2), seed=3)
    key = Preset("Key", passkey_prompt(12345, before=1, after=2), "Lost – at 0.3.", spec, answer="12345")
    asked = Preset("Asked", "Which town?", "By chat.", CALM_SPEC, answer="Paris", chat=True, beside=BREAKS_SPEC)
    found = FoundPresets("a model", (Preset("Calm", "A text.\n", "Hardly.", CALM_SPEC), asked, key))
    path = records.save(found, tmp_path / "presets.json")
    assert records.load(FoundPresets, path) == found
    offered = presets.presets("a model", path)
    assert [p.name for p in offered] == [*presets.bundled_texts(), "Calm", "Asked", "Key"] and offered[-1].spec == spec


def test_what_was_found_for_one_model_is_not_offered_for_another(tmp_path):
    texts = list(presets.bundled_texts())
    found = FoundPresets("a model", (Preset("Calm", "A text.", "Hardly.", CALM_SPEC),))
    path = records.save(found, tmp_path / "presets.json")
    assert [p.name for p in presets.presets("another", path)] == texts
    assert [p.name for p in presets.presets("Qwen/Qwen3-0.6B")] == texts
    assert len(presets.presets("books-5m")) > len(texts)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"l2kv_presets": 2}', '{"l2kv_presets": 1, "presets": [3]}'])
def test_a_damaged_file_of_presets_is_named(tmp_path, text):
    (tmp_path / "presets.json").write_text(text)
    with pytest.raises(RecordError, match=r"This is not a file of presets"):
        presets.presets("books-5m", tmp_path / "presets.json")


def test_the_presets_that_are_shipped_can_be_read():
    for model in BUNDLED_MODELS:
        names = [preset.name for preset in presets.presets(model)]
        assert len(names) == len(set(names)) >= 3


def test_the_demo_command_writes_presets_a_run_a_timeline_and_stories_or_nothing(tmp_path, capsys, monkeypatch, says):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "anne.txt").write_text(TEXTS["anne"], encoding="utf-8")
    options = ["demo", "-m", "books-5m", str(tmp_path / "texts"), "-o", str(tmp_path)]
    monkeypatch.setattr(finding, "Criteria", lambda: EASY)
    says(lambda prompt, spec: False)
    assert main(options) == 2
    assert "--without-tasks" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]
    monkeypatch.undo()  # the model itself again
    monkeypatch.setattr(finding, "Criteria", lambda: EASY)
    assert main([*options, "--without-tasks"]) == 0
    assert "Calm: half the cache will do: Half the cache, hardly a change." in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()} - {"texts"}
    stories = {name for name in written if name.startswith("story-")}
    assert written - stories == {"demo.safetensors", "presets.json", "timeline.safetensors"} and stories
    assert records.load(Timeline, tmp_path / "timeline.safetensors").model == "books-5m"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "timeline.safetensors").unlink()
    assert main([*options, "--without-tasks"]) == 0  # as after a stop: only what is missing is made
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in before if before[path] != after[path]} == {"timeline.safetensors"}
    assert main(["demo", str(tmp_path / "nowhere.txt"), "-o", str(tmp_path)]) == 2
    assert "nowhere.txt cannot be read" in capsys.readouterr().err


def test_the_passkey_command_prints_what_was_found_of_what_was_asked(capsys, tmp_path):
    sizes = ["--lengths", "120,160", "--depths", "0.5", "--keys", "2", "--keep-ratios", "0.5", "--policies", "low_norm"]
    out = tmp_path / "passkeys.json"
    passkey = ["evaluate", "passkey", "-m", "books-5m"]
    assert main([*passkey, *sizes, "--skip-layers", "0", "-o", str(out)]) == 0
    rows = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()[3:]]
    results = records.load(Results, out)
    shown = (FULL, "random 0.5", "protected ends + random 0.5", "low_norm 0.5")
    assert len({results.nbytes(method) for method in shown[1:]}) == 1  # equal bytes, as measured
    low = 1 - 1 / (1 + 1.96**2 / 2)  # of none of two, Wilson's upper end by hand: z^2 / (n + z^2)
    assert [row[:3] for row in rows] == [[method, str(n), "2"] for method in shown for n in (120, 160)]
    assert not results.scores(FULL).any() and rows[0][5] == f"0.000 [0.000, {low:.3f}]"
    assert [float(row[3]) for row in rows[:2]] == [
        round(np.mean([row.nbytes for row in results.of(FULL) if row.at["n_tokens"] == n]) / 2**20, 2)
        for n in (120, 160)
    ]
    texts = tmp_path / "prose.txt"
    texts.write_text(TEXT)
    lm_of = ["evaluate", "lm", str(texts), "-m", "books-5m", "--prompt-tokens", "40", "--excerpts", "2", "--json"]
    assert main([*lm_of, "--new-tokens", "3", "--policies", "low_norm", "--keep-ratios", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in told["rows"]] == list(shown) and told["rows"][0]["change"]["value"] == 0
    assert main([*lm_of, "--depths", "0.5"]) == 2 and main(["evaluate", "passkeys"]) == 2
    assert "No such option: --depths" in (told := capsys.readouterr().err) and "Did you mean 'passkey'" in told
    assert main([*passkey, "--lengths", "10"]) == 2
    assert main([*passkey, "--keep-ratios", "2"]) == 2
    assert main([*passkey, "--policies", "none"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
