"""Spawn apps for a test, and stop those that it leaves."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SECONDS", "spawning"]

SECONDS = 60.0  # in which an app must be ready


@contextmanager
def spawning() -> Iterator[Callable[..., Any]]:
    """Give what spawns an app class on a host and, as a rule, waits for it; all are stopped at the end."""
    spawned: list[Any] = []

    def do(cls: Any, host: Any, *, wait: bool = True) -> Any:
        info = cls.spawn(host=host)
        spawned.append(info)
        if wait:
            info.wait(startup_timeout=SECONDS)
        return info

    yield do
    for info in spawned:
        if not info.future.done():
            info.stop()
