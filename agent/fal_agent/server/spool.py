"""The file in which a worker writes down the calls of a lane, and how the journal takes them over.

Runs in the agent. A spool is a row of frames: what the calls of the lane are (`opening`), then for each
call a `Begun` and its last event. A call without one goes on, was moved to the agent, or died with the
worker. The spool of a dead agent is read by the next one, so that no call is forgotten.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import ProtocolError
from fal_agent.framing import FrameDecoder, encode_frame
from fal_agent.server.journal_file import NewEvent, NewRun, NewState
from fal_agent.wire import Begun, Failure, Result, decode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from fal_agent.server.journal_file import Entry
    from fal_agent.wire import Event

__all__ = ["Spool", "ending", "left_spools"]

_SUFFIX = ".lane"
_READ_SIZE = 1 << 20
_STATES = {"cancelled": "cancelled", "interrupted": "cancelled", "lost": "lost", "lease": "lease"}


def ending(event: Event) -> tuple[str, Optional[str]]:
    """The state that a run ends in with its last event, and the error's text if there is one."""
    if isinstance(event, Failure):
        return _STATES.get(event.kind, "failed"), event.message
    return "done", None


class Spool:
    """One spool, read as it grows.

    Args:
        path: the file.
        agent: identity of the agent that made it.

    Attributes:
        offset: bytes that have been read.
        open: calls that have begun and have neither ended nor been moved, by run id.
    """

    def __init__(self, path: Path, agent: str) -> None:
        self.path, self._agent = path, agent
        self.open: dict[str, Begun] = {}
        self._decoder = FrameDecoder()
        self.offset = 0
        self._client = ""
        self._calls: dict[str, list[str]] = {}  # label, kind and environment of each template

    @classmethod
    def create(
        cls, journal: Path, agent: str, lane: str, client: str, calls: Mapping[str, list[str]]
    ) -> Spool:
        """Make the file of a lane.

        Args:
            journal: path of the journal; the file lies beside it.
            agent: identity of this agent.
            lane: name of the lane.
            client: whose runs the calls are.
            calls: label, kind and environment text of each template.

        Raises:
            OSError: the disk does not take it.
        """
        path = journal.with_name(f"{journal.name}.{agent}.{lane}{_SUFFIX}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, encode_frame({"type": "spool", "client": client, "calls": dict(calls)}))
        finally:
            os.close(fd)
        return cls(path, agent)

    def size(self) -> int:
        """Bytes of the file."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return self.offset

    def take(self) -> Iterator[Entry]:
        """Give what was written since the last time, as entries of the journal."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while data := file.read(_READ_SIZE):
                self.offset += len(data)
                try:
                    frames = self._decoder.feed(data)
                except ProtocolError:  # the disk was full in the middle of a frame: nothing follows
                    return
                for frame in frames:
                    if frame.header.get("type") == "spool":
                        self._client, self._calls = frame.header["client"], frame.header["calls"]
                    else:
                        yield from self._entries(decode(frame), frame)

    def begun(self, message: Begun) -> Iterator[Entry]:
        """Give what the journal is to have of a call that begins."""
        label, kind, environment = self._calls[message.template]
        yield NewRun(message.run_id, self._client, label, kind, environment, self._agent, message.at)
        yield NewState(message.run_id, "running", None, message.at)

    def _entries(self, message: Any, frame: Any) -> Iterator[Entry]:
        if isinstance(message, Begun):
            self.open[message.run_id] = message
            yield from self.begun(message)
        elif isinstance(message, (Result, Failure)) and self.open.pop(message.run_id, None) is not None:
            state, error = ending(message)
            yield NewEvent(message.run_id, 1, encode_frame(frame.header, frame.buffers), ())
            yield NewState(message.run_id, state, error, message.sent_at)

    def remove(self) -> None:
        """Delete the file: all that is in it has been recorded."""
        self.path.unlink(missing_ok=True)


def left_spools(journal: Path) -> list[tuple[str, Path]]:
    """The spools beside a journal, each with the identity of its agent."""
    start = f"{journal.name}."
    found = []
    for path in journal.parent.glob(f"{journal.name}.*{_SUFFIX}"):
        agent, _, _lane = path.name[len(start) : -len(_SUFFIX)].rpartition(".")
        found.append((agent, path))
    return found
