"""The page Evaluate: what it asks for comes from the registries, and what it measured is there after a reload."""

import time

import pytest

from analysis.evaluation import batches
from analysis.evaluation.results import FULL
from analysis.evaluation.settings import settings_of
from analysis.evaluation.tasks import TASKS
from analysis.workspace import Workspace
from app import library
from app.engine import Engine
from app.jobs import Job, Jobs
from tests.support.screens import opened as opened_screen


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "workspace")
    monkeypatch.setattr(library, "WORKSPACE", workspace)
    return workspace


@pytest.fixture(scope="module")
def server():
    engine = Engine()
    return engine, Jobs(engine)


def opened(server, **params):
    return opened_screen("evaluate", server=server, **params)


def a_small_passkey(page):
    page.text_input(key="task_passkey_lengths").set_value("120")
    page.text_input(key="task_passkey_depths").set_value("0.5")
    page.number_input(key="task_passkey_keys").set_value(2)
    page.multiselect(key="evaluate_policies").set_value(["low_norm"]).run()
    return page


def measured(page, jobs):
    page.button(key="start_evaluation").click().run()
    job = jobs.find("".join(page.query_params["job"]))
    for _ in range(600):
        if not job.running:
            return job
        time.sleep(0.1)
    raise AssertionError(job)


@pytest.mark.parametrize("task", list(TASKS))
def test_each_task_has_its_settings_on_the_page(server, workspace, task):
    page = opened(server, task=task)
    asked = {widget.key for kind in ("text_input", "number_input", "multiselect") for widget in page.get(kind)}

    files = ("path", "questions")
    named = {
        f"task_{task}_{setting.name}" for setting in settings_of(TASKS[task].settings) if setting.name not in files
    }
    assert {key for key in named if not key.endswith("_scorer")} <= asked


def test_what_was_measured_is_listed_and_opens_by_its_link(server, workspace):
    page = a_small_passkey(opened(server))
    job = measured(page, server[1])
    assert job.status == "done", job.message
    page.run()
    assert not page.exception and not page.error
    table = page.dataframe[0].value
    assert list(table["method"]) == [FULL, "random 0.5", "protected ends + random 0.5", "low norm 0.5"]
    assert list(table["n"]) == [2] * 4 and len(set(table["MiB held"][1:])) == 1
    link = {name: "".join(values) for name, values in page.query_params.items()}
    assert link["results"] == job.result == workspace.entries("results")[0].id
    again = opened(server, **link)
    assert again.dataframe[0].value.equals(table)


def test_rows_are_shown_as_they_come_kept_when_cancelled_and_not_computed_again(server, workspace, monkeypatch):
    monkeypatch.setattr(batches, "TOKENS_AT_ONCE", 1000)  # else it is done with the first batch
    page = a_small_passkey(opened(server))
    page.number_input(key="task_passkey_keys").set_value(40).run()
    page.button(key="start_evaluation").click().run()
    job = server[1].find("".join(page.query_params["job"]))
    while job.running and not page.dataframe:
        time.sleep(0.05)
        page.run()
    assert job.running and not page.exception
    so_far = page.dataframe[0].value["n"]
    assert len(set(so_far)) == 1 and 0 < so_far[0] < 120 and "Being measured" in "".join(c.value for c in page.caption)
    (delete,) = (button for button in page.button if button.label == "Delete")
    assert delete.disabled  # the file is being written
    page.button(key=f"job_cancel_{job.id}").click().run()
    while job.running:
        time.sleep(0.01)
    assert job.status == "cancelled", job.message
    (entry,) = workspace.entries("results")
    before = workspace.path(entry.id).stat().st_size
    rows = workspace.path(entry.id).read_text().count('"sample":')
    page.run()
    assert not page.exception
    assert f"{rows} of 160 scores are kept" in page.info[0].value and "goes on from there" in page.info[0].value
    again = measured(page, server[1])
    assert again.status == "done" and again.result == entry.id
    assert workspace.path(entry.id).stat().st_size > before and len(workspace.entries("results")) == 1


def test_nothing_is_listed_where_it_is_cancelled_before_the_first_score(server, workspace, monkeypatch):
    page = a_small_passkey(opened(server))
    monkeypatch.setattr(Job, "__call__", cancelled_at_the_first_count(Job.__call__))
    job = measured(page, server[1])
    assert job.status == "cancelled" and job.done == 0 < job.total
    page.run()
    assert "nothing is kept" in page.info[0].value and not workspace.entries("results") and not page.exception


def cancelled_at_the_first_count(call):
    def counted(job, done, total, what):
        if total:
            job.cancel()
        call(job, done, total, what)

    return counted


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("task_passkey_lengths", "many", "must be numbers such as 400, 1000; got 'many'"),
        ("task_passkey_lengths", "", "is empty"),
        ("task_passkey_lengths", "-5, 400", "lengths must be 1 or more, got -5"),
        ("task_passkey_lengths", "10, 999999", "more than the 10 asked for"),
        ("task_passkey_depths", "1.5", "depths must be from 0 to 1, got 1.5"),
    ],
)
def test_a_bad_setting_is_refused_in_a_line_before_anything_runs(server, workspace, key, text, said):
    page = opened(server, task="passkey")
    page.text_input(key=key).set_value(text).run()
    assert not page.exception and len(page.error) == 1 and said in page.error[0].value.replace("\\", "")
    assert not [button for button in page.button if button.key == "start_evaluation"]


@pytest.mark.parametrize("task", ["passkey", "needle", "ruler"])
def test_lengths_that_the_task_or_the_model_has_no_room_for_are_told_before_anything_runs(server, workspace, task):
    page = opened(server, task=task)
    lengths = page.text_input(key=f"task_{task}_lengths")
    lengths.set_value("10").run()
    assert len(page.error) == 1 and "10" in page.error[0].value and not page.exception
    assert not [button for button in page.button if button.key == "start_evaluation"]
    lengths.set_value("999999").run()
    (warning,) = page.warning
    assert "1000000 tokens it goes beyond" in warning.value and not page.error and not page.exception
    assert [button for button in page.button if button.key == "start_evaluation"]


def test_what_the_first_settings_lack_is_told_when_they_are_started(server, workspace):
    page = opened(server, task="longbench")
    assert not page.error
    page.button(key="start_evaluation").click().run()
    assert "none was given" in page.error[0].value.replace("\\", "") and not page.exception
    assert "job" not in page.query_params and not workspace.entries("results")


def test_a_text_is_measured_in_excerpts(server, workspace):
    page = opened(server, task="lm")
    page.number_input(key="task_lm_prompt_tokens").set_value(40)
    page.number_input(key="task_lm_new_tokens").set_value(4)
    page.text_area(key="documents_pasted").set_value(
        "It was a fine day, and the pony went on over the bridge. " * 60
    ).run()
    page.number_input(key="excerpts").set_value(3)
    page.multiselect(key="evaluate_policies").set_value(["low_norm"]).run()
    job = measured(page, server[1])
    assert job.status == "done", job.message
    page.run()
    assert list(page.dataframe[0].value["n"]) == [3] * 4 and not page.exception
