"""The end of a log as lines of plain text: what a terminal would show, without its control sequences.

Runs in the notebook.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fal_notebook.display.phases import TextDecoder

if TYPE_CHECKING:
    from fal_agent.wire import Log
    from fal_notebook.hosts.base import Received

__all__ = ["LogTail"]

_WIDE = 300  # characters of a line that are kept
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and movements
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u202a-\u202e\u2066-\u2069]"  # they turn the direction of what follows
)


@dataclass
class _Line:
    """A line that may go on.

    Attributes:
        is_at_start: a carriage return came: what follows is written over it.
    """

    source: str
    text: str = ""
    is_at_start: bool = False

    def write(self, text: str) -> None:
        """Write text without line ends, as a terminal does; roughly: what is written over is all gone."""
        for number, part in enumerate(text.split("\r")):
            self.is_at_start = self.is_at_start or number > 0
            if part:
                kept = "" if self.is_at_start else self.text
                self.text = (kept + part)[: _WIDE + 1]
                self.is_at_start = False

    def shown(self) -> str:
        text = _CONTROL.sub("", self.text)
        return f"{text[:_WIDE]}…" if len(self.text) > _WIDE else text


class LogTail:
    """The last lines of a log.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lines: deque[_Line] = deque(maxlen=count)
        self._open: dict[tuple[str, str], _Line] = {}  # unfinished lines, by source and stream
        self._decode = TextDecoder()

    def add(self, event: Log, received: Received) -> str:
        """Take a log event; give its text."""
        text = self._decode(received)
        *whole, rest = text.split("\n")
        if len(whole) > self._count:  # what is in the middle will not be seen
            whole = [whole[0], *whole[-self._count :]]
        key = (event.source, event.stream)
        for line in whole:
            self._write(key, line)
            self._open.pop(key, None)
        if rest:
            self._write(key, rest)
        return text

    def forget(self, source: str) -> None:
        """Leave out what came from one source."""
        self._lines = deque((line for line in self._lines if line.source != source), maxlen=self._count)

    @property
    def lines(self) -> list[str]:
        """The lines, the oldest first."""
        return [line.shown() for line in self._lines]

    def _write(self, key: tuple[str, str], text: str) -> None:
        line = self._open.get(key)
        if line is None or not any(line is known for known in self._lines):
            line = self._open[key] = _Line(key[0])
            self._lines.append(line)
        line.write(text)
