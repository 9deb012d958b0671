"""Policies of a researcher's own, from a Python file. The file is run, so only a person at the keyboard names one.

Nothing that reads records, uploads or links calls this: there, a name of such a policy is a name (see `l2kv.policies`).
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from l2kv.errors import SpecError
from l2kv.policies import OF_FILE, POLICIES, Pairs, Policy, not_loaded

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(keys [B, h, T, D], values [B, h, T, D], positions [B, h, T] int64) -> scores that broadcast to [B, h, T]."""


def load_policy(where: str) -> str:
    """Run a Python file, register a function in it as an eviction policy, and return the name of the policy.

    The function is `score(keys, values, positions)`, see `Score`: it is called at each eviction with the T pairs that a
    layer's kv heads, or some of them, hold, in no order, and those of higher score are kept. It must not change them.
    Keys are as cached, after rotary embedding; positions are those in the text, negative in a row's padding.

    The policy's name is "my.py:score@" and a digest of the file, so results of a changed file are never mixed.

    Args:
        where: file and function, as "folder/my.py:score".

    Raises:
        SpecError: there is no such file or function, the file's name is none that a module may have, or running it
            fails; the message says where.
    """
    path, _, function = where.rpartition(":")
    file = Path(path).expanduser()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise SpecError(
            f"A policy of your own is given as FILE.py:FUNCTION, got {where!r:.200}: {error.strerror}."
        ) from error
    return _loaded(file, function, source)


def reload_policy(name: str, source: bytes) -> None:
    """Register in this process a policy that another one of the same user loaded, from the bytes of its file.

    Raises:
        SpecError: running it fails here.
    """
    of_file = OF_FILE.fullmatch(name)
    assert of_file is not None, name
    again = _loaded(Path(f"{of_file[2]}.py"), of_file[3], source)
    assert again == name, (again, name)


def _loaded(file: Path, function: str, source: bytes) -> str:
    """Run a file's bytes, register a function in it, and return the name of the policy. Raises SpecError."""
    label = f"{file.name}:{function}"
    name = f"{label}@{hashlib.sha256(source).hexdigest()[:8]}"
    if not OF_FILE.fullmatch(name):
        raise SpecError(
            f"A policy of your own is given as FILE.py:FUNCTION, two names of letters, digits and underscores, got "
            f"{f'{file}:{function}'!r:.200}."
        )
    if name not in _sources:
        POLICIES.register(name, Policy(_checked(_function(file, source, function), file), label, on_arrival=False))
        _sources[name] = source
    return name


_sources: dict[str, bytes] = {}


def policy_source(name: str) -> tuple[str, str, bytes]:
    """Find the module, the function and the file's bytes of a policy that was loaded here.

    Raises:
        SpecError: it was not, or it is of no file.
    """
    of_file = OF_FILE.fullmatch(name)
    if of_file is None:
        raise SpecError(f"The policy {name} is of no file: give my.py:score, a function of your own.")
    if name not in _sources:
        raise not_loaded(name)
    return of_file[2], of_file[3], _sources[name]


def _function(file: Path, source: bytes, name: str) -> Score:
    """Run a file, and find a function in it. Raises SpecError."""
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
    except Exception as error:
        raise SpecError(_told(error, file)) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise SpecError(f"{file} has no function {name}; it has {', '.join(known) or 'none'}.")
    return function  # type: ignore[no-any-return]  # any callable


def _checked(function: Score, file: Path) -> Callable[[Pairs], Tensor]:
    """The function as a policy's score; what it raises, and scores that cannot be ranked, are a SpecError."""

    def score(pairs: Pairs) -> Tensor:
        positions = pairs.positions.expand(pairs.keys.shape[:3])
        try:
            scores = function(pairs.keys, pairs.values, positions)
        except Exception as error:
            raise SpecError(_told(error, file)) from error
        if got := _unfit(scores, pairs.keys):
            raise SpecError(
                f"{file}: {getattr(function, '__name__', function)} gave {got}; wanted are real numbers that broadcast "
                f"to {list(positions.shape)}, [rows, kv heads, pairs], on {pairs.keys.device}, none of them NaN."
            )
        return scores.float()

    score.__doc__ = inspect.getdoc(function) or f"Keep what {file.name} scores highest."
    return score


def _unfit(scores: object, keys: Tensor) -> str:
    """What is wrong with the scores of keys [B, h, T, D], in words; empty if nothing is."""
    import torch

    if not isinstance(scores, torch.Tensor):
        return f"a {type(scores).__name__}"
    if scores.dtype == torch.bool or scores.is_complex():
        return f"numbers of type {str(scores.dtype).removeprefix('torch.')}"
    wanted = keys.shape[:3]
    if len(scores.shape) > 3 or any(n not in (1, m) for n, m in zip(scores.shape[::-1], wanted[::-1], strict=False)):
        return f"a shape of {list(scores.shape)}"
    if scores.device != keys.device:
        return f"numbers on {scores.device}"
    nan = int(scores.isnan().sum())
    return f"NaN for {nan} of {scores.numel()} pairs" if nan else ""


def _told(error: Exception, file: Path) -> str:
    """An exception of a user's code in one line, with the last line of the file that it came through."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{file}, line {error.lineno}: {error.msg}."
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"{file}, line {lines[-1].lineno}, in {lines[-1].name}" if lines else str(file)
    return f"{place}: {type(error).__name__}: {' '.join(str(error).split())}"
