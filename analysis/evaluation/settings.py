"""Settings of a task, read from its dataclass: what a command line or a page needs to ask for them. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from math import inf, isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from analysis.errors import SettingsError
from l2kv.registry import Registry


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the most that a number may be."""

    least: float = 0
    most: float = inf

    def __str__(self) -> str:
        return f"from {self.least:g} to {self.most:g}" if isfinite(self.most) else f"{self.least:g} or more"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: what it is called, what it takes, and what it is by default."""

    name: str
    about: str
    kind: Any
    """Type of the value, or of each one where there are `several`."""
    several: bool
    choices: Registry[Any] | None
    """Registry that the value is a name in; None where it is none."""
    default: Any
    bounds: Bounds = Bounds()
    """Of the value where it is a number, or of each one."""
    own: Any = None
    """The annotation itself where a task gives an option of its own in place of a text."""


def settings_of(kind: type) -> tuple[Setting, ...]:
    """Read the settings of a dataclass, whose fields are `Annotated[type, "What it is."]`.

    A name in a registry has that as a third part, and a number that may not be all from 0 on its `Bounds`.
    """
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_setting(field.name, hints[field.name], _default(field)) for field in fields(kind))


def check_settings(settings: Any) -> None:
    """Check that each number of a task's settings is within its bounds. Raises SettingsError."""
    for one in settings_of(type(settings)):
        value = getattr(settings, one.name)
        for number in value if one.several else (value,):
            if one.kind in (int, float) and not one.bounds.least <= number <= one.bounds.most:
                raise SettingsError(f"{one.name} must be {one.bounds}, got {number:g}")


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _setting(name: str, hint: Any, default: Any) -> Setting:
    kind, about, *more = (*get_args(hint), "")[:3] if get_origin(hint) is Annotated else (hint, "")
    if not isinstance(about, str):
        return Setting(name, "", kind, False, None, default, own=hint)
    if get_origin(kind) in (Union, UnionType):  # None is its default
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if several := get_origin(kind) in (tuple, Sequence):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        more = [Registry("value", SettingsError, {one: one for one in get_args(kind)})]
    choices = more[0] if more and isinstance(more[0], Registry) else None
    bounds = more[0] if more and isinstance(more[0], Bounds) else Bounds()
    return Setting(name, about, kind, several, choices, default, bounds)
