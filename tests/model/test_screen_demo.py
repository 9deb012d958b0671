"""The page Demo: stories replay without a model, tasks are scored, and a chat lives on in its caches."""

import base64
import gzip
import json
import re
import time
from dataclasses import replace

import pytest
import streamlit as st
import torch

from analysis.demo.presets import Preset
from analysis.pace import Pace
from analysis.plans.skip import Plan
from analysis.stories import Story
from analysis.workspace import Workspace
from app import library
from app.engine import Engine
from app.jobs import Jobs
from app.report.story import report
from l2kv import CompressionSpec
from tests.support.screens import opened as opened_screen
from tests.support.texts import HOSTILE, chatty

SEA = "The old man looked at the sea, and the sea looked at the old man. Then he said to his wife: "


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "workspace")
    monkeypatch.setattr(library, "WORKSPACE", workspace)
    return workspace


def opened(model="books-5m", engine=None, **params):
    return opened_screen("demo", model=model, server=(engine, Jobs(engine)) if engine else None, **params)


def said(page):
    kinds = ("markdown", "caption", "info", "warning", "success", "error")
    return "\n".join(part.value for kind in kinds for part in page.get(kind)).replace("\\", "")


def steps(page):
    """HTML of each step that the browser is sent."""
    (sent,) = [
        of["steps"] for part in page.get("bidi_component") if "steps" in (of := json.loads(part.proto.json or "{}"))
    ]
    return json.loads(gzip.decompress(base64.b64decode(sent)))


def stage(page):
    return steps(page)[-1]


def verdicts(page):
    """What the end of a story says of each compressed cache."""
    return re.findall(r'<p class="l2kv-ending (?:found|lost)">(.*?)</p>', stage(page))


def found(page):
    return [told.startswith("✓") for told in verdicts(page)]


def test_a_recorded_story_is_sent_step_by_step_its_end_last_and_needs_no_model():
    engine = Engine()
    page = opened("smollm2", engine)
    first, *_, last = steps(page)
    assert "found" not in first and "l2kv-ending" not in first
    assert "✓ found" in last and "✗ not found" in last
    assert found(page) == [True, False, False]  # low norm finds; random and high norm do not
    assert engine.loaded is None


def test_a_wrong_answer_whose_tokens_are_held_says_that_they_can_be_lost_where_it_matters():
    page, said_so = opened("smollm2"), []
    for entry in library.entries("story", model="smollm2"):
        page.selectbox(key="story_id").set_value(entry.id).run()
        story = library.opened(Story, entry.id)
        last = story.n_steps - 1
        lost = [i for i in range(len(story.caches)) if story.score(i, last) is False]
        said_so += (told := ["can be among the others" in each for each in verdicts(page) if each.startswith("✗")])
        assert told == [story.answer_held(i, last) >= 0.5 for i in lost]
        assert all("can be among the others" not in each for each in verdicts(page) if each.startswith("✓"))
    assert {*said_so} == {True, False}


def test_a_story_begins_in_words_and_ends_with_what_many_passkeys_say():
    page = opened("smollm2")
    first, *_, last = steps(page)
    assert "A number, 86556, is hidden in a text of 448 tokens" in first and "l2kv-start" not in last
    assert "Watch the tokens: a hollow one" in first
    assert "12 of 12 tried show this" in first and "token by token" not in last
    # The bundled results: 40 of 50, and the full cache 50.
    assert "in every layer, finds 40 of 50 (full 50). The page Verdict says NO-GO." in last


def test_own_stories_are_listed_after_those_that_come_with_the_program(workspace):
    shown = opened().session_state["story_id"]
    timed = library.opened(Story, shown)
    own = workspace.add(
        replace(timed, caches=tuple(replace(one, tokens_per_second=2) for one in timed.caches)), name="x"
    )
    again = opened()
    assert again.session_state["story_id"] == shown and again.selectbox(key="story_id").options[-1].startswith("x")
    assert "It takes about" in said(again) and own.id != shown


def offer(monkeypatch, *presets):
    monkeypatch.setattr("app.screens.demo.presets", lambda model: presets)


def told(monkeypatch, preset, **settings):
    """The page after one preset was told live."""
    offer(monkeypatch, Preset("Another", "A"), preset)
    page = opened(demo="Live", **settings)
    for name in ("Another", preset.name):
        page.selectbox(key="live_preset").set_value(name).run()
    if preset.spec:
        page.button(key="take_compression").click().run()
    page.number_input(key="live_new").set_value(6).run()
    page.button(key="tell_story").click().run()
    assert not page.exception and page.session_state["demo_told"].n_steps
    return page


@pytest.fixture(scope="module")
def answer():
    """What the full cache says first."""
    from analysis.models.load import load_model
    from analysis.preview import stream

    *_, (full,) = stream(load_model("books-5m"), SEA, [None], max_new_tokens=6)
    return full.text.strip()


def test_colour_is_for_the_task_and_not_for_the_same_tokens(monkeypatch, answer, workspace):
    page = told(monkeypatch, Preset("Solved", SEA, "", CompressionSpec(keep_ratio=1.0), answer))
    assert found(page) == [True] and stage(page).count("✓ found") == 2
    (entry,) = workspace.entries("story")
    assert workspace.open(Story, entry.id) == page.session_state["demo_told"]
    page = told(monkeypatch, Preset("Lost", SEA, "", CompressionSpec(keep_ratio=0.05), answer))
    assert found(page) == [False] and stage(page).count("✗ not found") == 1
    page = told(monkeypatch, Preset("Not solved", SEA, "", CompressionSpec(keep_ratio=1.0), "xylophone"))
    assert "The full cache does not give" in stage(page) and not found(page)
    page = told(monkeypatch, Preset("No task", SEA, "", CompressionSpec(keep_ratio=0.05)))
    assert not found(page) and "found" not in stage(page)


def test_live_leaves_the_compression_as_it_is_until_that_of_a_task_is_asked_for(monkeypatch):
    offer(monkeypatch, Preset("Task", SEA, "", CompressionSpec(keep_ratio=0.25, skip_layers=(0,)), "sea"))
    page = opened(keep="0.75")
    page.segmented_control(key="demo_mode").set_value("Live").run()
    page.selectbox(key="live_preset").set_value("My own text").run()
    page.selectbox(key="live_preset").set_value("Task").run()
    assert page.session_state["keep_ratio"] == 0.75 and "chosen with" in said(page)
    page.button(key="take_compression").click().run()
    assert page.session_state["keep_ratio"] == 0.25 and "chosen with" not in said(page)


def test_a_second_compression_stands_beside_the_first_and_text_that_was_edited_is_no_task(monkeypatch, answer):
    offer(monkeypatch, Preset("Solved", SEA, answer=answer))
    page = opened(demo="Live", beside="random")
    page.text_area(key="live_prompt").set_value(SEA + HOSTILE).run()
    page.number_input(key="live_new").set_value(2).run()
    page.button(key="tell_story").click().run()
    story = page.session_state["demo_told"]
    assert [cache.spec.policy for cache in story.caches[1:]] == ["low_norm", "random"] and story.answer == ""
    assert page.selectbox(key="live_preset").value == "My own text"
    assert "<script" not in stage(page) and "<img" not in stage(page)


def test_a_reload_shows_what_was_told_last_from_its_own_prompt(monkeypatch):
    offer(monkeypatch, Preset("Another", "A"))
    page = opened(demo="Live", beside="random", beside_keep="0.75")
    page.text_area(key="live_prompt").set_value(SEA).run()
    page.number_input(key="live_new").set_value(3).run()
    page.button(key="tell_story").click().run()
    link = {name: "".join(values) for name, values in page.query_params.items()}
    again = opened(**link)
    assert (
        link["beside_keep"] == "0.75"
        and stage(again) == stage(page)
        and "Random, 75\N{NARROW NO-BREAK SPACE}% kept" in stage(again)
    )
    assert again.text_area(key="live_prompt").value == SEA and "earlier settings" not in said(again)


def test_the_time_of_a_story_and_what_is_not_counted_in_a_long_one_are_told_before_it_starts(monkeypatch):
    monkeypatch.setattr(library, "pace", lambda model, config: Pace(0.001, 0.0, "by earlier runs"))
    offer(monkeypatch)
    page = opened(demo="Live", beside="random")
    page.text_area(key="live_prompt").set_value("word " * 800).run()
    n = int(re.search(r"([\d,]+) tokens of the 1,024", said(page)).group(1).replace(",", ""))
    page.number_input(key="live_new").set_value(200).run()
    assert "A reload ends it" not in said(page)
    assert f"Takes about {3 * (n + 200 * 40) / 1000:.0f} s, by earlier runs." in said(page)
    assert "is counted for up to" not in said(page)
    page.text_area(key="live_prompt").set_value("word " * 4100).run()
    assert "Which tokens are held is counted for up to 4,000 tokens." in said(page)
    monkeypatch.setattr(Engine, "lend", lambda *_: st.stop())
    page.button(key="tell_story").click().run()
    assert page.button(key="cancel_story") and "A reload ends it, and forgets the prompt." in said(page)


def test_a_sampled_story_says_how_it_was_drawn_and_a_reload_begins_with_that(monkeypatch):
    offer(monkeypatch, Preset("Another", "A"))
    page = opened(demo="Live")
    page.text_area(key="live_prompt").set_value(SEA).run()
    page.number_input(key="live_new").set_value(3).run()
    for name, value in {"temperature": 0.8, "top_p": 0.9, "seed": 7}.items():
        page.number_input(key=f"live_{name}").set_value(value).run()
    page.button(key="tell_story").click().run()
    page = opened(**{name: "".join(values) for name, values in page.query_params.items()})
    assert "Sampled: temperature 0.8, top-p 0.9, seed 7." in said(page) and "earlier settings" not in said(page)
    assert "Sampled: temperature 0.8, top-p 0.9, seed 7." in report(page.session_state["demo_told"])
    assert not page.warning
    page.number_input(key="live_seed").set_value(8).run()
    assert "earlier settings" in said(page)


def test_the_plan_in_force_is_told_with_and_another_compression_beside_it(monkeypatch, workspace):
    offer(monkeypatch, Preset("No task", SEA))
    spec = CompressionSpec(layer_ratios={0: 0.9, 1: 0.1}, protect_last=4)
    plan = workspace.add(Plan("books-5m", spec), name="plan").id
    page = opened(demo="Live", beside="random", plan=plan)
    page.number_input(key="live_new").set_value(2).run()
    page.button(key="tell_story").click().run()
    assert [told.name for told in page.session_state["demo_told"].caches[1:]] == [
        "low norm, 50\N{NARROW NO-BREAK SPACE}% kept by layer",
        "random, 50\N{NARROW NO-BREAK SPACE}% kept",
    ]


def test_a_plan_for_more_layers_than_the_model_has_gets_an_answer(monkeypatch, workspace):
    offer(monkeypatch, Preset("No task", SEA))
    plan = workspace.add(Plan("books-5m", CompressionSpec(layer_ratios={40: 0.5})), name="plan").id
    page = opened(demo="Live", plan=plan)
    page.button(key="tell_story").click().run()
    assert not page.exception and len(page.error) == 1 and not workspace.entries("story")
    assert "cancel_story" not in [button.key for button in page.button]


def test_each_cache_is_timed_alone_as_a_job_and_the_story_keeps_the_rates(workspace):
    page = opened()
    page.button(key="time_story").click().run()
    for _ in range(600):
        page.run()
        if "job" not in page.query_params:
            break
        time.sleep(0.2)
    (entry,) = workspace.entries("story")
    assert all(told.tokens_per_second > 0 for told in workspace.open(Story, entry.id).caches)
    assert "tokens/s alone" in stage(page) and not page.exception


def test_a_story_that_was_cancelled_leaves_its_task_open():
    page = opened("smollm2")
    story = page.session_state["story_id"]
    cut = library.opened(Story, story)
    cut = replace(cut, ended=False, caches=tuple(replace(told, steps=told.steps[:1]) for told in cut.caches))
    page.session_state["demo_told"] = cut
    page.segmented_control(key="demo_mode").set_value("Live").run()
    assert "Cancelled: what was written until then is kept." in said(page)
    assert not (found(page) or page.error or page.exception) and "does not give" not in stage(page)


def test_one_s_own_text_expects_no_answer_until_one_is_given_and_a_blank_one_cannot_be_started(monkeypatch):
    offer(monkeypatch, Preset("Task", SEA, answer="sea"))
    page = opened(demo="Live")
    page.selectbox(key="live_preset").set_value("My own text").run()
    assert page.text_area(key="live_prompt").value == SEA and page.text_input(key="live_answer").value == ""
    page.selectbox(key="live_preset").set_value("Task").run()
    page.text_input(key="live_answer").set_value("man").run()
    assert page.selectbox(key="live_preset").value == "My own text"
    assert page.text_input(key="live_answer").value == "man" and not page.button(key="tell_story").disabled
    page.text_area(key="live_prompt").set_value(" \n").run()
    assert page.button(key="tell_story").disabled


@pytest.mark.parametrize("prompt", ["\\ud800", "a"])
def test_a_bad_prompt_gets_a_sentence(monkeypatch, prompt):
    offer(monkeypatch)
    page = opened(demo="Live")
    page.text_area(key="live_prompt").set_value(prompt).run()
    page.button(key="tell_story").click().run()
    assert not page.exception and len(page.error) <= 1


def test_a_model_without_a_template_says_so_in_place_of_a_chat():
    page = opened(demo="Chat")
    assert "has no chat template" in said(page) and not page.chat_input


@pytest.fixture
def talker(tmp_path, monkeypatch):
    """Folder of a model that has a chat template."""
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path))
    return str(chatty(tmp_path / "talker"))


def fails(*args):
    raise torch.OutOfMemoryError("out of memory")


def test_a_chat_goes_on_in_its_caches(talker):
    page = opened(talker, demo="Chat")
    page.number_input(key="chat_new").set_value(3).run()
    for i, message in enumerate(("Who is it?", "<b>And</b> why?"), 1):
        page.chat_input(key="chat_message").set_value(message).run()
        assert not page.exception and not page.error and len(page.session_state["demo_talk"].turns) == i
        shown = [*(part.value for part in page.get("html") if "l2kv-stage" in part.value), stage(page)]
        # Three tokens end no answer, and neither turn has the 128 that compression begins at.
        assert [html.count("Stopped after 3 tokens.") for html in shown] == [2] * i
        assert shown[-1].count("Nothing is evicted yet: that begins at 128 tokens.") == 1
        assert "held by" not in "".join(shown[:-1])
    assert "<b>And</b>" not in "".join(shown)
    told = page.session_state["demo_talk"].turns[-1].caches[0].steps[-1]
    assert f"{told.seen} tokens of the 1,024 that the model was trained on." in said(page)
    page.button(key="new_chat").click().run()
    assert page.session_state["demo_talk"] is None if "demo_talk" in page.session_state else True


def test_hollow_tokens_of_a_chat_are_those_that_its_cache_holds_in_few_heads(talker):
    page = opened(talker, demo="Chat", keep="0.3", window="0")
    page.number_input(key="chat_new").set_value(3).run()
    page.number_input(key="chat_from").set_value(0).run()
    for message in ("Who is it?", "And why?"):
        page.chat_input(key="chat_message").set_value(message).run()
    cache = page.session_state["demo_talk"].turns[-1].caches[1]
    chips = re.findall(r'title="(\d+): held by (\d+) of', stage(page))
    assert [int(held) for _, held in chips] == list(cache.steps[-1].kept) and len(chips) == len(cache.labels)


def test_a_message_that_cannot_be_read_leaves_the_chat_and_one_that_was_stopped_ends_it(talker, monkeypatch):
    page = opened(talker, demo="Chat")
    page.number_input(key="chat_new").set_value(2).run()
    page.chat_input(key="chat_message").set_value("Who is it?").run()
    page.chat_input(key="chat_message").set_value(" ").run()
    assert len(page.error) == 1 and len(page.session_state["demo_talk"].turns) == 1
    monkeypatch.setattr("analysis.preview.prefill", fails)
    page.chat_input(key="chat_message").set_value("And why?").run()
    assert len(page.error) == 1 and not page.exception
    assert "so the chat begins anew" in said(page.run())


def test_a_message_is_shown_at_once_and_one_that_was_stopped_before_it_was_read_is_named(talker, monkeypatch):
    def stopped(*args):
        st.stop()

    page = opened(talker, demo="Chat")
    page.number_input(key="chat_new").set_value(2).run()
    page.chat_input(key="chat_message").set_value("Who is it?").run()
    with monkeypatch.context() as waiting:
        waiting.setattr(Engine, "lend", stopped)
        page.chat_input(key="chat_message").set_value("<b>And</b> why?").run()
    assert page.chat_input(key="chat_message").disabled and page.button(key="cancel_chat")
    shown = "".join(part.value for part in page.get("html"))
    assert shown.count("&lt;b&gt;And&lt;/b&gt; why?") == 2  # once for each cache
    page.run()
    assert not page.chat_input(key="chat_message").disabled and "Not answered: “" in said(page)
    page.chat_input(key="chat_message").set_value("So?").run()
    assert [turn.prompt for turn in page.session_state["demo_talk"].turns] == ["Who is it?", "So?"]
    assert "Not answered" not in said(page)


def test_an_answer_that_was_cancelled_is_marked_in_the_chat(talker):
    page = opened(talker, demo="Chat")
    page.number_input(key="chat_new").set_value(2).run()
    page.chat_input(key="chat_message").set_value("Who is it?").run()
    talk = page.session_state["demo_talk"]
    talk.turns = (replace(talk.turns[0], ended=False),)
    page.chat_input(key="chat_message").set_value("And why?").run()
    assert said(page).count("Cancelled after 2 tokens.") == 1
