"""Settings of a task, read from its dataclass: what a command line or a page needs to ask for them. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from analysis.errors import SettingsError
from l2kv.registry import Registry


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
    own: Any = None
    """The annotation itself where a task gives an option of its own in place of a text."""


def settings_of(kind: type) -> tuple[Setting, ...]:
    """Read the settings of a dataclass, whose fields are `Annotated[type, "What it is.", REGISTRY]`."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_setting(field.name, hints[field.name], _default(field)) for field in fields(kind))


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
    return Setting(name, about, kind, several, choices, default)
