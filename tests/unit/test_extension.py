"""What the architecture promises: an entry in a registry is all that an extension takes.

A toy is registered, and found in the command line's help and in the docs' table, with nothing else touched.
"""

from collections.abc import Iterator

import pytest

from analysis.evaluation.tasks import TASKS
from analysis.metrics import METRICS
from analysis.plans.strategies import STRATEGIES
from app.cli import main
from l2kv.policies import POLICIES
from tests.support.docs import registries

REGISTRIES = {  # and a command that offers its entries
    "policy": (POLICIES, "generate"),
    "metric": (METRICS, "study"),
    "task": (TASKS, "evaluate"),
    "strategy": (STRATEGIES, "plan"),
}


@pytest.fixture(params=REGISTRIES)
def command(request) -> Iterator[str]:
    """A command that offers the entries of a registry in which there is a toy now."""
    registry, name = REGISTRIES[request.param]
    registry.register("a_toy", next(iter(registry.values())))
    yield name
    registry.remove("a_toy")


def test_help_offers_it(command, capsys):
    assert main([command, "--help"]) == 0
    assert "a_toy" in capsys.readouterr().out


def test_the_page_plan_offers_a_strategy_and_the_controls_a_policy():
    from app.components.choices import policies, strategies

    STRATEGIES.register("a_toy", STRATEGIES["by_head"])
    POLICIES.register("a_toy", POLICIES["random"])
    try:
        assert "a_toy" in strategies() and "a_toy" in policies()
    finally:
        STRATEGIES.remove("a_toy")
        POLICIES.remove("a_toy")
    assert "a_toy" not in {*strategies(), *policies()}


def test_the_docs_list_it(command):
    assert "| `a_toy` |" in registries()


def test_without_it_neither_does(capsys):
    for _, command in REGISTRIES.values():
        assert main([command, "--help"]) == 0
    assert "a_toy" not in capsys.readouterr().out + registries()
