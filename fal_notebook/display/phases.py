"""What happens before the user's code runs, told in one line, and only when it takes a while; and text.

Runs in the notebook. A quick phase is not worth a line; uv's own lines are kept for when a build is
slow.
"""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fal_agent.framing import Buffer
    from fal_agent.wire import Stage
    from fal_notebook.hosts.base import Received

__all__ = ["TICK", "Phases", "TextDecoder", "phase_words"]

TICK = 1.0  # seconds between two looks at a phase of which nothing is heard

WORTH_TELLING = 1.0  # seconds
_KEPT_LINES = 6
_WORDS = {
    "queue": "waiting",
    "resolve": "resolving requirements",
    "build": "building the environment",
    "start": "starting a worker",
    "upload": "sending data",
}


@dataclass
class Phases:
    """The phases that one call went through.

    Attributes:
        began_at: when the first began, in seconds since the Unix epoch; None before that.
        lines: the latest of uv's lines.
    """

    began_at: float | None = None
    ended_at: float | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    _passed: list[tuple[str, str, float]] = field(default_factory=list)

    def enter(self, stage: Stage) -> None:
        """A phase began."""
        if self.began_at is None:
            self.began_at = stage.sent_at
        self._passed.append((stage.phase, stage.text, stage.sent_at))

    def add_lines(self, data: Buffer) -> None:
        """Take what uv said."""
        self.lines.extend(bytes(data).decode("utf-8", "replace").splitlines())

    def end(self, at: float) -> None:
        """The user's code has begun to say something, or has ended."""
        if self.ended_at is None:
            self.ended_at = at

    def is_worth_telling(self, now: float) -> bool:
        """Whether the phases have taken so long that a person wonders."""
        return self.began_at is not None and (self.ended_at or now) - self.began_at >= WORTH_TELLING

    @property
    def current(self) -> str:
        """The phase that was entered last, with what was said of it."""
        return " ".join(self._passed[-1][:2]) if self._passed else ""

    def headline(self, now: float) -> str:
        """What goes on, or went on, in one line."""
        if not self._passed or self.began_at is None:
            return ""
        seconds = (self.ended_at or now) - self.began_at
        if self.ended_at is not None:
            names = list(dict.fromkeys(_WORDS.get(phase, phase) for phase, _, _ in self._passed))
            return f"{', '.join(names)}: {seconds:.1f} s"
        phase, text, _ = self._passed[-1]
        return f"{phase_words(phase, text)} · {seconds:.0f} s"


def phase_words(phase: str, text: str) -> str:
    """Say what goes on in a phase, with what the host says of it."""
    return " · ".join(filter(None, (_WORDS.get(phase, phase), text)))


class TextDecoder:
    """Turns the bytes of log events into text; a character may be divided between two of them."""

    def __init__(self) -> None:
        make = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"stdout": make("replace"), "stderr": make("replace")}

    def __call__(self, received: Received) -> str:
        """Give the text of a `Log` event."""
        stream = getattr(received.event, "stream", "stdout")
        return self._decoders.get(stream, self._decoders["stdout"]).decode(bytes(received.data[0]))
