"""The registry of tasks. The command line and the app list it: a task added here, or by a caller, is offered there."""

from __future__ import annotations

from analysis.errors import SettingsError
from analysis.evaluation.lm import LM
from analysis.evaluation.passkey import PASSKEY
from analysis.evaluation.task import Task
from l2kv.registry import Registry

TASKS: Registry[Task] = Registry("task", SettingsError, {"lm": LM, "passkey": PASSKEY})
