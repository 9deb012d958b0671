"""What the app offers to choose from: entries of registries, so that a new one is offered on its own. No widgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from analysis.evaluation.task import Task
from analysis.evaluation.tasks import TASKS
from analysis.metrics import METRICS, Metric
from analysis.plans.strategies import STRATEGIES, Strategy
from l2kv.policies import POLICIES, Policy


class Entry(Protocol):
    """An entry of a registry, as a user meets it."""

    @property
    def title(self) -> str:
        """Its name, for people."""

    @property
    def about(self) -> str:
        """What it is, in a line."""


def policies() -> dict[str, Policy]:
    """The policies that need nothing measured on the model."""
    return {name: policy for name, policy in POLICIES.items() if not policy.needs_calibration}


def metrics() -> dict[str, Metric]:
    """The metrics of a head."""
    return dict(METRICS)


def tasks() -> dict[str, Task]:
    """The tasks that a compression is scored on."""
    return dict(TASKS)


def strategies(*, measured: bool = False) -> dict[str, Strategy]:
    """The allocation strategies that the loss curves of a run are enough for; with `measured`, all."""
    return {name: strategy for name, strategy in STRATEGIES.items() if measured or not strategy.needs_costs}


def explained(entries: Mapping[str, Entry]) -> str:
    """Markdown: a line for each entry, the help of what chooses among them."""
    return "\n".join(f"- **{entry.title}**: {entry.about}" for entry in entries.values())
