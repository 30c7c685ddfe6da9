"""Wait for what must come, with a deadline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["is_alive", "until"]


def until(holds: Callable[[], Any], *, seconds: float = 20.0, must: bool = True) -> Any:
    """Wait until something holds and give what it gave.

    Args:
        holds: asked again and again.
        seconds: how long at most.
        must: fail when the time is over; otherwise give the last answer.
    """
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        if time.monotonic() > deadline:
            assert not must, f"{holds} did not come true within {seconds:g} s"
            break
        time.sleep(0.01)
    return value


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
