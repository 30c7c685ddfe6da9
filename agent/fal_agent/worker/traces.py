"""Tell whether a name of a session still stands for the value that it stood for before a cell.

Runs in a worker.
"""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["Trace"]

_ATOMS = (int, float, complex, bool, type(None))


class Trace:
    """Tells whether a name still stands for a value, without keeping that: `del` frees it at once."""

    __slots__ = ("_id", "_ref")

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._ref: Any = weakref.ref(value)
        except TypeError:
            # What is small is kept. A list or the like leaves its address, which another may have got since.
            self._ref = (lambda: value) if isinstance(value, _ATOMS) else None

    def is_of(self, value: Any, may_be_new: bool) -> bool:
        """Whether this is the value; `may_be_new` says that the name may have been bound again."""
        if self._ref is None:
            return self._id == id(value) and not may_be_new
        return self._ref() is value
