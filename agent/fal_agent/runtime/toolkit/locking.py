"""Let one process at a time make the same thing, while others wait for what it made.

Runs wherever user code runs. A lock is `flock` on a file, which stays, so it ends with its holder however
that ends; each use opens the file anew, so it holds between threads too.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fal_agent.runtime.toolkit.directories import made

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["alone"]

_POLL = 0.05  # seconds between two tries; an interrupt is seen in between


@contextmanager
def alone(path: Path, *, timeout: float = 7200.0) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is not there.

    Args:
        path: the file.
        timeout: seconds to wait for whoever holds it.

    Raises:
        TimeoutError: it was held all that time.
        OSError: the file cannot be made.
    """
    made(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {path} for {timeout:g} s") from None
                time.sleep(_POLL)
        yield
    finally:
        os.close(descriptor)
