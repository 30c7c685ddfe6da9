"""Catch everything the user's code prints, at file-descriptor level, and give it to the right call.

Runs in a worker. Descriptors 1 and 2 are pipes that one thread reads, so C code and subprocesses are
heard; `sys.stdout` and `sys.stderr` go to the call of the context they are used in. Text written by
Python first takes along what the pipes hold, so the order of lines is the order of writing.
"""

from __future__ import annotations

import codecs
import contextlib
import contextvars
import ctypes
import functools
import inspect
import io
import os
import select
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.runtime.requests import current_request_id
from fal_agent.worker.context import CURRENT_CALL, CallContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.worker.secrets import Secrets

__all__ = ["Capture"]

_READ_SIZE = 64 << 10
_READS = 16  # of one pipe before its text is handed on
_FLUSH_AFTER = 0.02  # seconds that text may gather


class Capture:
    """The process's standard streams, divided among its calls. There is one per worker.

    Args:
        log_fd: descriptor for text that belongs to no call.
        secrets: what is not to be seen in it.
    """

    def __init__(self, log_fd: int, secrets: Secrets) -> None:
        self._log_fd, self._secrets = log_fd, secrets
        self._calls: dict[str, CallContext] = {}
        self._pipes = _PipePair(self._youngest_call)
        self._private: dict[str, _PipePair] = {}  # of calls that share the process
        self._wake, self._is_awake = threading.Event(), False
        self._libc: Optional[ctypes.CDLL] = None

    def install(self) -> None:
        """Take over the standard streams of this process."""
        self._libc = _load_libc()
        for fd, pipe in enumerate(self._pipes.pipes, start=1):
            os.dup2(pipe.write_fd, fd)
            os.close(pipe.write_fd)
            pipe.write_fd = fd
        self._streams = CallStream(self, "stdout", 1), CallStream(self, "stderr", 2)
        sys.__stdout__, sys.__stderr__ = self._streams  # type: ignore[assignment, misc]
        sys.stdout, sys.stderr = self._streams
        os.register_at_fork(after_in_child=_use_plain_streams)
        threading.Thread.start = _starting_in_context(threading.Thread.start)  # type: ignore[assignment, method-assign]
        subprocess.Popen.__init__ = self._popen_with_own_pipes(subprocess.Popen.__init__)  # type: ignore[method-assign]
        os.system = self._system_with_own_pipes(os.system)  # type: ignore[assignment]
        threading.Thread(target=self._read_pipes, name="fal-capture", daemon=True).start()
        threading.Thread(target=self._flush_regularly, name="fal-flush", daemon=True).start()

    def begin(self, call: CallContext, *, shared: bool) -> None:
        """A call starts; `shared` says that others may run in this process at the same time."""
        if shared:
            self._private[call.run_id] = _PipePair(lambda: call)
        elif call.task.kind != "cell":  # a function before may have left others in their places
            sys.stdout, sys.stderr = self._streams
        self._calls[call.run_id] = call
        self._private.get(call.run_id, self._pipes).lend(call, self.log)

    def end(self, call: CallContext) -> None:
        """A call is over: everything it wrote until now is handed to it before this returns."""
        self._flush_c_streams()
        own = self._private.pop(call.run_id, None)
        if own is not None:
            own.drain()
            own.close()
        self.log(self._pipes.drain())
        self._calls.pop(call.run_id, None)

    def write(self, stream: str, text: str) -> None:
        """Take text that Python code wrote. Millions of lines may pass here: it makes few calls itself."""
        call = CURRENT_CALL.get()
        if call is None or call.is_over:
            call = self._youngest_call()
            if call is None:
                self.log(text)
                return
        try:
            is_late = call.poll_pipes(0, 1) or call.are_pipes_read()  # something may have been written before
        except ValueError:  # they were closed in this moment, at the call's end
            is_late = True
        if is_late:
            call.gather()
        call.write(stream, text, current_request_id.get() or "")
        if not self._is_awake:
            self._is_awake = True
            self._wake.set()

    def _youngest_call(self) -> Optional[CallContext]:
        calls = list(self._calls.values())
        return calls[-1] if calls else None

    def _read_pipes(self) -> None:
        while True:
            pairs = [self._pipes, *list(self._private.values())]
            pipes = {pipe.read_fd: pipe for pair in pairs for pipe in pair.pipes}
            for fd in _poll(list(pipes), timeout_ms=50 if len(pairs) > 1 else 500):
                owner = pipes[fd].owner()
                if owner is not None and not owner.has_credit:
                    time.sleep(_FLUSH_AFTER)  # its reader is slow: the pipe fills up and the writer waits
                    continue
                self.log(pipes[fd].drain())
                self._wake.set()

    def log(self, text: str) -> None:
        """Write text that belongs to no call into the worker's own log."""
        if text:
            with contextlib.suppress(OSError):  # a full disk must not break a print that nobody waits for
                os.write(self._log_fd, self._secrets.mask(text).encode("utf-8", "replace"))

    def _flush_regularly(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            time.sleep(_FLUSH_AFTER)
            self._is_awake = False  # before looking: what is written from now on wakes this thread again
            for call in list(self._calls.values()):
                if call.has_text:
                    if call.has_credit:
                        call.flush()
                    else:
                        self._wake.set()

    def _flush_c_streams(self) -> None:
        if self._libc is not None:
            for name in ("stdout", "stderr"):
                self._libc.fflush(ctypes.c_void_p.in_dll(self._libc, name))

    def _popen_with_own_pipes(self, original: Callable[..., None]) -> Callable[..., None]:
        """Give subprocesses of calls that share this process the pipes of their call."""
        signature = inspect.signature(original)

        def start(popen: Any, *args: Any, **options: Any) -> None:
            call = CURRENT_CALL.get()
            own = self._private.get(call.run_id) if call is not None else None
            if own is not None:
                bound = signature.bind(popen, *args, **options)
                for pipe in own.pipes:
                    if bound.arguments.get(pipe.stream) is None:
                        bound.arguments[pipe.stream] = pipe.write_fd
                args, options = bound.args[1:], bound.kwargs
            original(popen, *args, **options)

        return start

    def _system_with_own_pipes(self, original: Callable[[Any], int]) -> Callable[[Any], int]:
        """The same for `os.system`, whose child would inherit the descriptors of the process."""

        def system(command: Any) -> int:
            call = CURRENT_CALL.get()
            if call is None or call.run_id not in self._private:
                return original(command)
            status = subprocess.call(command, shell=True)  # noqa: S602 - what os.system is
            return -status if status < 0 else status << 8

        return system


class _Pipe:
    """A pipe that stands for a standard stream; its text goes to `owner()`.

    Args:
        stream: "stdout" or "stderr".
        owner: gives the call whose text it is.
        reading: held by the thread that has read text and may not have handed it over.
    """

    def __init__(
        self, stream: str, owner: Callable[[], Optional[CallContext]], reading: threading.Lock
    ) -> None:
        self.stream, self.owner = stream, owner
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._reading = reading

    def drain(self) -> str:
        """Hand over what the pipe holds, after what another thread is handing over; give what nobody owns."""
        with self._reading:  # no other way of acquiring it is safe from an interrupt of the user's code
            text = self._decoder.decode(self._read_all())
            owner = self.owner() if text else None
            if owner is None or owner.is_over:
                return text
            owner.write(self.stream, text)
            return ""

    def close(self) -> None:
        """Close both ends."""
        os.close(self.write_fd)
        os.close(self.read_fd)

    def _read_all(self) -> bytes:
        pieces: list[bytes] = []
        while True:
            try:
                piece = os.read(self.read_fd, _READ_SIZE)
            except BlockingIOError:
                break
            except OSError:  # closed by the end of its call
                break
            if not piece:
                break
            pieces.append(piece)
            if len(pieces) >= _READS:
                break
        return b"".join(pieces)


class _PipePair:
    """The pipes of stdout and stderr, in this order."""

    def __init__(self, owner: Callable[[], Optional[CallContext]]) -> None:
        self._reading = threading.Lock()
        self.pipes = [_Pipe(stream, owner, self._reading) for stream in ("stdout", "stderr")]
        self._readable = select.epoll()  # a poll object costs three times as much, and needs a lock
        for pipe in self.pipes:
            self._readable.register(pipe.read_fd, select.EPOLLIN)

    def lend(self, call: CallContext, log: Callable[[str], None]) -> None:
        """Let a call look whether these hold something, and hand it over."""
        call.poll_pipes, call.are_pipes_read = self._readable.poll, self._reading.locked
        call.gather = lambda: log(self.drain())

    def drain(self) -> str:
        """Hand over what both pipes hold; give the text that nobody owns."""
        if not self._readable.poll(0, 1) and not self._reading.locked():
            return ""  # as after most calls
        return "".join([pipe.drain() for pipe in self.pipes])

    def close(self) -> None:
        """Close both pipes."""
        self._readable.close()
        for pipe in self.pipes:
            pipe.close()


class CallStream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of the user's code."""

    def __init__(self, capture: Capture, stream: str, fd: int) -> None:
        self._capture, self._stream, self._fd = capture, stream, fd
        self.buffer = _CallBuffer(self)

    encoding = "UTF-8"  # as a kernel spells it
    errors = "replace"

    @property
    def name(self) -> str:
        """The stream's conventional name."""
        return f"<{self._stream}>"

    def write(self, text: str) -> int:
        """Take text."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._capture.write(self._stream, text)
        return len(text)

    def fileno(self) -> int:
        """Descriptor that C code and subprocesses write to."""
        return self._fd

    def writable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Stay open: the calls to come print here too."""

    def reconfigure(self, **options: Any) -> None:
        """Accept what programs ask of a terminal's stream; this one is UTF-8 and unbuffered anyway."""


class _CallBuffer(io.RawIOBase):
    """`sys.stdout.buffer`: bytes that become text, broken UTF-8 included."""

    def __init__(self, text: CallStream) -> None:
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: Any) -> int:
        """Take bytes."""
        content = bytes(data)
        self._text.write(self._decoder.decode(content))
        return len(content)

    def writable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Stay open, as the stream of text does."""

    def fileno(self) -> int:
        """Descriptor that C code and subprocesses write to."""
        return self._text.fileno()


def _poll(fds: list[int], *, timeout_ms: int) -> list[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, event in poller.poll(timeout_ms) if event & select.POLLIN]


def _load_libc() -> Optional[ctypes.CDLL]:
    """The C library, with its stdout made line-buffered: C code's lines then come as they are printed."""
    try:
        libc = ctypes.CDLL(None)
        line_buffered = 1  # _IOLBF
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, line_buffered, ctypes.c_size_t(0))
        ctypes.c_void_p.in_dll(libc, "stderr")
    except (OSError, ValueError, AttributeError):  # no such symbols: C text comes when C flushes it
        return None
    return libc


def _use_plain_streams() -> None:
    """In a forked child: write to the pipes like any subprocess, never to the parent's connection."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = open(fd, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _starting_in_context(original: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Let threads belong to the call that started them, as Python 3.14 can do by itself."""

    def start(thread: threading.Thread) -> None:
        if CURRENT_CALL.get() is not None:
            context = contextvars.copy_context()
            run = functools.partial(context.run, thread.run)  # unlike a lambda, no frame in tracebacks
            thread.run = run  # type: ignore[method-assign]
        original(thread)

    return start
