"""Notice which values of a session a cell changed in place.

Runs in a worker. A value that the notebook holds too has a mark: the hashes of its pickle when both
agreed. After a cell the marks of what it may have touched are compared. Small values are looked at
after every cell, larger ones after those that read them, or read a function that uses them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.namespaces import Dumped, dump_named
from fal_agent.pickling import ATOMS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from fal_agent.sharing import SharedObjects

__all__ = ["SMALL", "Watch"]

SMALL = 16 << 10  # bytes; a smaller value is looked at after every cell
_MANY = 256  # small values that are looked at, at most
_CHUNK = 1 << 20  # bytes that are hashed at once


class Watch:
    """The marks of one namespace.

    Args:
        namespace: the session's.
    """

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._marks: dict[str, tuple[Any, int, set[str]]] = {}  # name -> mark, bytes, names it needs
        self._apart: set[str] = set()  # the notebook holds another value, and is not to get this one

    def note(self, name: str, dumped: Optional[Dumped] = None, *, apart: bool = False) -> None:
        """Both sides hold the same value under a name from now on.

        Args:
            name: the name.
            dumped: the value pickled, where that has been done.
            apart: they do not, but that is how it is to be.
        """
        value = self._namespace[name]
        (self._apart.add if apart else self._apart.discard)(name)
        if type(value) in ATOMS:
            self._marks.pop(name, None)  # it cannot change
            return
        dumped = dumped or _dumped(value, self._namespace)
        if dumped is None:
            self._marks.pop(name, None)
        else:
            self._marks[name] = _mark(dumped), dumped.size, dumped.needs

    def note_new(self, names: Iterable[str]) -> None:
        """The notebook has got these values by another way than a cell's reply."""
        for name in names:
            if name not in self._marks and name in self._namespace:
                self.note(name)

    def forget(self, names: Iterable[str]) -> None:
        """The notebook does not hold these values."""
        for name in names:
            self._marks.pop(name, None)

    def changed(
        self, read: Collection[str], bound: Collection[str], sharing: Optional[SharedObjects]
    ) -> dict[str, Optional[Dumped]]:
        """Give the values that were changed in place, pickled where that was done; they keep their marks.

        Args:
            read: names that the cell read.
            bound: names that it bound, which are looked at no further.
            sharing: what this session has in common with the notebook.
        """
        small = [name for name, (_, size, _) in self._marks.items() if size <= SMALL][:_MANY]
        found: dict[str, Optional[Dumped]] = {}
        for name in self._with_needs([*read, *small]):
            if name in bound or name not in self._namespace:
                continue
            value, is_shared = self._namespace[name], False
            if (
                sharing is not None
                and sharing.has(name)
                and sharing.is_quick(name)
                and name not in self._apart
            ):
                is_shared = True
                with suppress(Exception):  # what cannot be pickled any more is found out below
                    if sharing.is_current(name, value):
                        continue
            dumped = _dumped(value, self._namespace)
            if dumped is None:  # it cannot travel any more: the notebook gets a handle
                found[name] = Dumped([], set())
            elif (is_shared or _mark(dumped) != self._marks[name][0]) and not self._is_unsteady(name, dumped):
                found[name] = dumped
        return found

    def _with_needs(self, names: list[str]) -> list[str]:
        """Give the names that have marks, and those that functions in their values use."""
        seen: dict[str, None] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in seen and name in self._marks:
                seen[name] = None
                waiting += self._marks[name][2]
        return sorted(seen)

    def _is_unsteady(self, name: str, dumped: Dumped) -> bool:
        """Whether a value's pickle differs each time, as that of a figure does."""
        again = _dumped(self._namespace[name], self._namespace)
        return again is None or _mark(again) != _mark(dumped)


def _dumped(value: Any, namespace: dict[str, Any]) -> Optional[Dumped]:
    try:
        return dump_named(value, namespace)
    except Exception:  # noqa: BLE001 - pickling runs the user's code
        return None


def _mark(dumped: Dumped) -> tuple[int, ...]:
    """Hash a pickle: Python's own hash is quick, and keyed anew in every process, which is enough here."""
    hashes = [len(dumped.parts)]
    for part in dumped.parts:
        view = memoryview(part)
        hashes += [len(view), *(hash(bytes(view[at : at + _CHUNK])) for at in range(0, len(view), _CHUNK))]
    return tuple(hashes)
