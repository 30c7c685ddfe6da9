"""Draw a call's events in the Jupyter cell that waits for it: text, displays, and its card.

Runs in the notebook's kernel. What is drawn is text and HTML that survive saving.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Clear, Comm, Display, Failure, Log, Progress, Result, Stage
from fal_notebook.display.bars import BarDisplay
from fal_notebook.display.comms import CommBridge, without_dead_views
from fal_notebook.display.connecting import card_of_cell
from fal_notebook.display.errors import HeldError, hold_error, show_error, show_next_input, show_page
from fal_notebook.display.longtext import LongText
from fal_notebook.display.publishing import UpdatedDisplay, publish, publish_result
from fal_notebook.display.watching import unwatch, watch
from fal_notebook.hosts.steps import UPLOAD

if TYPE_CHECKING:
    from fal_notebook.display.run_card import Stoppable
    from fal_notebook.hosts.base import Received

__all__ = ["CellFace"]

_LIVE_LINES = 20  # of it that are shown while it goes on


class CellFace:
    """Draws in the cell that is running.

    Args:
        label: what the call is of.
        bridge: of the widgets of its session; None for its own.
        adds_up: bars of one name add up, see `Bars`.
        reason: how the call's requirements have changed, should an environment be built.
    """

    def __init__(
        self, label: str = "", bridge: CommBridge | None = None, *, adds_up: bool = False, reason: str = ""
    ) -> None:
        self._card = card_of_cell()
        self._card.reason = reason
        self._bridge = bridge or CommBridge()
        self._bars = BarDisplay(adds_up=adds_up)
        self._text = LongText(label)
        self._rest = _Rest(self._text)
        self._lock = threading.RLock()
        self._held: HeldError | None = None

    def draw(self, received: Received) -> None:
        """Draw one event."""
        event = received.event
        with self._lock:
            if isinstance(event, Stage) and event.phase != "run":
                self._card.enter(event)
            elif isinstance(event, Log) and event.source == "builder":
                self._card.add_lines(received.data[0])
            elif isinstance(event, Progress) and event.name == UPLOAD:
                self._card.sent(event.done, event.total or 0.0)
            else:
                self._card.end_phases(event.sent_at)
                self._draw_output(received)

    def look(self, run: Stoppable, began: float) -> None:
        """The call takes long, see `RunCard.look`; called by the watching thread."""
        self._card.look(run, began)

    def fold(self) -> None:
        """Nobody waits for the call any more."""
        self._card.finish()
        self._rest.tick()
        self._bars.tick()

    def close(self) -> None:
        """The call is over."""
        self._card.finish()
        self._bars.close()
        self._rest.close()
        self._text.close()

    def _draw_output(self, received: Received) -> None:
        event = received.event
        if self._held is not None and isinstance(event, (Log, Display, Clear, Comm)):
            self._held.later.append(received)
        elif isinstance(event, Comm):
            self._bridge.draw(received)
        elif isinstance(event, Display):
            self._draw_display(event.kind, json.loads(bytes(received.data[0])))
        elif isinstance(event, Log):
            self._draw_text(received, event.stream)
        elif isinstance(event, Progress):
            self._bars.take(event)
        elif isinstance(event, Clear):
            from IPython.display import clear_output

            self._rest.forget()
            self._bars.close()
            self._text.clear()
            clear_output(wait=event.wait)
        elif isinstance(event, (Result, Failure)):
            self.close()

    def _draw_text(self, received: Received, name: str) -> None:
        text = self._text.take(received)
        if text:
            stream = sys.stdout if name == "stdout" else sys.stderr
            stream.write(text)
            stream.flush()
        if self._text.is_long:
            self._rest.show()

    def _draw_display(self, kind: str, content: dict[str, Any]) -> None:
        data, metadata = without_dead_views(content["data"]), content["metadata"]
        if kind == "result":
            publish_result(data, metadata)
        elif kind == "page":
            show_page(data, metadata["start"])
        elif kind == "next_input":
            show_next_input(data["text/plain"], replace=metadata["replace"])
        elif kind != "error":
            display_id = content["transient"].get("display_id")
            publish(data, metadata, display_id=display_id, update=kind == "update")
        elif metadata["own"]:
            self._held = hold_error(data, self._draw_later)
        else:
            show_error(data)

    def _draw_later(self, received: Received) -> None:
        """Draw what came after the cell's error."""
        self._held = None
        self._draw_output(received)


class _Rest:
    """The end of a text that is too long for the cell, in a display that is updated in place."""

    def __init__(self, text: LongText) -> None:
        self._text = text
        self._display: UpdatedDisplay | None = None
        self._lock = threading.Lock()
        self._is_drawn = True

    def show(self) -> None:
        """There is more of it."""
        self._is_drawn = False
        if self._display is None:
            self._display = UpdatedDisplay()
            self._display.show(self._bundle(_LIVE_LINES))
            watch(self)

    def tick(self) -> None:
        """Draw what has come; called by the watching thread."""
        with self._lock:
            if not self._is_drawn and self._display is not None:
                self._is_drawn = True
                self._display.update(self._bundle(_LIVE_LINES))

    def close(self) -> None:
        """There will be no more: show as much as is kept."""
        unwatch(self)
        with self._lock:
            display, self._display = self._display, None
            if display is not None:
                display.update(self._bundle(None))
                display.close()

    def forget(self) -> None:
        """It was cleared."""
        unwatch(self)
        with self._lock:
            display, self._display = self._display, None
            if display is not None:
                display.close()

    def _bundle(self, lines: int | None) -> dict[str, str]:
        return {"text/plain": self._text.rest_text(), "text/html": self._text.rest_html(lines)}
