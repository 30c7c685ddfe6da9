"""Keep quiet while values are packed and opened: the user's `__getstate__` may print.

Runs in the notebook and in workers. Only the thread that packs is silenced; others print meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["silence"]


class _Silent:
    """A stream that ignores what one thread writes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        """Pass text on, unless it is from the silenced thread."""
        if threading.get_ident() == self._thread:
            return len(text)
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Ignore what this thread prints on stdout; warnings are for the user to see."""
    stream: Any = sys.stdout
    silent: Any = _Silent(stream)
    sys.stdout = silent
    try:
        yield
    finally:
        if sys.stdout is silent:  # else somebody has set another meanwhile
            sys.stdout = stream
