"""What is being done to reach a host, told to whoever shows it.

Runs in the notebook.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["UPLOAD", "Listener", "connecting", "listen", "tell"]

UPLOAD = (
    "fal:upload"  # name of the `wire.Progress` of data on its way to the host, which is made on this side
)


class Listener(Protocol):
    """Shows how a connection is made."""

    def tell(self, text: str) -> None:
        """Something else is being done now."""

    def end(self, *, is_connected: bool) -> None:
        """There is a connection, or there will be none."""


_make: Callable[[str], Listener | None] | None = None
_current: list[Listener] = []


def listen(make: Callable[[str], Listener | None]) -> None:
    """Let connections be shown.

    Args:
        make: gives what shows a connection to a host of that name, in the thread that makes it.
    """
    global _make  # noqa: PLW0603 - there is one notebook
    _make = make


@contextmanager
def connecting(host_name: str) -> Iterator[None]:
    """Tell that a host is being connected, while the block runs."""
    listener = _make(host_name) if _make is not None else None
    if listener is None:
        yield
        return
    _current.append(listener)
    is_connected = False
    try:
        yield
        is_connected = True
    finally:
        _current.remove(listener)
        listener.end(is_connected=is_connected)


def tell(text: str) -> None:
    """Say what is being done now to make a connection."""
    for listener in _current[-1:]:
        listener.tell(text)
