"""Choices that the app offers: entries of registries, so that a new one appears by itself. No widgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

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


def strategies() -> dict[str, Strategy]:
    """List the allocation strategies that need no more than the loss curves of a run."""
    return {name: strategy for name, strategy in STRATEGIES.items() if not strategy.needs_costs}


def explained(entries: Mapping[str, Entry]) -> str:
    """Write the help of a chooser as Markdown: a line for each entry."""
    return "\n".join(f"- **{entry.title}**: {entry.about}" for entry in entries.values())
