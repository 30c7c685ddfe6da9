"""Show how a host is connected, if that takes a while: a line in the cell that waits for it, or on stderr.

Runs in the notebook. In a cell it is the first line of the card of the run that follows.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from fal_notebook.display.phases import WORTH_TELLING, Phases
from fal_notebook.display.publishing import running
from fal_notebook.display.run_card import RunCard
from fal_notebook.display.watching import unwatch, watch

if TYPE_CHECKING:
    from fal_notebook.hosts.steps import Listener

__all__ = ["card_of_cell", "shown"]

_cards: list[RunCard] = []  # of the connection that was made last


def shown(host_name: str) -> Listener | None:
    """Give what shows a connection to a host; None where a thread connects that no cell waits for."""
    if threading.current_thread() is not threading.main_thread():
        return None
    from fal_notebook.display import in_kernel

    return _InCell(host_name) if in_kernel() else _OnStderr(host_name)


def card_of_cell() -> RunCard:
    """Give the card of the running cell's call, which may have begun with a connection."""
    card = _cards.pop() if _cards else None
    return card if card is not None and card.parent is running.parent else RunCard()


class _InCell:
    """The beginning of a card."""

    def __init__(self, host_name: str) -> None:
        running.watch()
        self._name = host_name
        self._card = RunCard(host_name)
        self._card.begin("connect", host_name)

    def tell(self, text: str) -> None:
        """Something else is being done now."""
        self._card.begin("connect", f"{self._name} · {text}")

    def end(self, *, is_connected: bool) -> None:
        """There is a connection, or there will be none."""
        self._card.begin("connect", self._name)
        if is_connected:
            self._card.end_phases(time.time())
            _cards[:] = [self._card]
        else:
            self._card.finish()


class _OnStderr:
    """A line when it begins to take long."""

    def __init__(self, host_name: str) -> None:
        self._phases = Phases()
        self._name = host_name
        self._told = ""
        self._phases.begin("connect", host_name, time.time())
        watch(self)

    def tell(self, text: str) -> None:
        """Something else is being done now."""
        self._phases.begin("connect", f"{self._name} · {text}", time.time())

    def end(self, *, is_connected: bool) -> None:  # noqa: ARG002 - what went wrong is raised
        """There is a connection, or there will be none."""
        unwatch(self)

    def tick(self) -> None:
        """Say what is being done; called by the watching thread."""
        phase = self._phases.passed[-1]
        if phase.seconds(time.time()) >= WORTH_TELLING and phase.text != self._told:
            self._told = phase.text
            sys.stderr.write(f"{phase.line(time.time())}\n")
