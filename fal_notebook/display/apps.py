"""How a spawned app looks: a card with its state, its link and the end of its log.

Runs in the notebook. In a kernel the card is one display, in as many cells as show it, that is updated in
place until the app ends; elsewhere the app's log goes to this process's own streams.
"""

from __future__ import annotations

import linecache
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from fal_agent.frames import format_frames
from fal_agent.wire import Failure, Log, Result, Serving, Stage
from fal_notebook.display import in_kernel
from fal_notebook.display.app_face import AppFace
from fal_notebook.display.logtail import LogTail
from fal_notebook.display.phases import phase_words

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Received

__all__ = ["AppCard", "card"]

_TAIL = 12  # lines of the log that are shown
_REDRAW_SECONDS = 0.25
_LIVE = ("starting", "ready")


def card(info: Any, *, quiet: bool = False) -> AppCard:
    """Give what shows a spawned app; a quiet one prints no log, which somebody else does."""
    return AppCard(info, quiet=quiet)


class AppCard:
    """One app's card.

    Args:
        info: the app: `name`, `state`, `url`, `link`, `host`, `stop()`.
        quiet: print no log where there is no card.
    """

    def __init__(self, info: Any, *, quiet: bool = False) -> None:
        self._info, self._is_quiet = info, quiet
        self._log = LogTail(_TAIL)
        self._state, self._since = info.state, time.time()
        self._is_stopping = self._is_over = False
        self._doing = self._note = self._problem = self._traceback = self._hint = ""
        self._runners: int | None = None
        self._lock = threading.RLock()
        self._display: Any = None
        self._button: Any = None
        self._timer: threading.Timer | None = None
        self._drawn_at = 0.0

    # ------------------------------------------------------------ what happens

    def take(self, received: Received) -> None:
        """Take an event of the app's run; called by a thread of the host's."""
        event = received.event
        with self._lock:
            if self._is_over:
                return
            if isinstance(event, Log):
                text = self._log.add(event, received)
                if not self._is_quiet and not in_kernel():
                    _print(event, text)
            elif isinstance(event, Stage):
                self._enter(event)
            elif isinstance(event, Serving):
                self._doing = ""
                self._log.forget("builder")  # told while it builds, and of no interest afterwards
            elif isinstance(event, (Result, Failure)):
                self._end(event)
            self._redraw_soon()

    def _enter(self, event: Stage) -> None:
        if event.phase == "runners":
            self._runners = int(event.text)
        elif event.phase == "serve":
            self._note = f"{_clock(event.sent_at)} {event.text}"
        else:
            self._doing = phase_words(event.phase, event.text)

    def _end(self, event: Result | Failure) -> None:
        self._is_over = True
        self._doing = ""
        if isinstance(event, Failure):
            self._problem = event.message
            self._traceback = _traceback(event)

    def stopping(self) -> None:
        """Somebody told the app to end."""
        with self._lock:
            self._is_stopping = True
            self._redraw_soon()

    def _stop_failed(self, error: Exception) -> None:
        with self._lock:
            self._is_stopping = False
            self._note = str(error)
            self._redraw_soon()

    # ------------------------------------------------------------ what is shown

    def show(self) -> None:
        """Show the card in the cell that is running; it goes on being updated in its place."""
        from fal_notebook.display.publishing import UpdatedDisplay
        from fal_notebook.display.stop_button import StopButton, has_widgets

        with_button = has_widgets()
        with self._lock:
            self._hint = _hint(self._info)
            if self._display is None:
                self._display = UpdatedDisplay()
            if self._button is None and with_button and not self._is_over:
                self._button = StopButton(
                    self._info.name, self._hint, stop=self._info.stop, on_problem=self._stop_failed
                )
            self._display.show(self.bundle())
            if self._button is not None:
                self._button.show()

    def bundle(self) -> dict[str, str]:
        """The card as it is now, by kind."""
        with self._lock:
            face = self._face()
            return {"text/plain": face.text(), "text/html": face.html()}

    def _face(self) -> AppFace:
        info = self._info
        state = self._present_state()
        if state != self._state:
            self._state, self._since = state, time.time()
        return AppFace(
            name=info.name,
            host=info.host.name,
            state=state,
            since=_clock(self._since),
            doing=self._doing,
            runners=self._runners,
            note=self._note,
            url="" if self._is_over else info.url,
            link="" if self._is_over else info.link,
            problem=self._problem,
            traceback=self._traceback,
            lines=tuple(self._log.lines),
            hint="" if self._button is not None else self._hint,
        )

    def _present_state(self) -> str:
        """The app's state; that it has ended is shown with the reason, which comes a moment later."""
        state: str = self._info.state
        if self._is_over:
            return state
        if self._is_stopping:
            return "stopping"
        return state if state in _LIVE else self._state

    def _redraw_soon(self) -> None:
        """Draw what has changed, not more often than a front end can."""
        if self._timer is not None or self._display is None:
            return
        wait = max(0.0, self._drawn_at + _REDRAW_SECONDS - time.monotonic())
        self._timer = threading.Timer(wait, self._redraw)
        self._timer.daemon = True
        self._timer.start()

    def _redraw(self) -> None:
        with self._lock:
            self._timer, self._drawn_at = None, time.monotonic()
            self._display.update(self.bundle())
            if self._is_over:
                self._display.close()
                if self._button is not None:
                    self._button.close(self._state)
                    self._button = None


def _traceback(failure: Failure) -> str:
    """The user's frames, with the lines of cells, which only the notebook has; or what uv said."""
    frames = [
        {**frame, "line": frame["line"] or linecache.getline(frame["filename"], frame["lineno"])}
        for frame in failure.detail.get("frames", ())
    ]
    return format_frames(frames) or str(failure.detail.get("log", ""))


def _hint(info: Any) -> str:
    """Say how to stop the app in a cell."""
    from IPython import get_ipython

    names = get_ipython().user_ns.copy()
    mine = [name for name, value in names.items() if value is info and not name.startswith("_")]
    handle = mine[0] if mine else f"fal.apps.find({info.name!r}, {info.host.name!r})"
    return f"stop it with {handle}.stop()"


def _print(event: Log, text: str) -> None:
    stream = sys.stderr if event.stream == "stderr" or event.source == "builder" else sys.stdout
    stream.write(text)
    stream.flush()


def _clock(moment: float) -> str:
    return time.strftime("%H:%M", time.localtime(moment))
