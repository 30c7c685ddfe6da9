"""Hold a lock that threads and processes of one machine respect.

Runs in the agent. A lock is a file with `flock` on it, so it ends with its holder however that
ends. Where `flock` is made of record locks (NFS), those do not tell the threads of a process apart:
a set of names does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from typing import TYPE_CHECKING, Optional

from fal_agent.errors import CallCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["held", "held_now"]

_POLL = 0.05  # seconds between two tries
_names: set[str] = set()  # what this process holds
_guard = threading.Lock()


@contextlib.contextmanager
def held(path: Path, *, cancelled: threading.Event, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold the lock of a path, waiting for it as long as it takes.

    Args:
        path: its file; it is made, and stays.
        cancelled: ends the waiting.
        waiting: called once if somebody else holds it.

    Yields:
        A descriptor. A child that inherits it keeps the lock should this process be killed.

    Raises:
        CallCancelledError: `cancelled` was set while waiting.
    """
    told = False
    while True:
        with held_now(path) as descriptor:
            if descriptor is not None:
                yield descriptor
                return
        if not told:
            told = True
            waiting()
        if cancelled.wait(_POLL):
            raise CallCancelledError("the call was cancelled while it waited for its environment")


@contextlib.contextmanager
def held_now(path: Path) -> Iterator[Optional[int]]:
    """Hold the lock of a path if nobody else does, else yield None at once."""
    descriptor = _take(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _take(path: Path) -> Optional[int]:
    with _guard:
        if str(path) in _names:
            return None
        _names.add(str(path))
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        if descriptor is not None:
            os.close(descriptor)
        with _guard:
            _names.discard(str(path))
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _release(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for children that outlive us with the descriptor
    finally:
        os.close(descriptor)
        with _guard:
            _names.discard(str(path))
