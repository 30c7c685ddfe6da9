"""One thread that looks now and then at what the notebook waits for, and lets it draw itself.

Runs in the notebook. Most calls are over before it looks, and cost nothing but an entry in a list; it sleeps
for good while nothing is waited for.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from fal_notebook.bell import Bell

__all__ = ["TICK", "Watched", "unwatch", "watch"]

TICK = 0.5  # seconds between two looks
_PATIENCE = 10.0  # seconds without anything to look at after which the thread sleeps for good


class Watched(Protocol):
    """Something that takes its time."""

    def tick(self) -> None:
        """Look at it; called in the watching thread."""


_watched: list[Watched] = []
_bell = Bell()
_thread: threading.Thread | None = None


def watch(item: Watched) -> None:
    """Let an item be looked at, until `unwatch`."""
    global _thread  # noqa: PLW0603 - there is one, but none in a forked child
    _watched.append(item)
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_look, name="fal-watch", daemon=True)
        _thread.start()
    _bell.ring()


def unwatch(item: Watched) -> None:
    """Let it be."""
    if item in _watched:
        _watched.remove(item)


def _look() -> None:
    while True:
        _bell.wait()
        idle_since = time.monotonic()
        while _watched or time.monotonic() - idle_since < _PATIENCE:
            time.sleep(TICK)
            for item in _watched:
                idle_since = time.monotonic()
                item.tick()
