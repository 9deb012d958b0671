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
from analysis.demo import finding, presets, questions
from analysis.demo.finding import BREAKS_SPEC, CALM_SPEC, Criteria, find_presets
from analysis.demo.presets import FoundPresets, Preset
from analysis.demo.questions import SEARCHES, NotFoundError, Question, Search, find_task_presets
from analysis.errors import RecordError
from analysis.evaluation import run
from analysis.evaluation.run import (
    continuation_nll,
    continuations,
    nll_changes,
    passkey_grid,
    passkey_prompt,
    passkey_text,
    passkeys,
)
from analysis.models.load import BUNDLED_MODELS, LoadedModel
from analysis.preview import Step, prepared
from analysis.texts.tokens import passages, tokenize
from l2kv import CompressionSpec
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


def test_a_text_among_others_is_continued_as_if_alone_however_they_are_batched(loaded, monkeypatch):
    texts, specs = [TEXT[:400], TEXT[400:900], TEXT[900:1400]], [None, CompressionSpec(0.4, protect_last=4)]
    lengths = {"prompt_tokens": 30, "new_tokens": 4}
    together = continuations(loaded, texts, specs, **lengths)
    monkeypatch.setattr(run, "_TOKENS_AT_ONCE", 2 * 34)  # two rows, and then the third
    for spec, row, in_two in zip(specs, together, continuations(loaded, texts, specs, **lengths), strict=True):
        for text, one, other in zip(texts, row, in_two, strict=True):
            alone = continuation_nll(loaded, text, spec, **lengths)
            assert (one.nll, other.nll) == pytest.approx((alone, alone), rel=1e-5)
        # 33 tokens have been seen; 14 is the least whole number above 0.4 of them. 6 layers, 4 heads, 2 x 32 float32.
        assert {one.nbytes for one in (*row, *in_two)} == {(33 if spec is None else 14) * 6 * 4 * 2 * 32 * 4}


def test_changes_are_differences_to_the_full_cache_text_by_text(loaded):
    texts, specs = [TEXT[:400], TEXT[400:900]], {"half": CompressionSpec(), "all": CompressionSpec(keep_ratio=1.0)}
    seen = []
    half, whole = nll_changes(
        loaded, texts, specs, prompt_tokens=30, new_tokens=5, on_done=lambda done, total: seen.append((done, total))
    )
    assert (half.spec, whole.spec) == ("half", "all") and list(dict.fromkeys(seen)) == [(i, 6) for i in range(7)]
    for i, text in enumerate(texts):
        nll = [continuation_nll(loaded, text, s, prompt_tokens=30, new_tokens=5) for s in (CompressionSpec(), None)]
        assert half.by_text[i] == pytest.approx(nll[0] - nll[1])
    assert half.mean == pytest.approx(sum(half.by_text) / 2)
    assert whole.mean == pytest.approx(0, abs=1e-5)


def test_bad_requests_are_refused_and_leave_the_model_as_it_was(loaded):
    with pytest.raises(TextError, match=r"The text has .* tokens; 4000 of prompt and 3 more"):
        continuation_nll(loaded, TEXT, None, prompt_tokens=4000, new_tokens=3)
    with pytest.raises(ValueError, match="prompt_tokens must be 2"):
        continuation_nll(loaded, TEXT, None, prompt_tokens=1, new_tokens=3)
    with pytest.raises(ValueError, match="layer 9"):
        continuation_nll(loaded, TEXT, CompressionSpec(skip_layers=(9,)), prompt_tokens=20, new_tokens=3)
    foreign = LoadedModel(build("llama"), loaded.tokenizer, "foreign")  # of 160 tokens
    with pytest.raises(TextError, match="do not belong together"):
        continuation_nll(foreign, TEXT, None, prompt_tokens=20, new_tokens=3)
    with pytest.raises(TextError, match="do not belong together"):
        passkey_grid(foreign, {"full": None}, lengths=[200], depths=[0.5], keys=[53128])
    assert loaded.model.config._attn_implementation == "sdpa"


def test_a_batch_can_be_cancelled_at_every_token_of_it(loaded):
    calls = []
    texts = [TEXT[:400], TEXT[400:900]]
    continuations(
        loaded, texts, [None, CompressionSpec()], prompt_tokens=30, new_tokens=3, on_done=lambda *c: calls.append(c)
    )
    assert calls == [(0, 4)] * 3 + [(1, 4)] + [(2, 4)] * (1 + 3) + [(3, 4), (4, 4)]  # both rows are one batch

    class Cancelled(Exception):
        pass

    def stop(done, total):
        raise Cancelled

    with pytest.raises(Cancelled):
        continuations(loaded, texts, [None], prompt_tokens=30, new_tokens=3, on_done=stop)
    assert loaded.model.config._attn_implementation == "sdpa"


# ----------------------------------------------------------------------------------------------------------- passkeys


@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("n_tokens", [110, 300, 500])
def test_a_passkey_prompt_has_the_length_and_the_depth_asked_for(loaded, n_tokens, depth):
    text = passkey_text(loaded.tokenizer, 40302, n_tokens=n_tokens, depth=depth)
    filler = len(loaded.tokenizer(f" {presets.PASSKEY_FILLER}", add_special_tokens=False).input_ids)
    assert n_tokens - filler < len(tokenize(loaded.tokenizer, text)) <= n_tokens
    before, after = text.split(presets.passkey_sentence(40302))
    before, after = before.count(presets.PASSKEY_FILLER), after.count(presets.PASSKEY_FILLER)
    assert abs(before - depth * (before + after)) <= 0.5
    prompt = passkey_prompt(loaded.tokenizer, 40302, n_tokens=n_tokens, depth=depth)
    decoded = [loaded.tokenizer.decode(part, skip_special_tokens=True) for part in (prompt.context, prompt.question)]
    assert decoded[1] == " What is the pass key? The pass key is" and "".join(decoded) == text
    assert len(prompt.context) + len(prompt.question) <= n_tokens


def test_a_passkey_prompt_that_cannot_be_is_refused(loaded):
    with pytest.raises(TextError, match=r"takes .* tokens without any filler, more than the 30"):
        passkey_prompt(loaded.tokenizer, 40302, n_tokens=30, depth=0)
    with pytest.raises(ValueError, match="depth must be from 0 to 1"):
        passkey_prompt(loaded.tokenizer, 40302, n_tokens=300, depth=1.5)


def test_keys_have_five_digits_and_come_again():
    assert len(set(passkeys(20))) == 20 and all(10_000 <= key <= 99_999 for key in passkeys(20))
    assert passkeys(5) == passkeys(5) != passkeys(5, seed=1)


class Reader:
    """A stand-in for a model that finds every key which its cache still holds, and says it token by token."""

    def __init__(self, tokenizer, says=" {key}."):
        self.tokenizer, self.says = tokenizer, says

    def caches_after(self, loaded, ids, specs):
        tokens = ids[0].tolist()
        for spec in specs:  # keeps the latest tokens, so that what is told early is lost first
            yield {"held": tokens[-math.ceil(spec.keep_ratio * len(tokens)) :] if spec else tokens}

    def decode_one_token(self, model, ids, cache):
        if ids.shape[1] > 1:
            assert self.tokenizer.decode(ids[0]) == " What is the pass key? The pass key is"
            told = re.findall(r"(\d{5}) is the pass key", self.tokenizer.decode(cache["held"]))
            answer = self.says.format(key=told[0]) if told else " lost"
            cache["answer"] = iter(self.tokenizer(answer, add_special_tokens=False).input_ids)
        return torch.tensor([[next(cache["answer"], 1)]])


@pytest.fixture
def reader(loaded, monkeypatch):
    def install(**options):
        reader = Reader(loaded.tokenizer, **options)

        monkeypatch.setattr(run, "prepared", lambda _: nullcontext())
        monkeypatch.setattr(run, "_caches_after", reader.caches_after)
        monkeypatch.setattr(run, "decode_one_token", reader.decode_one_token)

    return install


def test_a_key_is_found_as_long_as_the_cache_holds_it(loaded, reader):
    reader()
    seen = []
    scores = passkey_grid(
        loaded,
        {"full": None, "half": CompressionSpec(keep_ratio=0.5), "little": CompressionSpec(keep_ratio=0.01)},
        lengths=[300, 500],
        depths=[0.0, 1.0],
        keys=passkeys(3),
        on_done=lambda done, total: seen.append((done, total)),
    )
    found = {(s.spec, s.n_tokens, s.depth): s.found for s in scores}
    assert len(scores) == 12 and all(s.trials == 3 for s in scores) and seen == [(i, 36) for i in range(1, 37)]
    for length in (300, 500):
        assert [found["full", length, d] for d in (0.0, 1.0)] == [3, 3]
        assert [found["half", length, d] for d in (0.0, 1.0)] == [0, 3]
    assert found["little", 300, 1.0] == 0  # 3 tokens do not hold the sentence


@pytest.mark.parametrize(
    "says,right",
    [(" {key}.", True), ("{key}", True), ("\n {key}", True), (" the {key}", False), (" 1{key}", False), (" ", False)],
)
def test_only_the_exact_key_counts(loaded, reader, says, right):
    reader(says=says)
    (score,) = passkey_grid(loaded, {"full": None}, lengths=[200], depths=[0.5], keys=[53128])
    assert score.found == right


def test_passkeys_run_on_a_real_model_and_stop_when_told_to(loaded):
    policies = ("low_norm", "random", "accumulated")  # the last is measured as the model reads: a pass of its own
    specs = {policy: CompressionSpec(policy=policy, protect_last=8) for policy in policies}

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        passkey_grid(loaded, specs, lengths=[120], depths=[0.5], keys=passkeys(1), on_done=stop)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "spec", [None, CompressionSpec(keep_ratio=0.3), CompressionSpec(keep_ratio=0.4, policy="high_norm", protect_last=6)]
)
def test_the_answer_is_what_a_pass_with_the_evicted_tokens_masked_would_say(loaded, spec):
    prompt = passkey_prompt(loaded.tokenizer, 53128, n_tokens=150, depth=0.5)
    context, question = len(prompt.context), len(prompt.question)
    ids = torch.from_numpy(np.concatenate([prompt.context, prompt.question]))[None]
    for step in range(5):  # the question is asked after compression, in one pass, and then token by token
        chunks = (context, question, *[1] * step)
        logits, _ = masked_forward(loaded.model, ids, chunks, spec or CompressionSpec(keep_ratio=1.0))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    said = loaded.tokenizer.decode(ids[0, context + question :]).strip()
    assert len(said) >= 4
    context = torch.from_numpy(prompt.context)[None]
    with torch.inference_mode(), prepared(loaded):
        right, wrong = run._caches_after(loaded, context, [spec, spec])
        assert run._says_key(loaded, replace(prompt, key=said), right)
        assert not run._says_key(loaded, replace(prompt, key=said[:-1] + "#"), wrong)


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
    found = find_presets(
        loaded, TEXTS, criteria=EASY, tasks=False, on_done=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 5) for i in range(1, 6)] and found.model == "books-5m"
    calm, breaks = found.presets
    assert TEXTS["anne"].startswith(calm.text) and calm.text == breaks.text
    assert (calm.spec, breaks.spec) == (CALM_SPEC, BREAKS_SPEC)
    n = len(tokenize(loaded.tokenizer, calm.text))
    for preset in found.presets:
        full, after = (
            continuation_nll(loaded, TEXTS["anne"], spec, prompt_tokens=n, new_tokens=4) for spec in (None, preset.spec)
        )
        assert f"these {n} of anne goes from {full:.3f} to {after:.3f} nats a token ({after - full:+.3f})" in preset.why
        assert "5 of 5 passages tried" in preset.why
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
    assert f"{nearest:.3f} nats a token" in str(error.value)


def test_texts_too_short_for_any_passage_are_refused(loaded):
    with pytest.raises(TextError, match="Give longer texts"):
        find_presets(loaded, {"short": "A word. Another word."}, tasks=False)


@pytest.fixture
def says(monkeypatch):
    """A stand-in for `stream`: a cache says the answer where `knows(prompt, spec)`, and something else elsewhere."""

    def install(knows):
        def stream(loaded, prompt, specs, *, max_new_tokens, chat):
            (spec,) = specs
            text = " it is 48213." if knows(prompt, spec) else " it is 99999."
            for n in range(1, max_new_tokens + 1):
                yield (Step(tuple(range(n)), text[: 3 * n], (0,), 0, 0, False),)

        monkeypatch.setattr(questions, "stream", stream)

    return install


def search(prompts, **changes):
    low, random = CompressionSpec(protect_last=8), CompressionSpec(protect_last=8, policy="random")
    asked = [Question(prompt, "48213") for prompt in prompts]
    whole = {"the full cache": None, "low norm": low}
    return replace(Search("Key", "It shows.", low, lambda loaded: asked, whole, {"random": random}), **changes)


def test_a_task_preset_is_the_first_prompt_on_which_each_cache_does_as_the_search_says(loaded, says):
    says(lambda prompt, spec: spec is None or spec.policy == "low_norm" or prompt == "easy")
    seen = []
    (preset,) = find_task_presets(loaded, [search(["easy", "one", "two"])], on_done=lambda *done: seen.append(done))
    assert (preset.text, preset.answer, preset.chat) == ("one", "48213", False)
    assert preset.spec == CompressionSpec(protect_last=8) and seen == [(1, 3), (2, 3), (3, 3)]
    assert "2 of 3 prompts tried show this" in preset.why and "the last 8 tokens protected" in preset.why


def test_where_no_prompt_meets_a_search_it_says_what_each_cache_did(loaded, says):
    says(lambda prompt, spec: spec is None or prompt == "easy")
    with pytest.raises(NotFoundError) as error:
        find_task_presets(loaded, [search(["easy", "one", "two"])])
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
    key = Preset("Key", presets.passkey(12345, before=1, after=2), "Lost – at 0.3.", spec, answer="12345")
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


def test_the_demo_command_writes_presets_and_the_run_or_nothing(tmp_path, capsys, monkeypatch, says):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "anne.txt").write_text(TEXTS["anne"], encoding="utf-8")
    options = ["demo", "-m", "books-5m", str(tmp_path / "texts"), "-o", str(tmp_path)]
    monkeypatch.setattr(finding, "Criteria", lambda: EASY)
    says(lambda prompt, spec: False)
    assert main(options) == 2
    assert "--without-tasks" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]
    assert main([*options, "--without-tasks"]) == 0
    assert "Calm: half the cache will do: Half the cache, hardly a change." in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.safetensors", "presets.json", "texts"]
    assert main(["demo", str(tmp_path / "nowhere.txt")]) == 2
    assert "nowhere.txt cannot be read" in capsys.readouterr().err


def test_the_passkey_command_prints_what_was_found_of_what_was_asked(capsys, tmp_path):
    sizes = ["--lengths", "120,160", "--depths", "0.5", "--keys", "2", "--keep-ratios", "0.5", "--policies", "low_norm"]
    out = tmp_path / "passkeys.json"
    passkey = ["evaluate", "passkey", "-m", "books-5m"]
    assert main([*passkey, *sizes, "--skip-layers", "0", "-o", str(out)]) == 0
    rows = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()[2:]]
    scores = json.loads(out.read_text())["scores"]
    assert [row[:4] for row in rows] == [
        [score["spec"], str(score["n_tokens"]), str(score["found"]), "2"] for score in scores
    ]
    low = 1 - 1 / (1 + 1.96**2 / 2)  # of none of two, Wilson's upper end by hand: z^2 / (n + z^2)
    assert rows[0][2] == "0" and rows[0][4] == f"0% [0%, {low:.0%}]"
    assert main([*passkey, "--lengths", "10"]) == 2
    assert main([*passkey, "--keep-ratios", "2"]) == 2
    assert main([*passkey, "--policies", "none"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
