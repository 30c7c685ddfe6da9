"""What happens before the user's code runs, a line for each phase, and only when it takes a while; and text.

Runs in the notebook. A quick phase is not worth a line; uv's own lines are kept for when a build is
slow.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fal_agent.framing import Buffer
    from fal_agent.wire import Stage
    from fal_notebook.hosts.base import Received

__all__ = ["Downloads", "Phase", "Phases", "TextDecoder", "duration", "phase_words", "size"]

WORTH_TELLING = 1.0  # seconds
_KEPT_LINES = 6
_MENTIONED = 0.05  # seconds that a phase took, to be named in the end
_WORDS = {
    "connect": "connecting",
    "queue": "waiting",
    "resolve": "resolving requirements",
    "build": "building the environment",
    "start": "starting a worker",
    "upload": "sending data",
}
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "B": 1}
_DOWNLOADING = re.compile(r"\s*Downloading (\S+) \(([\d.]+)\s?([KMG]?i?B)\)")
_DOWNLOADED = re.compile(r"\s*Downloaded (\S+)")


@dataclass
class Phase:
    """One phase.

    Attributes:
        name: as in `wire.Stage`, or "connect" or "upload".
        text: what was said of it last.
        began_at: seconds since the Unix epoch.
        ended_at: likewise; None while it goes on.
        share: how much of it is done, 0 to 1; None if that is not known.
    """

    name: str
    text: str
    began_at: float
    ended_at: float | None = None
    share: float | None = None

    def seconds(self, now: float) -> float:
        """How long it took, or has taken until now."""
        return max(0.0, (now if self.ended_at is None else self.ended_at) - self.began_at)

    def line(self, now: float) -> str:
        """The phase in one line."""
        return f"{phase_words(self.name, self.text)} · {duration(self.seconds(now))}"


@dataclass
class Downloads:
    """What uv says that it fetches; it names only what is large."""

    sizes: dict[str, float] = field(default_factory=dict)  # bytes
    done: set[str] = field(default_factory=set)

    def hear(self, line: str) -> None:
        """Take one of uv's lines."""
        if begun := _DOWNLOADING.match(line):
            unit = begun[3] if begun[3] in _UNITS else begun[3].replace("B", "iB")
            self.sizes[begun[1]] = float(begun[2]) * _UNITS.get(unit, 1)
        elif (ended := _DOWNLOADED.match(line)) and ended[1] in self.sizes:
            self.done.add(ended[1])

    def text(self) -> str:
        """How much there is to fetch, and how much of it is here."""
        if not self.sizes:
            return ""
        whole = sum(self.sizes.values())
        here = sum(self.sizes[name] for name in self.done)
        return size(whole) if here >= whole else f"{size(here)} of {size(whole)}"


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
    passed: list[Phase] = field(default_factory=list)
    _downloads: Downloads = field(default_factory=Downloads)

    def enter(self, stage: Stage) -> None:
        """A phase began, or something new is known of it."""
        self.begin(stage.phase, stage.text, stage.sent_at)

    def begin(self, name: str, text: str, at: float) -> None:
        """A phase began; the one before it has ended."""
        self.began_at = at if self.began_at is None else self.began_at
        self.ended_at = None
        last = self.passed[-1] if self.passed else None
        if last is not None and last.ended_at is None:
            if last.name == name:
                last.text = text
                return
            if (last.name, name) == ("start", "queue"):  # it waits for the very worker that starts
                return
        if last is not None and last.ended_at is None:
            last.ended_at = max(at, last.began_at)
        self.passed.append(Phase(name, text, at))

    def sent(self, done: float, total: float, at: float) -> None:
        """So many bytes of the call's data have been sent."""
        self.begin("upload", "", at)
        phase = self.passed[-1]
        phase.share = done / total if total else 1.0
        seconds = at - phase.began_at
        rate = f" · {size(done / seconds)}/s" if seconds > 0 and done else ""
        phase.text = f"{_bar(phase.share)} {size(done)} of {size(total)}{rate}"

    def add_lines(self, data: Buffer) -> None:
        """Take what uv said."""
        for line in bytes(data).decode("utf-8", "replace").splitlines():
            self.lines.append(line)
            self._downloads.hear(line)
        fetched = self._downloads.text()
        phase = self.passed[-1] if self.passed else None
        if fetched and phase is not None and phase.name == "build":
            phase.text = f"{phase.text.partition(' · ')[0]} · {fetched}"

    def end(self, at: float) -> None:
        """The user's code has begun to say something, or has ended."""
        if self.ended_at is None:
            self.ended_at = at
            if self.passed and self.passed[-1].ended_at is None:
                self.passed[-1].ended_at = max(at, self.passed[-1].began_at)

    def is_worth_telling(self, now: float) -> bool:
        """Whether the phases have taken so long that a person wonders."""
        return self.began_at is not None and (self.ended_at or now) - self.began_at >= WORTH_TELLING

    @property
    def current(self) -> str:
        """The phase that was entered last, with what was said of it."""
        return " ".join((self.passed[-1].name, self.passed[-1].text)) if self.passed else ""

    def headline(self, now: float) -> str:
        """What goes on, or went on, in one line."""
        if not self.passed or self.began_at is None:
            return ""
        if self.ended_at is None:
            return self.passed[-1].line(now)
        told = [phase for phase in self.passed if phase.seconds(now) >= _MENTIONED] or self.passed
        return ", ".join(_in_short(phase, now) for phase in told)


def phase_words(phase: str, text: str) -> str:
    """Say what goes on in a phase, with what the host says of it."""
    return " · ".join(filter(None, (_WORDS.get(phase, phase), text)))


def duration(seconds: float) -> str:
    """Say how long something takes."""
    if seconds < 10:  # noqa: PLR2004 - with a decimal while one can see it
        return f"{seconds:.1f} s"
    if seconds < 120:  # noqa: PLR2004 - likewise
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"  # noqa: PLR2004


def size(count: float) -> str:
    """Say how many bytes."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            value = count / 10**power
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"  # noqa: PLR2004
    return f"{count:.0f} bytes"


def _in_short(phase: Phase, now: float) -> str:
    aside = f" ({phase.text})" if phase.text and phase.name == "build" else ""
    return f"{phase.name} {duration(phase.seconds(now))}{aside}"


def _bar(share: float, width: int = 12) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


class TextDecoder:
    """Turns the bytes of log events into text; a character may be divided between two of them."""

    def __init__(self) -> None:
        make = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"stdout": make("replace"), "stderr": make("replace")}

    def __call__(self, received: Received) -> str:
        """Give the text of a `Log` event."""
        stream = getattr(received.event, "stream", "stdout")
        return self._decoders.get(stream, self._decoders["stdout"]).decode(bytes(received.data[0]))
