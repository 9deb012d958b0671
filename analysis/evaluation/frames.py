"""Examples from kvpress's data frames, so that both programs can run the same file. Knows no model."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import RecordError, SettingsError
from analysis.evaluation.examples import Example
from analysis.evaluation.longbench import LONGBENCH
from analysis.evaluation.ruler import RULER
from analysis.evaluation.scoring import SCORERS, check_scorable

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("context", "question", "answer_prefix", "task", "max_new_tokens")
"""Columns that a frame must have, beside `answer` or `answers`."""


def read_frame(path: str | Path, *, scorer: str | None = None) -> tuple[Example, ...]:
    """Read examples from a data frame in kvpress's format: .csv, .parquet, .jsonl or .json.

    Args:
        scorer: one of `SCORERS`, for tasks that are neither RULER's nor LongBench's; theirs have their own.

    Raises:
        RecordError: the frame or a row is malformed; the message says which.
        SettingsError: a task has no known scorer, or the scorer is unknown.
    """
    path = Path(path)
    frame = _frame(path)
    named = "answers" if "answers" in frame else "answer"
    if missing := [name for name in (*COLUMNS, named) if name not in frame]:
        raise RecordError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}."
        )
    if frame.empty:
        raise RecordError(f"{path} holds no examples.")
    rows = frame.rename(columns={named: "answers"}).to_dict("records")
    places = [f"{path}, row {number}" for number in range(len(rows))]
    if path.suffix == ".csv":
        rows = [_with_lists(where, row) for where, row in zip(places, rows, strict=True)]
    return tuple(
        _example(where, number, row, scorer) for number, (where, row) in enumerate(zip(places, rows, strict=True))
    )


def scorer_of(task: str) -> str | None:
    """Find the scorer of a task of RULER, LongBench or LongBench v2; None for others."""
    if task in RULER:
        return RULER[task].scorer
    if (base := task.removesuffix("_e").removesuffix("-e")) in LONGBENCH:
        return LONGBENCH[base].scorer
    return "choice" if task in ("longbench2", "0shot") else None


def _frame(path: Path) -> pd.DataFrame:
    import pandas as pd  # takes half a second, which few commands need

    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": lambda file: pd.read_csv(file, dtype=str, keep_default_na=False),
        ".parquet": pd.read_parquet,
        ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False),
        ".json": lambda file: pd.read_json(file, dtype=False),
    }
    if path.suffix not in readers:
        raise RecordError(f"{path} must end in {', '.join(readers)}.")
    try:
        return readers[path.suffix](path)
    except Exception as error:  # each reader has errors of its own, the parquet engine's among them
        raise RecordError(f"{path} cannot be read: {str(error)[:300]}.") from error


def _example(where: str, number: int, row: Mapping[Hashable, Any], scorer: str | None) -> Example:
    texts = {name: row[name] for name in ("context", "question", "answer_prefix", "task")}
    if wrong := next((name for name, value in texts.items() if not isinstance(value, str)), None):
        raise RecordError(f"{where}: `{wrong}` must be text, got {texts[wrong]!r:.60}.")
    task, answers = str(row["task"]), _texts(row["answers"])
    name = scorer or scorer_of(task)
    if name is None:
        raise SettingsError(f"{where}: no scorer is known for the task {task!r}. Name one of {', '.join(SCORERS)}.")
    example = Example(
        f"{task} {number}",
        task,
        row["context"],
        row["question"],
        row["answer_prefix"],
        answers,
        _count(where, row["max_new_tokens"]),
        name,
        _texts(row.get("all_classes")),
    )
    return check_scorable(example, where)


def _texts(cell: Any) -> tuple[str, ...]:
    """The texts of a cell: a list of them, or one."""
    if isinstance(cell, str):
        return (cell,) if cell else ()
    if hasattr(cell, "__iter__"):
        return tuple(map(str, cell))
    return () if cell is None or cell != cell else (str(cell),)  # NaN where there is none


def _with_lists(where: str, row: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """The row of a .csv file, in which lists are text, with the lists that are meant."""
    lists: dict[Hashable, Any] = {}
    for name in ("answers", "all_classes"):
        cell = row.get(name, "")
        if cell.startswith("["):
            lists[name] = _listed(cell)
            if lists[name] is None:
                raise RecordError(f"{where}: `{name}` begins as a list, but is none: {cell[:60]!r}. Write it as JSON.")
    return {**row, **lists}


def _listed(text: str) -> list[Any] | None:
    """The list that JSON or Python wrote as this text."""
    with suppress(ValueError, RecursionError):
        return list(json.loads(text))
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.List) and all(isinstance(item, ast.Constant) for item in tree.elts):
            listed = [item.value for item in tree.elts if isinstance(item, ast.Constant)]
            return listed if repr(listed) == text else None  # NumPy writes ['a' 'b'], which Python reads as ['ab']
    return None


def _count(where: str, cell: Any) -> int:
    text = str(cell).removesuffix(".0")
    if not text.isdecimal() or int(text) < 1:
        raise RecordError(f"{where}: `max_new_tokens` must be a number of tokens, 1 or more, got {cell!r}.")
    return int(text)
