"""Read what Linux tells about processes in /proc.

Runs in the agent and in its reaper. A process is told from a later one with the same number by its
start time, and a zombie counts as gone: it holds no memory, no device and no file.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Process",
    "boot_id",
    "environment_of",
    "identity",
    "is_alive",
    "is_of_another_boot",
    "process",
    "processes",
]

_GONE = frozenset("ZXx")  # zombie, dead


@dataclass(frozen=True)
class Process:
    """A living process, as /proc/PID/stat gives it. Two are the same if number and start time are."""

    pid: int
    parent: int = field(compare=False)
    group: int = field(compare=False)
    session: int = field(compare=False)
    started: int  # clock ticks since the machine started


def process(pid: int) -> Optional[Process]:
    """Look a process up; None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rfind(")") + 2 :].split()  # the command's name before may hold anything
    if fields[0] in _GONE:
        return None
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def processes() -> Iterator[Process]:
    """Every living process of the machine that this one can see, in no order."""
    with os.scandir("/proc") as entries:
        numbers = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for number in numbers:
        found = process(number)
        if found is not None:
            yield found


def environment_of(pid: int) -> bytes:
    """The variables a process was started with, as `NAME=value` ended by NUL each.

    Empty when the process is gone or belongs to someone else.
    """
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone meanwhile (ENOENT, ESRCH) or not ours to read (EACCES)
        return b""


def boot_id() -> str:
    """What the kernel drew when the machine started; "unknown" where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # a container may hide it
        return "unknown"


def identity(pid: Optional[int] = None) -> str:
    """Name a living process (this one by default) so that no other ever has the same name.

    Made of host, boot, number and start time, joined by dots; safe as the name of a file.

    Raises:
        ProcessLookupError: there is no such process.
    """
    pid = os.getpid() if pid is None else pid
    found = process(pid)
    if found is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return f"{_host()}.{boot_id()[:8]}.{pid}.{found.started}"


def is_alive(name: str) -> bool:
    """Whether the process that `identity` named still runs.

    A process of another host (the folder may be shared between machines) is taken for alive, since
    nothing is known of it here; what is no identity at all is not.
    """
    parts = name.split(".")
    if len(parts) != 4 or not (parts[2].isdigit() and parts[3].isdigit()):  # noqa: PLR2004
        return False
    host, boot, pid, started = parts
    if host != _host():
        return True
    if boot != boot_id()[:8]:
        return False
    found = process(int(pid))
    return found is not None and found.started == int(started)


def is_of_another_boot(name: str) -> bool:
    """Whether the process that `identity` named ran on this machine before that was started anew."""
    host, boot, *_ = [*name.split("."), ""]
    return host == _host() and boot not in ("", boot_id()[:8])


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:64] or "_"
