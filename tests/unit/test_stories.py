"""Stories: scores and shares worked by hand, and the stage that shows them."""

import re
from dataclasses import replace
from datetime import date
from html import unescape

import pytest

from analysis.records import load, save
from analysis.sampling import Sampling
from analysis.stories import FULL, Step, Story, Told, full_nbytes, introduction, name_of
from app.components import stage
from app.report.story import report
from l2kv import CompressionSpec
from tests.support.texts import HOSTILE

HALF = CompressionSpec(keep_ratio=0.5)
NARROW = "\N{NARROW NO-BREAK SPACE}%"


def step(text, n, held, nbytes, kept=(), finished=False):
    return Step(tuple(range(n)), 10 + n, text, (held, 10 + n), nbytes, 0, finished, kept)


STORY = Story(
    model="m",
    name="A key",
    prompt="The key is 42. What is it?",
    caches=(
        Told(FULL, None, (step(" 4", 1, 11, 800, (4,) * 5), step(" 42", 2, 12, 840, (4,) * 5))),
        Told("low norm", HALF, (step(" 4", 1, 6, 400, (4, 1, 3, 4, 0)), step(" 42", 2, 6, 420, (4, 1, 3, 1, 0)))),
        Told("random", replace(HALF, policy="random"), (step("", 1, 6, 400, (4, 1, 0, 2, 0), finished=True),)),
    ),
    answer="42",
    labels=("The", " key", " 4", "2", "?"),
    answer_at=(2, 3),
    heads=4,
    counted_dtype="float32",
    dtype="bfloat16",
)  # fmt: skip


def test_a_score_is_open_until_it_is_decided():
    assert [STORY.score(cache, 0) for cache in range(3)] == [None, None, False]
    assert [STORY.score(cache, 1) for cache in range(3)] == [True, True, False]
    wrong = replace(STORY, answer="43")
    assert [wrong.score(cache, 1) for cache in range(3)] == [False] * 3
    cut = replace(wrong, caches=tuple(replace(cache, steps=cache.steps[:1]) for cache in wrong.caches), ended=False)
    assert [cut.score(cache, 0) for cache in range(3)] == [None, None, False]
    assert replace(STORY, answer="").score(0, 1) is None


def test_bytes_are_told_in_the_dtype_of_the_checkpoint_and_shares_at_the_same_number_of_tokens():
    assert STORY.nbytes(0, 1) == 420
    assert STORY.share(1, 1) == 0.5 and STORY.share(2, 1) == 0.5  # 400 of 800, when it ended
    longer = replace(STORY, caches=(replace(STORY.caches[0], steps=STORY.caches[0].steps[:1]), *STORY.caches[1:]))
    assert longer.share(1, 1) == 420 / (800 * 12 / 11)  # the full cache ended at 11 tokens, this one at 12
    assert full_nbytes(step("", 1, 4, 1500), 22) == 1500 * (4 + 22) / (4 + 11)  # a window of 4 does not grow


def test_the_share_of_heads_that_hold_the_answer_is_of_its_own_tokens():
    assert STORY.answer_held(0, 0) == 1.0
    assert STORY.answer_held(1, 0) == 7 / 8 and STORY.answer_held(1, 1) == 4 / 8
    assert replace(STORY, answer_at=()).answer_held(1, 0) is None


def test_a_story_is_read_as_it_was_written(tmp_path):
    assert load(Story, save(STORY, tmp_path / "story.json")) == STORY


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (CompressionSpec(keep_ratio=0.25, policy="high_norm"), "high norm, 25 % kept"),
        (CompressionSpec(budget=100), "low norm, 100 tokens kept"),
        (CompressionSpec(key_bits=8), "low norm, 50 % kept, keys in 8 bits"),
        (CompressionSpec(head_ratios={(0, 0): 0.5}), "low norm, 50 % kept by kv head"),
        (CompressionSpec(policy="keydiff"), "KeyDiff, 50 % kept"),
    ],
)
def test_a_cache_is_named_by_its_policy_and_its_budget(spec, name):
    assert name_of(spec) == name.replace(" %", NARROW)
    assert Told("of an earlier day", spec).title == name_of(spec)[0].upper() + name_of(spec)[1:]


def test_colour_and_words_carry_the_task_and_hollow_tokens_are_those_that_most_heads_lost():
    shown = stage.stage(STORY, 1)
    assert shown.count("✓ found") == 2 and shown.count("✗ not found") == 1
    assert "210 B" in shown and f"50{NARROW} of a full cache" in shown
    assert "held by at least half of the 4 kv heads, and can be lost in the heads that matter" in shown
    low = shown.split("l2kv-cache")[2]
    chips = low.split("l2kv-tokens")[1].split("<span class=")[1:]
    assert ["hollow" in chip for chip in chips] == [False, True, False, True, True]
    assert ["answer" in chip.split(">")[0] for chip in chips] == [False, False, True, True, False]
    assert f"held by 50{NARROW} of heads" in low and "found" not in stage.stage(STORY, -1)


def test_a_story_begins_in_words_for_readers_who_know_nothing_of_caches():
    about, memory = introduction(STORY)
    assert about.startswith("A number, 42, is hidden in a text of 11 tokens")
    assert f"keeps every token, each other one 50{NARROW}." in memory
    specs = [replace(HALF, skip_layers=(0, 1), protect_last=32), HALF]
    caches = [STORY.caches[0], *(replace(told, spec=specs[0]) for told in STORY.caches[1:])]
    skipping = replace(STORY, caches=tuple(caches), answer="a rose", answer_at=(), why="It shows this.")
    about, memory, why = introduction(skipping)
    assert "asked for a phrase: a rose" in about and why == "It shows this."
    assert f"each other one 50{NARROW}, but all in layers 0, 1, and always the last 32." in memory
    mixed = replace(HALF, budget=100, protect_last=3)
    assert (
        "each other one a part of them." in introduction(replace(skipping, caches=(*caches[:2], Told("b", mixed))))[1]
    )
    assert "writes on" in introduction(replace(STORY, answer=""))[0]


def test_each_compressed_cache_says_what_it_keeps_and_why_that_is_more_than_its_keep_ratio():
    caches = [replace(told, spec=told.spec and replace(told.spec, skip_layers=(1,))) for told in STORY.caches]
    shown = stage.stage(replace(STORY, caches=tuple(caches)), 1)
    assert "Keeps the keys of lowest L2 norm<" in shown and "Keeps tokens at random<" in shown
    assert f"50{NARROW} of a full cache: all in layer 1" in shown
    assert "6 of 12 tokens held in each other layer" in shown  # 6 and 12, of which the layer that skips is left out


@pytest.mark.parametrize(
    ("rates", "apart"),
    [((0.6, 1.1, 0.6), False), ((0.6, 1.1, 1.1), True), ((1, 0.5, 0.45), True), ((0.6, 1.1, None), False)],
)
def test_rates_are_told_apart_where_caches_of_the_same_bytes_differ_less_than_from_the_full_one(rates, apart):
    caches = (replace(told, tokens_per_second=rate) for told, rate in zip(STORY.caches, rates, strict=True))
    timed = replace(STORY, caches=tuple(caches))
    assert timed.told_apart == apart
    assert (": not told apart." in stage.stage(timed, 1)) == (not apart) and "measured once" in stage.stage(timed, 1)
    assert ("not told apart" in report(timed)) == (not apart) and "measured once" not in stage.stage(STORY, 1)


def test_of_a_long_prompt_only_what_is_around_the_answer_is_shown():
    strip = stage.token_strip(["a"] * 500, [1.0] * 500, (250,), heads=4)
    assert strip.count("<span") == 29 and "… 236 …" in strip and "… 235 …" in strip


def chat(*steps, spec=HALF):
    caches = (Told(FULL, None, steps), Told("low norm", spec, steps))
    return Story("m", "Chat", "Is it?", caches, chat=True, heads=4)


def test_an_answer_of_a_chat_that_the_model_did_not_end_is_said_to_be_cut():
    cut = chat(step("So", 2, 12, 800))
    assert stage.stage(cut, 0).count("Stopped after 2 tokens.") == 2
    assert "Stopped" not in stage.stage(replace(cut, ended=False), 0)  # it still grows
    assert "Stopped" not in stage.stage(chat(step("So it is.", 3, 6, 400, finished=True)), 0)
    brief = stage.stage(cut, 0, texts_only=True)
    assert brief.count("Stopped after 2 tokens.") == 2 and "held" not in brief


def test_a_turn_of_a_chat_shows_the_tokens_that_each_cache_had_read_itself():
    turn = chat(step("So", 1, 6, 400, (4, 1)))
    own = replace(turn, caches=tuple(replace(cache, labels=("own", cache.name)) for cache in turn.caches))
    shown = stage.stage(own, 0)
    assert "Tokens of the chat that each cache had read" in shown and 'title="1: held by 1 of 4 kv heads">low' in shown


def test_a_cache_too_short_to_be_compressed_says_from_where_on_it_is():
    short = step("So", 2, 12, 800)
    waits = "Nothing is evicted yet: that begins at 20 tokens."
    assert stage.stage(chat(short, spec=replace(HALF, prune_after=20)), 0).count(waits) == 1
    assert "Nothing" not in stage.stage(chat(short), 0)


def test_a_text_too_long_to_count_heads_says_so_and_its_numbers_are_grouped():
    long = Step((1,), 20_000, "So", (1200, 20_000), 400)
    shown = stage.stage(chat(long), 0)
    assert "1,200 to 20,000 of 20,000 tokens held per layer" in shown
    assert shown.count("Which tokens are held is counted for up to 4,000 tokens.") == 1


def test_no_text_becomes_markup():
    caches = [replace(told, name=HOSTILE, steps=(replace(told.steps[0], text=HOSTILE),)) for told in STORY.caches]
    hostile = replace(STORY, name=HOSTILE, prompt=HOSTILE, answer=HOSTILE, labels=(HOSTILE,) * 5, caches=tuple(caches))
    for shown in (stage.stage(hostile, 0) + stage.ending(hostile), report(hostile)):
        assert "<img" not in shown and "alert(1)</script>" not in shown and "\u202e" not in shown


def test_a_report_is_one_small_page_with_scores_bytes_and_code():
    page = report(replace(STORY, prompt=f"The key is 42. {'So it goes on. ' * 50}What is it?"))
    assert len(page) < 100_000
    for told in ("<h1>A key", "is hidden in a text", "found", "not found", "210 B", "keep_ratio=0.5", "The key is 42"):
        assert told in page, told
    assert f"Written on {date.today():%d %B %Y}" in page and "tokens/s" not in page
    assert max(map(len, unescape(page.split("<pre>", 1)[1].split("</code>")[0]).splitlines())) < 120


def test_a_report_of_sampled_tokens_names_the_sampling_and_says_that_its_scripts_do_not_repeat_it():
    told = "Sampled: temperature 0.8, top-p 1, seed 7.", "they do not draw the sampled tokens again."
    assert all(words in report(replace(STORY, sampling=Sampling(0.8, seed=7))) for words in told)
    assert not any(words in report(STORY) for words in told)


def test_a_report_of_a_chat_holds_all_turns_and_the_code_once():
    turns = [replace(chat(step(f"Answer {n}.", 2, 6, 400)), prompt=f"Question {n}?") for n in (1, 2)]
    page = report(*turns)
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == ["What this is", "Turn 1", "Turn 2", "The code"]
    assert re.findall(r"Question \d|Answer \d", page)[:6] == [
        *["Question 1", *["Answer 1"] * 2],
        *["Question 2", *["Answer 2"] * 2],
    ]
    assert page.count("With this library") == 1 and "answer the first message again" in page
