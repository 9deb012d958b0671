"""The dialog "New run"."""

from dataclasses import replace

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


def test_start_without_a_text_says_what_is_missing_and_starts_nothing():
    page = opened()
    page.text_area(key="new_text").set_value(" \n").run()
    start = page.button(key="start_run")
    assert not start.disabled and not page.error
    start.click().run()
    assert [part.value for part in page.error] == ["There is no text to capture. Type one, choose one or upload one."]
    assert not page.exception and "job_ids" not in page.session_state


def test_it_tells_the_time_roughly_at_first_and_by_earlier_runs_once_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "WORKSPACE", Workspace(tmp_path))
    page = opened()
    assert "a rough figure by the model's size and this machine's CPU" in page.markdown[1].value
    run = library.run(library.entries("run", model=state.model())[0].id)  # bundled: timed on another machine
    library.WORKSPACE.add(replace(run, seconds=600.0), name="slow")
    told = page.run().markdown[1].value
    assert told.endswith("min, by earlier runs.") and not page.exception
