"""Run a program, hand on what it says line by line, and end it and its children when asked to.

Runs in the agent, in a thread that may wait.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fal_agent.errors import CallCancelledError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

__all__ = ["Completed", "Supervision", "run_command"]

_TICK = 0.1  # seconds in which a cancellation is noticed
_GRACE = 1.0  # seconds from asking a program to end to killing it
_MAX_LINE = 8192  # characters of one line that is handed on
_MAX_LOG = 256 << 10  # characters of stderr that are kept, the last ones
_MAX_OUTPUT = 32 << 20  # bytes of stdout
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Supervision:
    """Who listens to a program and who may end it.

    Attributes:
        on_line: gets each line of its stderr, without line end and terminal codes.
        cancelled: ends it when set.
        keep_open: descriptors that it inherits.
    """

    on_line: Callable[[str], None]
    cancelled: threading.Event
    keep_open: Sequence[int] = ()


@dataclass(frozen=True)
class Completed:
    """How a program ended: its exit status (negative for a signal), its stdout and its stderr's lines."""

    status: int
    output: str
    log: str
    timed_out: bool = False


@dataclass
class _Lines:
    """Makes lines of bytes as they come."""

    on_line: Callable[[str], None]
    kept: list[str] = field(default_factory=list)
    _size: int = 0
    _rest: str = ""

    def __post_init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, data: bytes, *, final: bool = False) -> None:
        *lines, self._rest = re.split(r"\r\n|\n|\r", self._rest + self._decode(data, final))
        if final or len(self._rest) > _MAX_LINE:
            lines.append(self._rest)
            self._rest = ""
        for line in lines:
            self._give(_CONTROL.sub("", line).rstrip()[:_MAX_LINE])

    def _give(self, line: str) -> None:
        if not line and (not self.kept or not self.kept[-1]):
            return
        self.kept.append(line)
        self._size += len(line) + 1
        while self._size > _MAX_LOG:
            self._size -= len(self.kept.pop(0)) + 1
        if line:
            self.on_line(line)


def run_command(
    command: Sequence[str],
    *,
    variables: dict[str, str],
    stdin: str = "",
    supervision: Supervision,
    timeout: float,
) -> Completed:
    """Run a program to its end.

    Args:
        command: the program and its arguments; there is no shell.
        variables: its whole environment.
        stdin: what it reads.
        supervision: who listens and who may end it.
        timeout: seconds after which it is ended.

    Raises:
        CallCancelledError: it was cancelled; nothing of its process group is left.
        OSError: it cannot be started.
    """
    lines = _Lines(supervision.on_line)
    output: list[bytes] = []
    process = _start(command, variables, stdin, supervision.keep_open)
    try:
        timed_out = _follow(process, lines, output, supervision.cancelled, time.monotonic() + timeout)
        if timed_out or supervision.cancelled.is_set():
            _end(process)
    except BaseException:
        _end(process)
        raise
    finally:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    lines.feed(b"", final=True)
    status = process.wait()
    if supervision.cancelled.is_set() and status != 0:
        raise CallCancelledError("the call was cancelled while its environment was being built")
    text = b"".join(output).decode("utf-8", "replace")
    return Completed(status, text, "\n".join(lines.kept).strip("\n"), timed_out)


def _start(
    command: Sequence[str], variables: dict[str, str], stdin: str, keep_open: Sequence[int]
) -> subprocess.Popen[bytes]:
    source = os.memfd_create("stdin")
    try:
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(stdin.encode("utf-8"))
        os.lseek(source, 0, os.SEEK_SET)
        return subprocess.Popen(
            list(command),
            env=variables,
            cwd="/",  # where no project's settings are found
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=list(keep_open),
            start_new_session=True,
        )
    finally:
        os.close(source)


def _follow(
    process: subprocess.Popen[bytes],
    lines: _Lines,
    output: list[bytes],
    cancelled: threading.Event,
    deadline: float,
) -> bool:
    """Read until the program ends; true when its time is over."""
    size = 0
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(_TICK)
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    lines.feed(data)
                elif size < _MAX_OUTPUT:
                    size += len(data)
                    output.append(data)
            if cancelled.is_set():
                return False
            if time.monotonic() > deadline:
                return True
            if not ready and _has_ended(process.pid):
                return False  # a child of it keeps the pipes open
    while not _has_ended(process.pid):  # it closed its output and goes on
        if cancelled.wait(0.005):
            return False
        if time.monotonic() > deadline:
            return True
    return False


def _has_ended(pid: int) -> bool:
    """Whether a child ended; it stays to be waited for, so its number and group stay its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program's process group, by force if need be."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while not _has_ended(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # its children too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
