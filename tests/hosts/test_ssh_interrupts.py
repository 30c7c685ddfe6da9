"""Ctrl-C at any moment of a call leaves no lock held that other threads of the connection would wait for."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fal_notebook.hosts.ssh_stream import Stream
from fal_notebook.hosts.ssh_transport import Bell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STRIKES = 150


@contextlib.contextmanager
def struck(seconds: float) -> Iterator[None]:
    """Interrupt this thread again and again, each time after `seconds` of its work."""
    previous = signal.signal(signal.SIGVTALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


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


class Outlet:
    """Takes what a stream sends."""

    def post(self, *_args: Any, **_options: Any) -> None:
        pass


@pytest.mark.timeout(120)
def test_a_bell_that_was_interrupted_rings_on() -> None:
    bell = Bell()

    strike_at(bell.ring)

    assert goes_on(bell.ring)
    assert goes_on(lambda: bell.wait(60))


@pytest.mark.timeout(120)
def test_a_stream_whose_user_was_interrupted_takes_what_arrives() -> None:
    stream = Stream(Outlet(), 1)  # type: ignore[arg-type]

    strike_at(lambda: stream.queued(0))
    assert goes_on(lambda: stream.unqueued(0))

    strike_at(lambda: stream.standard_error)
    assert goes_on(lambda: stream.unqueued(0))
