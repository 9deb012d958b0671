"""The dialog "New run"."""

from streamlit.testing.v1 import AppTest


def test_start_without_a_text_says_what_is_missing_and_starts_nothing():
    def script():
        from app import new_run
        from app.engine import Engine
        from app.jobs import Jobs

        engine = Engine()
        new_run.dialog(engine, Jobs(engine))

    page = AppTest.from_function(script, default_timeout=60).run()
    page.text_area(key="new_text").set_value(" \n").run()
    start = page.button(key="start_run")
    assert not start.disabled and not page.error
    start.click().run()
    assert [part.value for part in page.error] == ["There is no text to capture. Type one, choose one or upload one."]
    assert not page.exception and "job_ids" not in page.session_state
