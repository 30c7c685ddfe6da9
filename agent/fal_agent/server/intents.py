"""A line on disk for each run before it starts, for what the journal has not recorded yet.

Runs in the agent. Writing a line costs a few microseconds where a transaction costs fifty; it
survives the agent being killed just as the transaction does. The journal records runs in groups and
then empties the file; an agent that finds the file of a dead one records what is in it.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Union

from fal_agent.server.journal_file import NewRun

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Intents", "left_behind", "read_intents"]

_SUFFIX = ".intents"
_LIMIT = 256 << 10  # bytes after which the file is emptied at the next opportunity


class Intents:
    """The runs that one agent is about to start or has just started.

    Args:
        journal: path of the journal; the file lies beside it.
        agent: identity of the agent.
    """

    def __init__(self, journal: Path, agent: str) -> None:
        self._path = journal.with_name(f"{journal.name}.{agent}{_SUFFIX}")
        self._fd = -1
        self._size = 0

    def add(self, run: NewRun) -> None:
        """Write a run down.

        Raises:
            OSError: the disk does not take it.
        """
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o600)
        self._write(json.dumps(run))

    def forget(self, run_id: str) -> None:
        """Write down that a run is about to be forgotten, so that it does not come back from here.

        Raises:
            OSError: the disk does not take it.
        """
        if self._size:
            self._write(json.dumps(run_id))

    def _write(self, text: str) -> None:
        line = text.encode() + b"\n"
        if os.write(self._fd, line) != len(line):
            raise OSError(f"{self._path} could not be written whole")
        self._size += len(line)

    @property
    def is_large(self) -> bool:
        """Whether it is time to empty the file."""
        return self._size > _LIMIT

    def clear(self) -> None:
        """Empty the file: all that is in it has been recorded."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            self._size = 0

    def close(self) -> None:
        """Remove the file: all that is in it has been recorded."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)


def left_behind(journal: Path) -> dict[str, Path]:
    """The files of all agents, by their identities."""
    start = f"{journal.name}."
    return {
        path.name[len(start) : -len(_SUFFIX)]: path
        for path in journal.parent.glob(f"{journal.name}.*{_SUFFIX}")
    }


def read_intents(path: Path) -> list[NewRun]:
    """The runs in a file; a last line that was cut short by a kill is not one: its run never started."""
    runs: dict[str, NewRun] = {}
    for entry in map(_parse, path.read_bytes().splitlines()):
        if isinstance(entry, str):
            runs.pop(entry, None)
        elif entry is not None:
            runs[entry.run_id] = entry
    return list(runs.values())


def _parse(line: bytes) -> Union[NewRun, str, None]:
    """A run, the id of one that was forgotten, or nothing."""
    try:
        content = json.loads(line)
        return content if isinstance(content, str) else NewRun(*content)
    except (ValueError, TypeError):  # cut short, perhaps with another line behind it
        return None
