"""The section "Eviction time machine" as Streamlit runs it, without a browser: record, choose, ask what if."""

import time
from dataclasses import replace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from analysis.generations import record_timeline, text_sample
from analysis.timelines import Timeline
from analysis.workspace import Workspace
from app.components import markup
from app.jobs import Jobs
from l2kv import CompressionSpec
from tests.support.timelines import HOSTILE, TEXT, fed_one_by_one, invented

SPEC = CompressionSpec(keep_ratio=0.3, protect_last=8)


@pytest.fixture
def workspace(monkeypatch, tmp_path):
    monkeypatch.setenv("L2KV_HOME", str(tmp_path))
    monkeypatch.setenv("L2KV_DEMO", "books-5m")
    return Workspace()


@pytest.fixture
def recorded(loaded, workspace):
    timeline = record_timeline(loaded, text_sample(loaded, TEXT, new_tokens=6), SPEC)
    return workspace.add(timeline, name="The old man").id, timeline


def opened(form=False, **params):
    def script(form):
        import streamlit as st

        from app import address, header
        from app.engine import Engine
        from app.jobs import Jobs
        from app.screens import time_machine

        if "jobs" not in st.session_state:
            st.session_state.jobs = Jobs(Engine())
        engine, jobs = st.session_state.jobs._engine, st.session_state.jobs
        address.read(engine)
        header.draw(engine, jobs)
        st.title("Explore")
        if form:  # a dialog is gone as soon as AppTest runs the script again
            time_machine.form(engine, jobs)
        else:
            time_machine.draw(engine, jobs)
        address.write()

    page = AppTest.from_function(script, kwargs={"form": form}, default_timeout=60)
    for name, value in params.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return page


def words(page):
    kinds = (page.markdown, page.caption, page.info, page.warning, page.error)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "")


def button(page, label):
    return next(one for one in page.button if label in one.label.replace("\\", ""))


def finished(page):
    """Run again once the job has ended."""
    jobs: Jobs = page.session_state.jobs
    for _ in range(600):
        if not list(jobs.running()):
            break
        time.sleep(0.1)
    page.run()
    assert not page.exception
    return page


def test_with_nothing_recorded_it_offers_to_record(workspace):
    page = opened()
    assert "None is recorded yet" in words(page)
    assert button(page, "Record a generation")


def test_a_generation_is_recorded_as_a_job_kept_in_the_workspace_and_put_on_screen(workspace, loaded):
    page = opened(form=True, keep="0.3", window="8")
    page.text_area(key="record_prompt").set_value(TEXT)
    page.text_input(key="record_continuation").set_value(" The sea was calm.").run()
    assert "more; the recording takes about" in words(page)
    button(page, "Start").click().run()
    page = finished(page)
    (entry,) = workspace.entries("timeline")
    timeline = workspace.open(Timeline, entry.id)
    assert timeline.given and timeline.spec == SPEC
    assert loaded.tokenizer.decode(timeline.sample.target) == " The sea was calm."
    assert page.session_state.timeline_id == entry.id
    assert "at the pace of the last one" in words(page)


def test_the_address_names_the_recording_and_the_tokens(recorded):
    id, timeline = recorded
    page = opened(timeline=id, tokens="3,5")
    assert f"Tokens 3 “{markup.visible(timeline.labels[3])}”, 5" in words(page)
    assert (page.query_params["tokens"], page.query_params["timeline"]) == ("3,5", id)
    assert len(page.get("plotly_chart")) == 2
    assert "None is recorded" not in words(page)


def test_tokens_that_it_does_not_have_are_left_out(recorded):
    page = opened(timeline=recorded[0], tokens="3,99999")
    assert "Token 3 “" in words(page)


def test_what_if_tells_the_change_that_a_plain_loop_measures(loaded, recorded):
    id, timeline = recorded
    page = opened(timeline=id)
    assert "No token is chosen" in words(page)
    first = timeline.missed(1).tolist()
    button(page, f"{first[0]} “").click().run()
    assert page.session_state.tokens == tuple(first)
    button(page, "What if it had stayed?").click().run()
    page = finished(page)
    _, without = fed_one_by_one(loaded, timeline, SPEC)
    _, pinned = fed_one_by_one(loaded, timeline, replace(SPEC, pinned=first))
    change = f"{np.mean(pinned) - np.mean(without):+.3f}".replace("-", "\N{MINUS SIGN}")
    gone = int((timeline.evicted[:, first] != 0).sum())
    assert f"{change} nats/token" in words(page) and f"for {gone} pairs more" in words(page)
    assert len(page.get("plotly_chart")) == 3
    assert "What if it had stayed?" not in [one.label for one in page.button]
    assert f"{change} nats/token" in words(opened(timeline=id, tokens=str(first[0])))  # in a fresh session


def test_the_whole_shortlist_is_asked_for_at_once(recorded):
    page = opened(timeline=recorded[0])
    button(page, "Ask for each of these").click().run()
    page = finished(page)
    listed = [one.label for one in page.button if one.key and one.key.startswith("missed_")]
    assert len(listed) == 8 and all("had it stayed" in label for label in listed)
    assert "ask_all" not in [one.key for one in page.button]


def test_a_token_that_no_head_evicted_has_no_what_if(workspace):
    id = workspace.add(invented(), name="a").id
    page = opened(timeline=id, tokens="0")
    assert "nothing would be different" in words(page)


def test_tokens_that_mean_harm_are_text(workspace):
    id = workspace.add(invented(labels=(HOSTILE[0], "**bold** :smile: $x$")), name="<b>a</b>").id
    page = opened(timeline=id, tokens="0,1")
    told = "\n".join(one.value for one in page.markdown)
    assert r"\<img·src\=x" in told or r"\<img·src=x" in told
    assert r"\*\*bold\*\*" in told and r"\$x\$" in told


def test_a_recording_of_other_weights_is_refused_in_a_sentence(workspace):
    id = workspace.add(invented(labels=("a", "b")), name="a").id  # no model has its digest
    page = opened(timeline=id, tokens="3")
    button(page, "What if it had stayed?").click().run()
    page = finished(page)
    assert "is not the model with which this was recorded" in words(page)
