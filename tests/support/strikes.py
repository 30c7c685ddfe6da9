"""Strikes a piece of code with Ctrl-C at whatever moment, and looks whether it left a lock held."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STRIKES = 150


@contextlib.contextmanager
def struck(seconds: float) -> Iterator[None]:
    """Interrupt this thread again and again, each time after `seconds` of its work."""
    gc.disable()  # what strikes it while it collects is lost, and said to be
    previous = signal.signal(signal.SIGVTALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        gc.enable()


def strike_at(action: Callable[[], object]) -> None:
    """Do something over and over until it has been interrupted `STRIKES` times."""
    strikes = 0
    while strikes < STRIKES:
        try:
            with struck(0.001):
                while True:
                    action()
        except KeyboardInterrupt:
            strikes += 1


def goes_on(action: Callable[[], object]) -> bool:
    """Whether another thread can do something."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()
