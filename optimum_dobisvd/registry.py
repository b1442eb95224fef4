"""A table of things by name: methods, allocations, factorizers, structures, encodings."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, in the order in which they were registered.

    Args:
        what: what an entry is, as messages call it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add an entry. ValueError for an empty name, or one that is taken."""
        if not name or name in self._entries:
            raise ValueError(f"{self.what} {name!r} is already registered or has no name; choose another name")
        self._entries[name] = entry
        return entry

    def get(self, name: Any) -> T:
        """Return the entry of that name. ValueError lists the names there are, the nearest first."""
        # A name may come straight from a hand-edited JSON file, so it need not be a string (nor hashable).
        if isinstance(name, str) and name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(str(name), self._entries, n=len(self._entries), cutoff=0.5)
        known = dict.fromkeys([*near, *self._entries])
        raise ValueError(f"unknown {self.what} {name!r}; known: {', '.join(known)}")

    def __contains__(self, name: Any) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
