"""Draw what runs in the background: one display for all runs of a cell, which stays with that cell.

Runs in the notebook's kernel.
"""

from __future__ import annotations

import html
import json
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Clear, Comm, Display, Failure, Log, Progress, Result
from fal_notebook.display.bars import Bars
from fal_notebook.display.comms import without_dead_views
from fal_notebook.display.errors import plain_text
from fal_notebook.display.longtext import LongText, chosen_limit
from fal_notebook.display.publishing import as_text, note, publish, running
from fal_notebook.hosts.steps import UPLOAD

if TYPE_CHECKING:
    from fal_notebook.display.comms import CommBridge
    from fal_notebook.hosts.base import Received

__all__ = ["BackgroundFace"]

_REDRAW_SECONDS = 0.2  # between two updates of a display
_REDRAW_PER_CHARACTER = 2e-6  # seconds more, since a front end lays out the whole text each time
_LAST_LINES = 20  # of a long text, while it goes on
_HEAD = 100_000  # characters of a run's text that are shown from its beginning


class BackgroundFace:
    """One run in the background; what it prints is drawn on the board of the cell that started it."""

    def __init__(self, label: str, bridge: CommBridge | None = None) -> None:
        self.label, self._bridge = label, bridge
        self.text: list[str] = []
        self.long = LongText(label, min(_HEAD, chosen_limit()))
        self.bars = Bars()
        self.is_over = self.has_failed = False
        self._board = _board()
        self._board.add(self)

    def draw(self, received: Received) -> None:
        """Take one event and redraw soon; called from any thread."""
        event = received.event
        with self._board.lock:
            if isinstance(event, Progress) and event.name == UPLOAD:
                return
            if isinstance(event, Log) and event.source != "builder":
                self.text.append(self.long.take(received))
            elif isinstance(event, Display):
                self._show(event.kind, json.loads(bytes(received.data[0])))
            elif isinstance(event, Comm):
                if self._bridge is not None:
                    self._bridge.draw(received, self._board.parent)
            elif isinstance(event, Progress):
                self.bars.take(event)
            elif isinstance(event, Clear):
                self.text, self.bars = [], Bars()
                self.long.clear()
            elif isinstance(event, (Result, Failure)):
                self.is_over, self.has_failed = True, isinstance(event, Failure)
                self.long.close()
            self._board.redraw_soon()

    def _show(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "next_input":  # the cell that comes next has nothing to do with it
            return
        if kind != "error":
            self._board.show(content, update=kind == "update")
        elif not content["metadata"]["own"]:  # that one is raised by `result()`
            self.text.append(plain_text(content["data"]))


class _Board:
    """One display that belongs to a cell, with the runs that the cell left in the background.

    It is there from the moment the first of them starts, so that what they print later finds its
    place, in a saved notebook too.
    """

    def __init__(self, parent: Any) -> None:
        self.lock = threading.RLock()
        self.parent = parent
        self._display_id = f"fal-{uuid.uuid4().hex}"
        self._faces: list[BackgroundFace] = []
        self._drawn_at = 0.0
        self._size = 0  # characters that were drawn last
        self._timer: threading.Timer | None = None

    def add(self, face: BackgroundFace) -> None:
        """Take one more run."""
        with self.lock:
            self._faces.append(face)
            if len(self._faces) == 1:
                self._publish(update=False)
            else:
                self.redraw_soon()

    def show(self, content: dict[str, Any], *, update: bool) -> None:
        """Show something that is more than text, below the board."""
        display_id = content["transient"].get("display_id")
        data = without_dead_views(content["data"])
        publish(data, content["metadata"], display_id=display_id, update=update, parent=self.parent)

    def redraw_soon(self) -> None:
        """Draw what has changed, not more often than the eye can follow."""
        if self._timer is None:
            pause = _REDRAW_SECONDS + _REDRAW_PER_CHARACTER * self._size
            wait = max(0.0, pause - (time.monotonic() - self._drawn_at))
            self._timer = threading.Timer(wait, self.redraw_now)
            self._timer.daemon = True
            self._timer.start()

    @property
    def is_settled(self) -> bool:
        """Whether every run is over and nothing will change."""
        return all(face.is_over for face in self._faces)

    def redraw_now(self) -> None:
        """Draw what there is."""
        with self.lock:
            self._timer = None
            self._drawn_at = time.monotonic()
            self._publish(update=True)

    def _publish(self, *, update: bool) -> None:
        headline = self._headline()
        plain, rich = f"{headline}\n", note(html.escape(headline))
        for face in self._faces:
            text = _after_returns("".join(face.text))
            text += "" if text.endswith("\n") or not text else "\n"
            plain, rich = plain + text, rich + (as_text(text) if text else "")
            if face.long.is_long:
                plain += f"{face.long.rest_text()}\n"
                rich += face.long.rest_html(_LAST_LINES if not face.is_over else None)
            if face.bars:
                plain += "".join(f"{line}\n" for line in face.bars.lines())
                rich += face.bars.html()
        self._size = len(plain)
        shown = {"text/plain": plain.rstrip("\n"), "text/html": rich}
        # An update is found by its id, whatever cell it comes from; some front ends hear only the
        # cell that is running.
        parent = running.parent if update else self.parent
        publish(shown, {}, display_id=self._display_id, update=update, parent=parent)

    def _headline(self) -> str:
        count = len(self._faces)
        over = sum(1 for face in self._faces if face.is_over)
        failed = sum(1 for face in self._faces if face.has_failed)
        what = self._faces[0].label if count == 1 else f"{count} calls"
        state = "done" if over == count else f"{over} of {count} done" if count > 1 else "running"
        return f"{what} in the background: {state}" + (f", {failed} failed" if failed else "")


def _after_returns(text: str) -> str:
    """What a terminal shows of a text with carriage returns."""
    return "\n".join(
        line.rsplit("\r", 1)[-1] if "\r" in line.rstrip("\r") else line for line in text.split("\n")
    )


def _board() -> _Board:
    """The board of the cell that runs, made if it has none."""
    running.watch()
    board = _boards[-1] if _boards else None
    if board is None or board.parent is not running.parent:
        board = _Board(running.parent)
        _boards[:] = [board]
        running.follow(board)
    return board


_boards: list[_Board] = []  # of the cell that has left something in the background last
