"""Draw a call's events as text on this process's own streams.

Runs in the notebook's process when that is a terminal or a script.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Display, Failure, Log, Progress, Result, Stage
from fal_notebook.display.bars import TextBars
from fal_notebook.display.errors import hold_error, show_error, show_next_input, show_page
from fal_notebook.display.phases import Phases, TextDecoder
from fal_notebook.hosts.steps import UPLOAD

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Received

__all__ = ["TextFace"]


class TextFace:
    """Text on stdout and stderr; phases as lines on stderr.

    Args:
        adds_up: bars of one name add up, see `Bars`.
        reason: how the call's requirements have changed, should an environment be built.
    """

    def __init__(self, *, adds_up: bool = False, reason: str = "") -> None:
        self._reason = reason
        self._phases = Phases()
        self._bars = TextBars(adds_up=adds_up)
        self._decode = TextDecoder()
        self._told = ""

    def draw(self, received: Received) -> None:
        """Draw one event."""
        event = received.event
        if isinstance(event, Stage) and event.phase != "run":
            self._phases.enter(event)
            self._tell()
        elif isinstance(event, Log) and event.source == "builder":
            self._phases.add_lines(received.data[0])
            self._tell()
        elif isinstance(event, Progress) and event.name == UPLOAD:
            self._phases.sent(event.done, event.total or 0.0, event.sent_at)
            self._tell()
        else:
            self._phases.end(event.sent_at)
            if isinstance(event, Log):
                _write(sys.stdout if event.stream == "stdout" else sys.stderr, self._decode(received))
            elif isinstance(event, Progress):
                self._bars.take(event)
            elif isinstance(event, (Result, Failure)):
                self.close()
            elif isinstance(event, Display) and event.kind != "update":
                self._show(event.kind, json.loads(bytes(received.data[0])))

    def fold(self) -> None:
        """Nobody waits for the call any more: there is nothing to fold."""

    def close(self) -> None:
        """The call is over."""
        self._bars.close()

    def _show(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "next_input":
            show_next_input(content["data"]["text/plain"], replace=content["metadata"]["replace"])
        elif kind == "page":
            show_page(content["data"], content["metadata"]["start"])
        elif kind != "error":
            _show(kind, content)
        elif content["metadata"]["own"]:
            hold_error(content["data"], self.draw)
        else:
            show_error(content["data"])

    def _tell(self) -> None:
        """Say what goes on, if it takes long."""
        now = time.time()
        if not self._phases.is_worth_telling(now):
            return
        last = self._phases.passed[-1].name
        phase = last if last == "upload" else self._phases.current  # whose text changes all the time
        if phase != self._told:
            _write(sys.stderr, f"{self._phases.headline(now)}\n")
            if self._reason and last in ("resolve", "build"):
                _write(sys.stderr, f"  because its requirements have changed: {self._reason}\n")
                self._reason = ""
            self._told = phase
        for line in self._phases.lines:
            _write(sys.stderr, f"  {line}\n")
        self._phases.lines.clear()


def _show(kind: str, content: dict[str, Any]) -> None:
    ipython = sys.modules.get("IPython")
    if kind == "result" and ipython is not None and ipython.get_ipython() is not None:
        from fal_notebook.display.publishing import publish_result

        publish_result(content["data"], content["metadata"])
    elif "text/plain" in content["data"]:
        _write(sys.stdout, content["data"]["text/plain"] + "\n")


def _write(stream: Any, text: str) -> None:
    stream.write(text)
    stream.flush()
