"""Choices that the app offers: entries of registries, so that a new one appears by itself. No widgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from analysis.evaluation.task import Task
from analysis.evaluation.tasks import TASKS
from analysis.metrics import METRICS, Metric
from analysis.plans.strategies import STRATEGIES, Strategy
from l2kv.policies import POLICIES, Policy


class Entry(Protocol):
    """An entry of a registry: what a user reads of it."""

    @property
    def title(self) -> str:
        """Name for users."""

    @property
    def about(self) -> str:
        """Description in one line."""


def policies() -> dict[str, Policy]:
    """List the policies that need nothing measured on the model."""
    return {name: policy for name, policy in POLICIES.items() if not policy.needs_calibration}


def metrics() -> dict[str, Metric]:
    """List the metrics of a head."""
    return dict(METRICS)


def tasks() -> dict[str, Task]:
    """List the tasks that a compression is scored on."""
    return dict(TASKS)


def strategies(*, measured: bool = False) -> dict[str, Strategy]:
    """List the allocation strategies for which the loss curves of a run are enough; with `measured`, all."""
    return {name: strategy for name, strategy in STRATEGIES.items() if measured or not strategy.needs_costs}


def explained(entries: Mapping[str, Entry]) -> str:
    """Write the help of a chooser as Markdown: a line for each entry."""
    return "\n".join(f"- **{entry.title}**: {entry.about}" for entry in entries.values())
