"""Ctrl-C at any moment in the notebook's thread does not keep another thread from waking."""

from __future__ import annotations

import threading

import pytest

from fal_notebook.bell import Bell
from fal_notebook.display.watching import unwatch, watch
from tests.support.strikes import goes_on, strike_at


@pytest.mark.timeout(120)
def test_a_bell_that_was_interrupted_rings_on() -> None:
    bell = Bell()

    def ring_and_wait() -> None:
        bell.ring()
        bell.wait(0)

    strike_at(ring_and_wait)

    assert goes_on(bell.ring)
    assert goes_on(lambda: bell.wait(60))


class Item:
    """Notices that it is looked at."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def tick(self) -> None:
        self.seen.set()


@pytest.mark.timeout(120)
def test_what_is_watched_is_looked_at_also_after_interrupts() -> None:
    def watch_and_leave() -> None:
        item = Item()
        try:
            watch(item)
        finally:
            unwatch(item)

    strike_at(watch_and_leave)

    item = Item()
    watch(item)
    try:
        assert item.seen.wait(30)
    finally:
        unwatch(item)
