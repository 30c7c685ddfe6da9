"""What one thread rings to wake another, and that an interrupt cannot spoil."""

from __future__ import annotations

import contextlib
import threading

__all__ = ["Bell"]


class Bell:
    """Wakes the one thread that waits for it.

    An interrupt in the midst of `ring` leaves nothing held, as it would the lock of a `threading.Event`.
    """

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Wake the waiting thread, or the next that waits."""
        if self._silence.locked():
            with contextlib.suppress(RuntimeError):  # somebody else rang it in this very moment
                self._silence.release()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for a ring, at most `timeout` seconds (None: for good); the bell is silent again after it."""
        self._silence.acquire(timeout=-1 if timeout is None else timeout)
