"""The extension table of docs and architecture: one entry in a registry, and command line, app and docs have it.

A toy of each kind is registered, with nothing else touched, looked for where users would, and removed again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import pytest

from analysis.evaluation.task import Scoring, Task
from analysis.evaluation.tasks import TASKS
from analysis.metrics import METRICS, Metric
from analysis.plans.allocation import Budget
from analysis.plans.strategies import STRATEGIES, Strategy
from analysis.studies import load_study, save_study, study_of
from app.cli import main
from app.components import choices
from l2kv.policies import POLICIES, Pairs, Policy
from l2kv.registry import Registry
from tests.support.docs import cli, registries
from tests.support.paths import BUNDLED
from tests.support.runs import random_run


def oldest_first(pairs: Pairs):
    """Keep the oldest."""
    return -pairs.positions.float()


@dataclass(frozen=True)
class Rounds:
    """Settings of the toy task."""

    rounds: Annotated[int, "Rounds to play."] = 3


@dataclass(frozen=True)
class Extension:
    """A row of the table: what is registered, and where it is to be seen."""

    registry: Registry
    entry: object
    commands: tuple[str, ...]
    """Commands whose help lists the entries."""
    offered: Callable[[], Mapping[str, object]]
    """What the app's pages choose among."""
    row: str
    """Of the docs' table."""


TABLE = {
    "policy": Extension(
        POLICIES,
        Policy(oldest_first, "A toy"),
        ("generate", "savings", "evaluate passkey"),
        choices.policies,
        "| `a_toy` | A toy | Keep the oldest. | nothing |",
    ),
    "metric": Extension(
        METRICS,
        Metric("A toy", "the attention there is", lambda row: row.mass, low=0, high=1, ranks=False),
        ("study",),
        choices.metrics,
        "| `a_toy` | A toy | the attention there is | 0 to 1 |",
    ),
    "task": Extension(
        TASKS,
        Task("A toy", "Play.", "share", True, lambda *_: (), Rounds, scoring=Scoring(lambda sample, text: 1.0)),
        ("evaluate",),
        choices.tasks,
        "| `a_toy` | A toy | Play. | share, higher is better |",
    ),
    "strategy": Extension(
        STRATEGIES,
        Strategy("A toy", "All the same.", "plan", Budget.even),
        ("plan", "front"),
        choices.strategies,
        "| `a_toy` | A toy | All the same. | nothing |",
    ),
}


@pytest.fixture
def toy(request) -> Iterator[Extension]:
    """A row of the table, whose entry is registered meanwhile."""
    extension = TABLE[request.param]
    extension.registry.register("a_toy", extension.entry)
    yield extension
    extension.registry.remove("a_toy")


each = pytest.mark.parametrize("toy", TABLE, indirect=True)


@each
def test_the_help_of_its_commands_lists_it(toy, capsys):
    for command in toy.commands:
        assert main([*command.split(), "--help"]) == 0
        assert "a_toy" in capsys.readouterr().out


@each
def test_the_app_offers_it(toy):
    assert toy.offered()["a_toy"] is toy.entry
    assert f"- **A toy**: {toy.entry.about}" in choices.explained(toy.offered())


@each
def test_the_docs_list_it(toy):
    assert toy.row in registries() and "a_toy" in cli()


def test_without_it_nothing_does(capsys):
    for extension in TABLE.values():
        assert "a_toy" not in extension.offered()
        for command in extension.commands:
            assert main([*command.split(), "--help"]) == 0
    assert "a_toy" not in capsys.readouterr().out + registries() + cli()


@pytest.mark.parametrize("toy", ["policy"], indirect=True)
def test_a_policy_is_taken_by_name_and_a_hyphen_is_as_good(toy, capsys):
    assert main(["savings", "books-5m", "--policy", "a-toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["policy"] == "a_toy"


@pytest.mark.parametrize("toy", ["metric"], indirect=True)
def test_a_metric_is_measured_in_every_head_and_old_studies_still_open(toy, capsys):
    assert main(["heads", str(BUNDLED / "demo.safetensors"), "--json"]) == 0
    assert all(0 < row["a_toy"] <= 1 for row in json.loads(capsys.readouterr().out)["rows"])
    assert "a_toy" not in load_study(BUNDLED / "study.safetensors").metrics


@pytest.mark.parametrize("toy", ["task"], indirect=True)
def test_a_task_has_a_command_whose_options_are_its_settings(toy, capsys):
    assert main(["evaluate", "a-toy", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Play." in told and "--rounds <int> Rounds to play. [default: 3]" in told and "--excerpts" not in told


@pytest.mark.parametrize("toy", ["strategy"], indirect=True)
def test_a_strategy_plans_from_a_study(toy, tmp_path, capsys):
    study = save_study(study_of(random_run(), protect_last=0), tmp_path / "study.safetensors")
    assert main(["plan", str(study), "--strategy", "a-toy", "--protect-last", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["strategy"] == "a_toy" and {row["keep_ratio"] for row in told["rows"]} == {0.5}
