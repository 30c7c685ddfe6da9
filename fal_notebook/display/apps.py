"""How a spawned app looks: a card with its state, its link and the end of its log.

Runs in the notebook. In a kernel the card is one display that is updated in place, and what it shows
survives saving; elsewhere the app's log goes to this process's own streams.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Failure, Log, Result, Serving, Stage
from fal_notebook.display import in_kernel

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Received

__all__ = ["AppCard", "card"]

_TAIL = 12  # lines of the log that are shown
_REDRAW_SECONDS = 0.25
_COLOURS = {"ready": "#2e7d32", "failed": "#c62828", "stopped": "#777"}


def card(info: Any) -> AppCard:
    """Give what shows a spawned app."""
    return AppCard(info)


class AppCard:
    """One app's card.

    Args:
        info: the app: `name`, `state`, `url`, `link`, `host`.
    """

    def __init__(self, info: Any) -> None:
        self._info = info
        self._lines: deque[str] = deque(maxlen=_TAIL)
        self._built: set[str] = set()  # lines that the building of the environment gave
        self._phase = ""
        self._lock = threading.RLock()
        self._board: Any = None
        self._timer: threading.Timer | None = None
        self._drawn_at = 0.0

    def take(self, received: Received) -> None:
        """Take an event of the app's run; called by a thread of the host's."""
        event = received.event
        with self._lock:
            if isinstance(event, Log):
                lines = bytes(received.data[0]).decode("utf-8", "replace").splitlines()
                self._lines.extend(lines)
                if event.source == "builder":  # told while it builds, and of no interest afterwards
                    self._built.update(lines)
            elif isinstance(event, Stage):
                self._phase = f"{event.phase} {event.text}".strip()
            elif isinstance(event, Serving):
                self._phase = ""
                self._lines = deque((line for line in self._lines if line not in self._built), maxlen=_TAIL)
                self._built.clear()
            elif isinstance(event, (Result, Failure)):
                self._phase = event.message if isinstance(event, Failure) else ""
            if self._board is not None:
                self._redraw_soon()
            elif isinstance(event, Log) and not in_kernel():
                stream = sys.stderr if event.stream == "stderr" or event.source == "builder" else sys.stdout
                stream.write(bytes(received.data[0]).decode("utf-8", "replace"))
                stream.flush()

    def mimebundle(self) -> Any:
        """Show the card as a cell's value; in a kernel it goes on being updated in its place."""
        with self._lock:
            shown = self._content()
            if not in_kernel():
                return {"text/plain": shown["text/plain"]}
            from fal_notebook.display.notebook import UpdatedDisplay

            self._board = self._board or UpdatedDisplay()
            self._board.show(shown)
            return {}, {}

    def _content(self) -> dict[str, str]:
        info = self._info
        phase = f" · {self._phase}" if self._phase else ""
        text = "\n".join([f"{info.name} on {info.host.name}: {info.state}{phase}", info.url, *self._lines])
        colour = _COLOURS.get(info.state, "#b26a00")
        link = html.escape(info.link, quote=True)
        log = "".join(f"{html.escape(line)}\n" for line in self._lines)
        if log:
            log = f'<pre style="margin:4px 0 0 0; max-height:16em; overflow:auto">{log}</pre>'
        return {
            "text/plain": text,
            "text/html": (
                '<div style="border:1px solid #ccc; border-radius:4px; padding:6px 10px">'
                f"<b>{html.escape(info.name)}</b> on {html.escape(info.host.name)} · "
                f'<span style="color:{colour}">{html.escape(info.state)}</span>'
                f'<span style="color:#777">{html.escape(phase)}</span><br>'
                f'<a href="{link}" target="_blank">{html.escape(info.url)}</a>{log}</div>'
            ),
        }

    def _redraw_soon(self) -> None:
        if self._timer is not None:
            return
        wait = max(0.0, self._drawn_at + _REDRAW_SECONDS - time.monotonic())
        self._timer = threading.Timer(wait, self._redraw)
        self._timer.daemon = True
        self._timer.start()

    def _redraw(self) -> None:
        with self._lock:
            self._timer, self._drawn_at = None, time.monotonic()
            if self._board is not None:
                self._board.show(self._content())
