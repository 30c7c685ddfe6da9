"""Draw a call's events in a Jupyter cell: text, displays, and one line about slow phases.

Runs in the notebook's kernel. What is drawn is text and HTML that survive saving. A run in the
background owns one display and updates it, so that its output stays with the cell that started it,
whatever runs meanwhile.
"""

from __future__ import annotations

import html
import json
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Clear, Display, Failure, Log, Result, Stage
from fal_notebook.display.errors import (
    HeldError,
    hold_error,
    plain_text,
    show_error,
    show_next_input,
    show_page,
)
from fal_notebook.display.phases import TICK, Phases, TextDecoder

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Received

__all__ = ["BackgroundFace", "CellFace", "UpdatedDisplay", "publish_result"]

_REDRAW_SECONDS = 0.2  # between two updates of a display
_HEAD, _TAIL = 100_000, 200_000  # characters of a background run's text that are shown


class CellFace:
    """Draws in the cell that is running."""

    def __init__(self) -> None:
        self._phases = Phases()
        self._line = _StatusLine(_parent_header())
        self._decode = TextDecoder()
        self._lock = threading.RLock()
        self._ticker: threading.Timer | None = None
        self._held: HeldError | None = None

    def draw(self, received: Received) -> None:
        """Draw one event."""
        event = received.event
        with self._lock:
            if isinstance(event, Stage) and event.phase != "run":
                self._phases.enter(event)
                self._look_again()
            elif isinstance(event, Log) and event.source == "builder":
                self._phases.add_lines(received.data[0])
                self._line.show(self._phases)
            else:
                self._end_phases(event.sent_at)
                self._draw_output(received)

    def _look_again(self) -> None:
        """Keep the line about phases up to date while nothing is heard."""
        if self._phases.ended_at is None:
            self._line.show(self._phases)
            self._ticker = threading.Timer(TICK, self._tick)
            self._ticker.daemon = True
            self._ticker.start()

    def _tick(self) -> None:
        with self._lock:
            if self._ticker is threading.current_thread():
                self._look_again()

    def _end_phases(self, at: float) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        if self._phases.ended_at is None:
            self._phases.end(at)
            self._line.finish(self._phases)

    def _draw_output(self, received: Received) -> None:
        event = received.event
        if self._held is not None and isinstance(event, (Log, Display, Clear)):
            self._held.later.append(received)
        elif isinstance(event, Display):
            self._draw_display(event.kind, json.loads(bytes(received.data[0])))
        else:
            self._draw_text(received)

    def _draw_text(self, received: Received) -> None:
        event = received.event
        if isinstance(event, Log):
            stream = sys.stdout if event.stream == "stdout" else sys.stderr
            stream.write(self._decode(received))
            stream.flush()
        elif isinstance(event, Clear):
            from IPython.display import clear_output

            clear_output(wait=event.wait)

    def _draw_display(self, kind: str, content: dict[str, Any]) -> None:
        data, metadata = content["data"], content["metadata"]
        if kind == "result":
            publish_result(data, metadata)
        elif kind == "page":
            show_page(data, metadata["start"])
        elif kind == "next_input":
            show_next_input(data["text/plain"], replace=metadata["replace"])
        elif kind != "error":
            display_id = content["transient"].get("display_id")
            _publish(data, metadata, display_id=display_id, update=kind == "update")
        elif metadata["own"]:
            self._held = hold_error(data, self._draw_later)
        else:
            show_error(data)

    def _draw_later(self, received: Received) -> None:
        """Draw what came after the cell's error."""
        self._held = None
        self._draw_output(received)


class BackgroundFace:
    """One run in the background; what it prints is drawn on the board of the cell that started it."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.text: list[str] = []
        self.is_over = self.has_failed = False
        self._size = 0
        self._decode = TextDecoder()
        self._board = _running.board()
        self._board.add(self)

    def draw(self, received: Received) -> None:
        """Take one event and redraw soon; called from any thread."""
        event = received.event
        with self._board.lock:
            if isinstance(event, Log) and event.source == "user":
                self._add(self._decode(received))
            elif isinstance(event, Display):
                self._show(event.kind, json.loads(bytes(received.data[0])))
            elif isinstance(event, Clear):
                self.text, self._size = [], 0
            elif isinstance(event, (Result, Failure)):
                self.is_over, self.has_failed = True, isinstance(event, Failure)
            self._board.redraw_soon()

    def _show(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "next_input":  # the cell that comes next has nothing to do with it
            return
        if kind != "error":
            self._board.show(content, update=kind == "update")
        elif not content["metadata"]["own"]:  # that one is raised by `result()`
            self._add(plain_text(content["data"]))

    def _add(self, text: str) -> None:
        self.text.append(text)
        self._size += len(text)
        if self._size > 2 * (_HEAD + _TAIL):
            whole = "".join(self.text)
            left_out = len(whole) - _HEAD - _TAIL
            self.text = [whole[:_HEAD], f"\n[… {left_out} characters …]\n", whole[-_TAIL:]]
            self._size = sum(map(len, self.text))


class _Board:
    """One display that belongs to a cell, with the runs that the cell left in the background.

    It is there from the moment the first of them starts, so that what they print later finds its
    place, in a saved notebook too.
    """

    def __init__(self, parent: Any) -> None:
        self.lock = threading.RLock()
        self._parent = parent
        self._display_id = f"fal-{uuid.uuid4().hex}"
        self._faces: list[BackgroundFace] = []
        self._drawn_at = 0.0
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
        _publish(
            content["data"], content["metadata"], display_id=display_id, update=update, parent=self._parent
        )

    def redraw_soon(self) -> None:
        """Draw what has changed, not more often than the eye can follow."""
        if self._timer is None:
            wait = max(0.0, _REDRAW_SECONDS - (time.monotonic() - self._drawn_at))
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
        texts = [_after_returns("".join(face.text)) for face in self._faces]
        body = "".join(text if text.endswith("\n") else text + "\n" for text in texts if text)
        shown = {
            "text/plain": f"{headline}\n{body}".rstrip("\n"),
            "text/html": _note(html.escape(headline)) + (_text(body) if body else ""),
        }
        # An update is found by its id, whatever cell it comes from; some front ends hear only the
        # cell that is running.
        parent = _running.parent if update else self._parent
        _publish(shown, {}, display_id=self._display_id, update=update, parent=parent)

    def _headline(self) -> str:
        count = len(self._faces)
        over = sum(1 for face in self._faces if face.is_over)
        failed = sum(1 for face in self._faces if face.has_failed)
        what = self._faces[0].label if count == 1 else f"{count} calls"
        state = "done" if over == count else f"{over} of {count} done" if count > 1 else "running"
        return f"{what} in the background: {state}" + (f", {failed} failed" if failed else "")


class _RunningCell:
    """The cell that is running, or ran last, its board, and the displays that may still change."""

    def __init__(self) -> None:
        self.parent: Any = None
        self._board: _Board | None = None
        self._followed: list[_Board | UpdatedDisplay] = []

    def board(self) -> _Board:
        """The board of the running cell, made if it has none."""
        self._watch()
        if self._board is None:
            self._board = _Board(self.parent)
            self.follow(self._board)
        return self._board

    def follow(self, display: _Board | UpdatedDisplay) -> None:
        """Let a display redraw when a cell starts, until it is settled."""
        self._watch()
        self._followed = [known for known in self._followed if not known.is_settled]
        self._followed.append(display)

    def _watch(self) -> None:
        if self.parent is None:
            from IPython import get_ipython

            get_ipython().events.register("pre_run_cell", self._enter)
            self.parent = _parent_header()

    def _enter(self, *_info: Any) -> None:
        """A cell starts: what changed while none was running is drawn now."""
        self.parent, self._board = _parent_header(), None
        for display in self._followed:
            display.redraw_now()


_running = _RunningCell()


class _StatusLine:
    """One line about slow phases, updated in place; nothing when all went quickly.

    Args:
        parent: the message of the cell that it belongs to.
    """

    def __init__(self, parent: Any) -> None:
        self._parent = parent
        self._display_id: str | None = None
        self._drawn_at = 0.0

    def show(self, phases: Phases) -> None:
        """Draw the phases if they take long, not more often than the eye can follow."""
        now = time.time()
        if phases.is_worth_telling(now) and now - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = now
            self._publish(phases.headline(now), list(phases.lines))

    def finish(self, phases: Phases) -> None:
        """Fold to what it came to."""
        if phases.is_worth_telling(time.time()):
            self._publish(phases.headline(time.time()), [])

    def _publish(self, headline: str, lines: list[str]) -> None:
        is_new = self._display_id is None
        self._display_id = self._display_id or f"fal-{uuid.uuid4().hex}"
        body = "".join(f"<br>{html.escape(line)}" for line in lines)
        shown = {
            "text/plain": "\n".join([headline, *(f"  {line}" for line in lines)]),
            "text/html": _note(html.escape(headline) + body),
        }
        _publish(shown, {}, display_id=self._display_id, update=not is_new, parent=self._parent)


class UpdatedDisplay:
    """One display in as many cells as show it, which may be updated in all of them, from any thread."""

    def __init__(self) -> None:
        self._display_id = f"fal-{uuid.uuid4().hex}"
        self._data: dict[str, Any] = {}
        self._is_shown = self._may_be_missed = False
        self._lock = threading.Lock()
        self.is_settled = False
        _running.follow(self)

    def show(self, data: dict[str, Any]) -> None:
        """Show this in the cell that is running, and wherever it was shown before."""
        if self._is_shown:
            self.update(data)
        with self._lock:
            self._data, self._is_shown = data, True
            _publish(data, {}, display_id=self._display_id, parent=_parent_header())

    def update(self, data: dict[str, Any]) -> None:
        """Show this instead of what was shown before."""
        with self._lock:
            self._data, self._may_be_missed = data, True
            self._publish()

    def redraw_now(self) -> None:
        """A cell starts: repeat what a front end may have missed that hears only running cells."""
        with self._lock:
            if self._may_be_missed:
                self._may_be_missed = False
                self._publish()

    def _publish(self) -> None:
        # As with a board: an update is found by its id, whatever cell it comes from.
        _publish(self._data, {}, display_id=self._display_id, update=True, parent=_running.parent)

    def close(self) -> None:
        """There will be no further update, but for those who missed the last one."""
        self.is_settled = True


def _note(content: str) -> str:
    """HTML of a remark of ours, which is not to be mistaken for the cell's own output."""
    return f'<div style="color:#777">fal · {content}</div>'


def _text(content: str) -> str:
    """HTML of text as a cell prints it; front ends put wide margins around their own."""
    return f'<pre style="margin:0; padding:0">{html.escape(content)}</pre>'


def publish_result(data: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Show the value of a cell's last expression as the cell's own result; also in a terminal."""
    from IPython import get_ipython

    hook = get_ipython().displayhook
    hook.start_displayhook()
    hook.write_output_prompt()
    hook.write_format_data(data, metadata)
    hook.finish_displayhook()


def _publish(
    data: dict[str, Any],
    metadata: dict[str, Any],
    *,
    display_id: str | None = None,
    update: bool = False,
    parent: Any = None,
) -> None:
    from IPython import get_ipython

    publisher = get_ipython().display_pub
    transient = {"display_id": display_id} if display_id else {}
    if parent is None:
        publisher.publish(data, metadata, transient=transient, update=update)
        return
    # The public way knows only the cell that runs now; a run in the background belongs to another.
    content = {"data": data, "metadata": metadata, "transient": transient}
    kind = "update_display_data" if update else "display_data"
    publisher.session.send(publisher.pub_socket, kind, content, parent=parent, ident=publisher.topic)


def _parent_header() -> Any:
    """The message of the cell that is running, to which its output belongs."""
    from IPython import get_ipython

    return get_ipython().kernel.get_parent("shell")


def _after_returns(text: str) -> str:
    """What a terminal shows of a text with carriage returns."""
    return "\n".join(
        line.rsplit("\r", 1)[-1] if "\r" in line.rstrip("\r") else line for line in text.split("\n")
    )
