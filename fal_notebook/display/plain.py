"""Draw a call's events as text on this process's own streams.

Runs in the notebook's process when that is a terminal or a script.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from fal_agent.wire import Display, Failure, Log, Result, Stage
from fal_notebook.display.phases import Phases

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Received

__all__ = ["TextFace"]


class TextFace:
    """Text on stdout and stderr; phases as lines on stderr."""

    def __init__(self) -> None:
        self._phases = Phases()
        self._told = ""

    def draw(self, received: Received) -> None:
        """Draw one event."""
        event = received.event
        if isinstance(event, Log):
            self._log(event, bytes(received.data[0]).decode("utf-8", "replace"))
        elif isinstance(event, Stage):
            self._phases.enter(event)
            self._tell()
        elif isinstance(event, Display):
            content = json.loads(bytes(received.data[0]))["data"]
            if event.kind != "update" and "text/plain" in content:
                sys.stdout.write(content["text/plain"] + "\n")
        elif isinstance(event, (Result, Failure)):
            self._phases.end(event.sent_at)

    def _log(self, event: Log, text: str) -> None:
        if event.source == "builder":
            self._phases.lines.extend(text.splitlines())
            if self._phases.is_worth_telling(time.time()):
                for line in self._phases.lines:
                    sys.stderr.write(f"  {line}\n")
                self._phases.lines.clear()
            return
        self._phases.end(event.sent_at)
        stream = sys.stdout if event.stream == "stdout" else sys.stderr
        stream.write(text)
        stream.flush()

    def _tell(self) -> None:
        if self._phases.is_worth_telling(time.time()):
            line = self._phases.headline(time.time())
            if line != self._told:
                sys.stderr.write(f"{line}\n")
                self._told = line
