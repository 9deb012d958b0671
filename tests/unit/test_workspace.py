"""The workspace keeps records by their content, lists them without opening them, and survives what is not one."""

import time

import pytest

from analysis import workspace as workspaces
from analysis.errors import RecordError
from analysis.plans.skip import Plan
from analysis.workspace import Workspace
from l2kv.spec import CompressionSpec


def a_plan(model="toy", ratio=0.5):
    return Plan(model=model, spec=CompressionSpec(keep_ratio=ratio))


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "deep" / "down")


def test_an_empty_workspace_lists_nothing_and_makes_no_folder(workspace):
    assert workspace.entries() == [] and not workspace.folder.exists()


def test_a_record_comes_back_by_its_id_in_another_process_too(workspace):
    entry = workspace.add(a_plan(), name="half")
    assert (entry.kind, entry.model, entry.name) == ("plan", "toy", "half")
    assert Workspace(workspace.folder).open(Plan, entry.id) == a_plan()


def test_the_same_record_has_one_id_everywhere_and_another_has_another(workspace, tmp_path):
    first = workspace.add(a_plan(), name="half")
    again, elsewhere = workspace.add(a_plan(), name="renamed"), Workspace(tmp_path / "other").add(a_plan(), name="half")
    assert first.id == again.id == elsewhere.id and [entry.name for entry in workspace.entries()] == ["renamed"]
    assert workspace.add(a_plan(ratio=0.4), name="less").id != first.id


def test_the_newest_comes_first_and_lists_are_of_a_kind_or_a_model(workspace):
    for model, ratio in (("a", 0.1), ("b", 0.2), ("a", 0.3)):
        workspace.add(a_plan(model, ratio), name=f"{model}{ratio}")
        time.sleep(0.002)
    assert [entry.name for entry in workspace.entries()] == ["a0.3", "b0.2", "a0.1"]
    assert [entry.name for entry in workspace.entries("plan", model="a")] == ["a0.3", "a0.1"]
    assert workspace.entries("run") == []


def test_a_record_is_renamed_and_deleted_with_its_file(workspace):
    entry = workspace.add(a_plan(), name="half")
    assert workspace.rename(entry.id, "a better name").name == "a better name"
    workspace.delete(entry.id)
    workspace.delete(entry.id)  # gone already
    assert workspace.entries() == [] and list(workspace.folder.iterdir()) == []
    with pytest.raises(RecordError, match="nothing with the id"):
        workspace.path(entry.id)


def test_a_file_is_taken_in_with_the_id_it_has_elsewhere_and_a_foreign_one_is_refused(workspace, tmp_path):
    elsewhere = Workspace(tmp_path / "other")
    entry = elsewhere.add(a_plan(), name="half")
    assert workspace.add_file(elsewhere.path(entry.id)).id == entry.id
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    with pytest.raises(RecordError, match=r"foreign\.json is not"):
        workspace.add_file(tmp_path / "foreign.json")
    assert len(list(workspace.folder.iterdir())) == 2


@pytest.mark.parametrize("id", ["", "../../etc/passwd", "0" * 11, "0" * 12, "x" * 12, "\0"])
def test_an_id_that_is_none_finds_nothing(workspace, id):
    workspace.add(a_plan(), name="half")
    assert workspace.find(id) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"l2kv_entry": 1}', '{"id": "0", "file": "../../x"}'])
def test_a_damaged_description_is_left_out_of_the_list(workspace, text):
    entry = workspace.add(a_plan(), name="half")
    (workspace.folder / f"{'1' * 12}.about.json").write_text(text)
    assert [one.id for one in workspace.entries()] == [entry.id]


def test_no_file_outside_the_folder_is_opened_for_a_forged_description(workspace, tmp_path):
    entry = workspace.add(a_plan(), name="half")
    about = workspace.folder / f"{entry.id}.about.json"
    about.write_text(about.read_text().replace(entry.file, "../../secret.json"))
    with pytest.raises(RecordError):
        workspace.open(Plan, entry.id)


def test_the_same_question_finds_its_results_again(workspace):
    asked = {"task": "lm", "methods": {"half": CompressionSpec()}, "settings": {"n": 3}}
    assert workspace.results_file(asked) == workspace.results_file(dict(reversed(asked.items())) | asked)
    assert workspace.results_file(asked)[0] != workspace.results_file(asked | {"task": "passkey"})[0]


def test_a_list_of_a_thousand_opens_no_record(workspace, monkeypatch):
    for i in range(1000):
        workspace._note(f"{i:012x}", workspace.folder / f"{i:012x}.json", a_plan(), str(i))
    monkeypatch.setattr(workspaces, "load", None)
    assert len(workspace.entries()) == 1000
