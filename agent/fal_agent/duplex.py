"""Messages over a blocking stream of bytes, from and to any thread.

Runs in the notebook and in workers (the agent has its own, asynchronous one). One thread reads and
hands messages on; any thread may send. Parts of a blob give way to every other message, so that a
large transfer never holds back a small call or an interrupt.
"""

from __future__ import annotations

import importlib
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import ProtocolError
from fal_agent.framing import Buffer, FrameDecoder
from fal_agent.pace import Pace
from fal_agent.wire import PART_SIZE, BlobPart, Message, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Duplex", "c_signal", "uninterrupted"]

_READ_SIZE = 512 << 10

# The C functions below those of `signal`, which turn numbers into enums and back: 10 us a message.
c_signal: Any = importlib.import_module("_signal")


class Duplex:
    """Both directions of one connection.

    Args:
        stream: has `sendall`, `recv` and `close`, as a socket.
        on_message: called in the reading thread with each message and its raw buffers.
        on_close: called once, in the reading thread, when the stream has ended; its argument is what
            went wrong, or None after a clean end.
        name: for the reading thread.

    Attributes:
        has_ended: whether every message has been handed out that will ever come.
    """

    def __init__(
        self,
        stream: Any,
        on_message: Callable[[Message, list[bytes]], None],
        on_close: Callable[[Optional[Exception]], None],
        *,
        name: str,
    ) -> None:
        self._stream = stream
        self._on_message, self._on_close = on_message, on_close
        # Three locks give small messages priority: a blob's sender holds `_bulk`, queues at `_next`
        # like everyone, and gives `_next` back before each part, so whoever waits comes first.
        self._writing, self._next, self._bulk = threading.Lock(), threading.Lock(), threading.Lock()
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._closed = False  # by us
        self.has_ended = False

    def start(self) -> None:
        """Begin to read."""
        self._reader.start()

    def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message; Ctrl-C does not cut it in two.

        Raises:
            OSError: the stream is broken.
            ProtocolError: the message is too large.
        """
        data = encode(message, buffers)
        with uninterrupted():
            self._write(data)

    def send_blob(
        self,
        name: str,
        data: Buffer,
        *,
        part_size: int = PART_SIZE,
        start: int = 0,
        stop: Callable[[], bool] = bool,
        sent: Optional[Callable[[int], None]] = None,
    ) -> None:
        """Send a blob in parts; other messages come between them.

        Args:
            name: the blob's name.
            data: its bytes.
            part_size: bytes of the first part; later ones grow or shrink with what the line carries.
            start: where to begin, in bytes: what is before it has arrived already.
            stop: asked before each part; when it says yes the rest is not sent.
            sent: told after each part how many bytes it had.
        """
        view = memoryview(data).cast("B")
        size, offset, pace = len(view), start, Pace(part_size)
        while offset < size or size == offset == 0:
            if stop():
                return
            part = view[offset : offset + pace.part_size]
            frame = encode(BlobPart(blob=name, offset=offset, size=size), [part])
            started = time.monotonic()
            with self._bulk, uninterrupted():
                self._write(frame)
            pace.took(time.monotonic() - started)
            offset += max(1, len(part))
            if sent is not None:
                sent(len(part))

    def close(self) -> None:
        """End the stream; `on_close` is called by the reading thread."""
        self._closed = True
        self._stream.close()

    def _write(self, data: bytes) -> None:
        with self._next:
            self._writing.acquire()
        try:
            self._stream.sendall(data)
        except OSError as error:
            if self.has_ended:
                raise BrokenPipeError("the connection is closed") from error
            raise
        finally:
            self._writing.release()

    def _read(self) -> None:
        decoder = FrameDecoder()
        problem: Optional[Exception] = None
        try:
            while True:
                data = self._stream.recv(_READ_SIZE)
                if not data:
                    break
                for frame in decoder.feed(data):
                    self._on_message(decode(frame), frame.buffers)
            if decoder.pending_bytes and not self._closed:
                problem = EOFError("the connection ended in the middle of a message")
        except (OSError, EOFError, ProtocolError) as error:
            problem = None if self._closed else error
        finally:
            self.has_ended = True
            try:
                self._on_close(problem)
            finally:
                self._stream.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold KeyboardInterrupt back until the block has ended, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = c_signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, or set by something that is not Python
        yield
        return
    held: list[Any] = []
    c_signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        c_signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])
