"""The dialog "New run"."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from streamlit.testing.v1 import AppTest

from analysis.workspace import Workspace
from app import library, state


def opened():
    def script():
        from app import new_run
        from app.engine import Engine
        from app.jobs import Jobs

        engine = Engine()
        new_run.dialog(engine, Jobs(engine))

    return AppTest.from_function(script, default_timeout=60).run()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" \n", "There is no text to capture. Type one, choose one or upload one."),
        ("Yes", "at least 4 are needed to rank them"),
        ("one more word " * 100_000, "Shorten it to about"),
    ],
)
def test_a_text_that_cannot_be_captured_is_refused_before_start_and_another_is_not(monkeypatch, text, said):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**30))
    page = opened()
    assert not page.button(key="start_run").disabled and not page.error
    page.text_area(key="new_text").set_value(text).run()
    (error,) = page.error
    assert said in error.value.replace("\\", "") and page.button(key="start_run").disabled and not page.exception
    page.text_area(key="new_text").set_value("It was a fine day, and the pony went on.").run()
    assert not page.error and not page.button(key="start_run").disabled


def test_a_text_beyond_what_the_model_was_trained_on_is_warned_of_and_may_be_captured():
    page = opened()
    page.text_area(key="new_text").set_value("one more word " * 4000).run()
    (warning,) = page.warning
    assert "goes beyond the" in warning.value and not page.button(key="start_run").disabled and not page.error


def test_a_text_of_ones_own_is_called_so_and_a_file_by_its_name():
    page = opened()
    first = page.selectbox(key="new_preset").value
    assert page.text_input[0].value == first
    page.text_area(key="new_text").set_value("It was a fine day, and the pony went on.").run()
    assert page.selectbox(key="new_preset").value == "My own text"
    assert page.text_input[0].value == "It was a fine day, and"
    page.file_uploader(key="new_file").upload("diary of 1904.txt", b"A quiet day at the mill.", "text/plain").run()
    assert page.selectbox(key="new_preset").value == page.text_input[0].value == "diary of 1904"
    assert page.text_area(key="new_text").value == "A quiet day at the mill." and not page.exception
    page.selectbox(key="new_preset").set_value(first).run()
    assert page.text_input[0].value == first and page.text_area(key="new_text").value.startswith("The fat pony")


def test_a_file_that_is_no_text_is_refused_with_the_reason():
    page = opened()
    page.file_uploader(key="new_file").upload(
        "bad.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\x81\x00", "application/pdf"
    ).run()
    (error,) = page.error
    assert "bad.pdf is not text" in error.value.replace("\\", "") and not page.exception


def test_it_tells_the_time_roughly_at_first_and_by_earlier_runs_once_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "WORKSPACE", Workspace(tmp_path))
    page = opened()
    assert "a rough figure by the model's size and this machine's CPU" in page.markdown[1].value
    run = library.run(library.entries("run", model=state.model())[0].id)  # bundled: timed on another machine
    library.WORKSPACE.add(replace(run, seconds=600.0), name="slow")
    told = page.run().markdown[1].value
    assert told.endswith("min, by earlier runs.") and not page.exception
