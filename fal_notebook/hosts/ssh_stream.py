"""One channel of an SSH connection, as a stream of bytes.

Runs in the notebook. Knows channel messages but no sockets and no keys: what it sends goes to its
`Outlet`, what arrives is handed in by the transport's thread, which is never made to wait here. What a
server may send ahead is bounded by the window, so memory is too. Windows begin small and widen for those who
read as fast as bytes come: a stream that nobody reads holds little, however many there are.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.framing import Buffer
    from fal_notebook.hosts.ssh_link import ChannelRefused

__all__ = ["ChannelSocket", "Outlet", "Stream"]

DATA, EXTENDED_DATA, WINDOW_ADJUST = 94, 95, 93
EOF, CLOSE, REQUEST, FAILURE = 96, 97, 98, 100
STDERR = 1  # the kind of extended data that is standard error

MAX_QUEUED = 256 << 10  # bytes one stream may have waiting in the outbox
MAX_STDERR = 1 << 20  # bytes of standard error that are kept, the last ones
ACKNOWLEDGE = 512 << 10  # bytes read after which the server hears of it, at the latest
FIRST_WINDOW = 256 << 10  # bytes a server may send before we have read them
WIDEST = 16 << 20  # the same for a stream that has been read quickly


class Outlet(Protocol):
    """Where a stream's messages go."""

    def post(
        self, content: bytes, stream: Stream | None = None, *, size: int = 0, last: bool = False
    ) -> None:
        """Send a message; `size` bytes of it count as the stream's, `last` says that it is its CLOSE."""

    def forget(self, stream: Stream) -> None:
        """Take note that both sides have closed the stream."""

    def widen(self, size: int) -> int:
        """Say how many bytes of `size` a stream's window may grow by; `forget` takes them back."""

    def why_lost(self) -> str:
        """Say in a few words how the connection ended."""


class Stream:
    """A duplex stream; any thread may use it, a `sendall` is never split by another."""

    def __init__(self, outlet: Outlet, number: int) -> None:
        """Make the stream that the connection will know by `number`."""
        self.number = number
        self.window = FIRST_WINDOW
        self.exit_status: int | None = None
        self.errors: deque[bytes] = deque()  # pieces of standard error
        self.close_sent = False  # written by the outlet alone, at the moment of sending
        self._outlet = outlet
        self._remote = 0
        # Held by itself, not through the condition: an interrupt inside of `Condition.__enter__`, which is
        # Python, would leave it held for ever, and the connection's own thread would wait for it.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._sending = threading.Lock()
        self._incoming: deque[bytes] = deque()
        self._offset = 0  # bytes of the first incoming piece that were read
        self._errors_size = 0
        self._unacknowledged = 0
        self._credit = 0  # bytes that the server will take now
        self._max_packet = 0
        self._in_outbox = 0
        self._open = False
        self._refusal: ChannelRefused | None = None
        self._ended = False  # no more bytes will arrive
        self._closed = False  # by us
        self._gone = False  # closed by the server
        self._lost = False  # with the connection
        self._take_now: Callable[[bytes], int] | None = None
        self._is_awaited = False  # somebody waits in `recv`, and has dealt with all that came before

    # -- for its users --------------------------------------------------------------------------------

    def wait_until_open(self, timeout: float) -> None:
        """Wait for the server's answer.

        Raises:
            ChannelRefused: the server said no.
            TimeoutError: no answer within `timeout` seconds.
            OSError: the connection is gone.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._open or self._refusal or self._lost, timeout)
            if self._open:
                return
            if self._refusal is not None:
                raise self._refusal
            if self._lost:
                raise self._lost_error()
        raise TimeoutError(f"the server did not open a channel within {timeout:g} s")

    def sendall(self, data: Buffer, /) -> None:
        """Send every byte, waiting for this stream's window alone; raises OSError when broken."""
        view = memoryview(data).cast("B")
        with self._sending:
            while view:
                view = view[self._send_piece(view, None) :]

    def send(self, data: Buffer, timeout: float | None = None) -> int:
        """Send some bytes and say how many; raises TimeoutError if none could go within `timeout` s."""
        with self._sending:
            return self._send_piece(memoryview(data).cast("B"), timeout)

    def recv(self, size: int, /, *, timeout: float | None = None) -> bytes:
        """Wait for bytes, at most `size`; b"" at the end of the stream.

        Raises:
            TimeoutError: nothing came within `timeout` seconds.
            OSError: the connection broke, or the stream was closed here.
        """
        with self._lock:
            self._is_awaited = True
            try:
                has_come = self._changed.wait_for(self._readable, timeout)
            finally:
                self._is_awaited = False
            if not has_come:
                raise TimeoutError(f"nothing arrived within {timeout:g} s")
            if self._closed:
                raise OSError("the stream is closed")
            if not self._incoming:
                if self._ended:
                    return b""
                raise self._lost_error()
            data = self._take(size)
            read = self._to_acknowledge(len(data))
        if read:
            self._outlet.post(struct.pack("!BII", WINDOW_ADJUST, self._remote, read), self)
        return data

    def pour(self, take: Callable[[bytes], int]) -> None:
        """Offer what arrives to `take` while its reader waits in `recv`, sparing it from waking.

        Args:
            take: called by the connection's own thread, so it must never wait; says how many bytes it took
                off the front, and leaves the rest to `recv`.
        """
        self._take_now = take

    def wait_until_gone(self, timeout: float) -> bool:
        """Wait until the server closed the stream; False if it did not within `timeout` seconds."""
        with self._lock:
            return self._changed.wait_for(lambda: self._gone or self._closed or self._lost, timeout)

    def close(self) -> None:
        """End the stream; waiting threads are let go. May be called more than once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            say = self._open and not self._gone and not self._lost
            self._incoming.clear()
            self._changed.notify_all()
        if say:
            # Where the connection breaks just now there is nobody left to tell.
            with contextlib.suppress(OSError):
                self._outlet.post(struct.pack("!BI", CLOSE, self._remote), self, last=True)

    def end_input(self) -> None:
        """Tell the server that no more bytes will come from here."""
        self._outlet.post(struct.pack("!BI", EOF, self._remote), self)

    def execute(self, command: str) -> None:
        """Ask for `command` to be run in the user's login shell; a refusal closes the stream."""
        text = command.encode()
        content = struct.pack("!BII4s?I", REQUEST, self._remote, 4, b"exec", True, len(text)) + text
        self._outlet.post(content, self)

    def as_socket(self) -> ChannelSocket:
        """Give what a transport needs to run another SSH connection inside this stream."""
        return ChannelSocket(self)

    @property
    def standard_error(self) -> bytes:
        """What arrived on standard error, the last `MAX_STDERR` bytes of it."""
        with self._lock:
            return b"".join(self.errors)

    def _send_piece(self, view: memoryview, timeout: float | None) -> int:
        with self._lock:
            if not self._changed.wait_for(self._writable, timeout):
                raise TimeoutError("the other side is not taking any bytes")
            if self._lost:
                raise self._lost_error()
            if self._closed or self._gone:
                raise BrokenPipeError("the stream is closed")
            size = min(len(view), self._credit, self._max_packet)
            self._credit -= size
        header = struct.pack("!BII", DATA, self._remote, size)
        self._outlet.post(b"".join((header, view[:size])), self, size=size)
        return size

    def _to_acknowledge(self, size: int) -> int:
        """Count bytes that were read; gives how many more the server may send, 0 if it need not know yet."""
        self._unacknowledged += size
        read = self._unacknowledged
        if read < min(ACKNOWLEDGE, self.window // 2) or self._ended or self._lost:
            return 0
        self._unacknowledged = 0
        return read + self._widened()

    def _widened(self) -> int:
        """Widen the window if little waits to be read; gives by how much."""
        waiting = sum(len(piece) for piece in self._incoming) - self._offset
        if waiting > self.window // 4 or self.window >= WIDEST:
            return 0
        more = self._outlet.widen(min(self.window, WIDEST - self.window))
        self.window += more
        return more

    def _readable(self) -> bool:
        return bool(self._incoming) or self._ended or self._closed or self._lost

    def _writable(self) -> bool:
        free = self._credit > 0 and self._in_outbox < MAX_QUEUED
        return free or self._closed or self._gone or self._lost

    def _take(self, size: int) -> bytes:
        first = self._incoming[0]
        if self._offset == 0 and len(first) <= size and len(self._incoming) == 1:
            return self._incoming.popleft()
        pieces: list[Buffer] = []
        while size and self._incoming:
            first = self._incoming[0]
            piece = memoryview(first)[self._offset : self._offset + size]
            pieces.append(piece)
            size -= len(piece)
            self._offset += len(piece)
            if self._offset == len(first):
                self._incoming.popleft()
                self._offset = 0
        return b"".join(pieces)

    def _lost_error(self) -> OSError:
        return ConnectionResetError(self._outlet.why_lost())

    # -- for the outlet -------------------------------------------------------------------------------

    def queued(self, size: int) -> None:
        """Take note that `size` of our bytes wait in the outbox."""
        with self._lock:
            self._in_outbox += size

    def unqueued(self, size: int) -> None:
        """Take note that `size` of our bytes have left the outbox."""
        with self._lock:
            full = self._in_outbox >= MAX_QUEUED
            self._in_outbox -= size
            if full and self._in_outbox < MAX_QUEUED:
                self._changed.notify_all()

    # -- what arrives; called by the transport's thread, which must not be held up ---------------------

    def on_open(self, remote: int, window: int, max_packet: int) -> None:
        """Take the server's consent."""
        with self._lock:
            self._remote, self._credit, self._max_packet = remote, window, min(max_packet, 1 << 15)
            self._open = True
            abandoned = self._closed
            self._changed.notify_all()
        if abandoned:
            self._outlet.post(struct.pack("!BI", CLOSE, remote), self, last=True)

    def on_refusal(self, refusal: ChannelRefused) -> None:
        """Take the server's refusal."""
        with self._lock:
            self._refusal = refusal
            self._changed.notify_all()

    def on_data(self, message: Any) -> None:
        """Take bytes."""
        data: bytes = message.get_string()
        read = 0
        with self._lock:
            if self._take_now is not None and self._is_awaited and not self._incoming and not self._closed:
                taken = self._take_now(data)
                read = self._to_acknowledge(taken)
                data = data[taken:] if taken else data
            if data and not self._closed:
                self._incoming.append(data)
                self._changed.notify_all()
        if read:
            self._outlet.post(struct.pack("!BII", WINDOW_ADJUST, self._remote, read), self)

    def on_extended_data(self, message: Any) -> None:
        """Take standard error; it is acknowledged at once, and only its end is kept."""
        kind, data = message.get_int(), message.get_string()
        with self._lock:
            if kind == STDERR:
                self.errors.append(data)
                self._errors_size += len(data)
                while self._errors_size - len(self.errors[0]) > MAX_STDERR:
                    self._errors_size -= len(self.errors.popleft())
            remote = self._remote
        self._outlet.post(struct.pack("!BII", WINDOW_ADJUST, remote, len(data)), self)

    def on_window_adjust(self, message: Any) -> None:
        """Take leave to send more."""
        with self._lock:
            self._credit += message.get_int()
            self._changed.notify_all()

    def on_success(self, _message: Any) -> None:
        """Take the server's word that it did what was asked; nobody waits for it."""

    def on_failure(self, _message: Any) -> None:
        """Take the server's word that it would not run a command: the stream ends without a byte."""
        with self._lock:
            self._ended = True
            self._changed.notify_all()
        self._outlet.post(struct.pack("!BI", CLOSE, self._remote), self, last=True)

    def on_request(self, message: Any) -> None:
        """Take news of a command's end; anything else the server asks of us is declined."""
        name, wants_answer = message.get_text(), message.get_boolean()
        with self._lock:
            if name == "exit-status":
                self.exit_status = message.get_int()
            elif name == "exit-signal":
                self.exit_status = -1
            remote = self._remote
        if wants_answer:
            self._outlet.post(struct.pack("!BI", FAILURE, remote), self)

    def on_eof(self, _message: Any) -> None:
        """Take note that no more bytes will come."""
        with self._lock:
            self._ended = True
            self._changed.notify_all()

    def on_close(self, _message: Any) -> None:
        """Answer the server's CLOSE, if ours did not come first."""
        with self._lock:
            answer = not self._closed
            self._ended = self._gone = True
            self._changed.notify_all()
        if answer:
            self._outlet.post(struct.pack("!BI", CLOSE, self._remote), self, last=True)
        self._outlet.forget(self)

    def _unlink(self) -> None:
        """The connection is gone (the name is the transport's)."""
        with self._lock:
            self._lost = True
            self._changed.notify_all()


class ChannelSocket:
    """A stream in the shape of a socket, as far as a transport uses one."""

    def __init__(self, stream: Stream) -> None:
        """Wrap `stream`; closing one closes the other."""
        self._stream = stream
        self._timeout: float | None = None
        self._closed = False  # read by the transport

    def settimeout(self, timeout: float | None) -> None:
        """Bound the wait of `send` and `recv_into`, in seconds."""
        self._timeout = timeout

    def send(self, data: Buffer) -> int:
        """Send some bytes; raises TimeoutError if none could go."""
        return self._stream.send(data, self._timeout)

    def recv_into(self, buffer: memoryview) -> int:
        """Read some bytes; 0 at the end; raises TimeoutError if none came."""
        data = self._stream.recv(len(buffer), timeout=self._timeout)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the stream."""
        self._closed = True
        self._stream.close()
