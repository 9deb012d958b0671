"""The registry of tasks. The command line and the app list it: a task added here, or by a caller, is offered there."""

from __future__ import annotations

from analysis.errors import SettingsError
from analysis.evaluation.benchmarks import FRAME_TASK, LONGBENCH2_TASK, LONGBENCH_TASK, NEEDLE_TASK, RULER_TASK
from analysis.evaluation.lm import LM
from analysis.evaluation.passkey import PASSKEY
from analysis.evaluation.task import Task
from l2kv.registry import Registry

TASKS: Registry[Task] = Registry(
    "task",
    SettingsError,
    {
        "lm": LM,
        "passkey": PASSKEY,
        "needle": NEEDLE_TASK,
        "ruler": RULER_TASK,
        "longbench": LONGBENCH_TASK,
        "longbench2": LONGBENCH2_TASK,
        "frame": FRAME_TASK,
    },
)
