"""Registries of what can be chosen by name. Whatever lists the choices reads them, so a new entry changes no caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name, in the order in which they were registered.

    Args:
        noun: word for an entry in messages, such as "policy".
        error: error that `find` raises for an unknown name.
        entries: entries to begin with.
    """

    def __init__(self, noun: str, error: type[Exception], entries: Mapping[str, Entry] | None = None) -> None:
        self.noun, self.error = noun, error
        self._entries: dict[str, Entry] = dict(entries or {})

    def register(self, name: str, entry: Entry) -> Entry:
        """Add an entry and return it. Raises ValueError if the name is taken, or is no identifier."""
        if not (isinstance(name, str) and self._may_be_called(name)):
            raise ValueError(f"a {self.noun} needs a name of letters, digits and underscores, got {name!r:.60}")
        if name in self._entries:
            raise ValueError(f"the {self.noun} {name!r} exists already: choose another name")
        self._entries[name] = entry
        return entry

    def _may_be_called(self, name: str) -> bool:
        return name.isidentifier()  # it must be typed, in lists with commas too

    def remove(self, name: str) -> None:
        """Remove an entry. Raises KeyError if there is none."""
        del self._entries[name]

    def find(self, name: object) -> Entry:
        """Find the entry of a user's name. Raises `error`, which lists the choices and suggests the nearest."""
        if isinstance(name, str) and name in self:
            return self[name]
        close = get_close_matches(name, self._entries, n=1) if isinstance(name, str) else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise self.error(f"{self.noun} must be one of {', '.join(self._entries)}, got {name!r:.60}.{hint}")

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
