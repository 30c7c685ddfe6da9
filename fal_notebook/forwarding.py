"""A port of this machine that leads to an app on a host, byte by byte.

Runs in the notebook. Listens on the loopback address alone, dials anew for every connection, and never
looks into what passes. Two threads serve a connection, one for each direction, and each holds at most one
piece of it: whoever reads slowly slows down whoever writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import socket
import struct
import threading
import time
import weakref
from typing import TYPE_CHECKING

from fal_agent.errors import ConfigurationError, FalServerlessException

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.hosts.base import ByteStream

__all__ = ["Forwarder"]

LOOPBACK = "127.0.0.1"
BACKLOG = 512  # connections that wait to be accepted
PIECE = 128 << 10  # bytes read at once
LINGER = 30.0  # seconds that a client may be silent after the app has ended its side
UNANSWERED_LINGER = 2.0  # the same for a client that was told that the app cannot be reached
JOIN_TIMEOUT = 5.0  # seconds that `close` waits for a thread; one that dials ends when its dialling does
OUT_OF_FILES_PAUSE = 0.1  # seconds between two tries to accept when this process has no file left

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, and for no time
# Clients that are gone without a trace are noticed within two minutes (Linux names; others use defaults).
_PROBES = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))

_every: weakref.WeakSet[Forwarder] = weakref.WeakSet()


class Forwarder:
    """Gives an app on a host a URL on this machine, until `close()`.

    A process that is forked off does not serve: it lets go of the port and of all connections.

    Args:
        dial: gives a new stream to the app. Called in a thread of its own for each connection; it may take
            as long as a runner needs to start. Raises OSError or one of `fal.exceptions` if the app cannot be
            reached, which an HTTP client gets as an answer with status 503.
        name: what is forwarded to, for the names of threads.
        port: of 127.0.0.1; 0 takes a free one.

    Attributes:
        port: the port.

    Raises:
        ConfigurationError: the port is in use, or this user may not have it.
    """

    def __init__(self, dial: Callable[[], ByteStream], *, name: str, port: int = 0) -> None:
        self._dial, self._name = dial, name
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[_Connection] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name=f"forward {name}", daemon=True)
        _let_go_when_forked()
        _every.add(self)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the app is reached: "http://127.0.0.1:PORT"."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._open)

    def close(self) -> None:
        """Stop listening and end all connections; may be called again."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            connections = list(self._open)
        _wake_listener(self._listener, self.port)
        for connection in connections:
            connection.stop()
        for thread in (self._thread, *(connection.thread for connection in connections)):
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(JOIN_TIMEOUT)
        self._listener.close()

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closing.is_set() else f"{self.connections} connections"
        return f"<Forwarder {self._name!r} at {self.url}, {state}>"

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed; or the client has gone already; or there are too many open files
                self._closing.wait(OUT_OF_FILES_PAUSE)
                continue
            connection = _Connection(client, self._dial, self._name, self._forget)
            with self._lock:
                refused = self._closing.is_set()
                if not refused:
                    self._open.add(connection)
            if refused:
                client.close()
            else:
                connection.start()

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._open.discard(connection)

    def _let_go(self) -> None:
        """In a forked child: close what it inherited, without a word to the other ends."""
        self._lock = threading.Lock()  # another thread may have held it
        self._closing.set()
        self._listener.close()
        for connection in self._open:
            connection.let_go()
        self._open = set()


class _Connection:
    """One client and its stream to the app.

    `thread` dials, then copies what the app sends and cleans up; a second one copies what the client sends.
    """

    def __init__(
        self,
        client: socket.socket,
        dial: Callable[[], ByteStream],
        name: str,
        ended: Callable[[_Connection], None],
    ) -> None:
        self._client, self._dial, self._name, self._ended = client, dial, name, ended
        self.thread = threading.Thread(target=self._run, name=f"forward {name}: answers", daemon=True)
        self._stream: ByteStream | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._has_answered = False  # whether the client has some of the app's bytes
        self._is_reading = False  # whether more of the client's bytes may come
        self._read_all = threading.Event()  # set once no more will
        self._pieces = 0  # of the client's bytes

    def start(self) -> None:
        try:
            self.thread.start()
        except RuntimeError as error:  # this process may have no more threads
            with contextlib.suppress(OSError):
                self._client.sendall(_unavailable(str(error)))
            self._close()

    def stop(self, *, reset: bool = False) -> None:
        """End both directions now, from any thread; `reset`: the client is to see that something broke."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            stream, is_reading = self._stream, self._is_reading
        if reset:
            with contextlib.suppress(OSError):  # the client has gone
                self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        # Ending only what comes in wakes the thread that reads, and says nothing to the client yet.
        _shut(self._client, socket.SHUT_RD if reset and is_reading else socket.SHUT_RDWR)
        if stream is not None:
            _break(stream)

    def let_go(self) -> None:
        for end in (self._client, self._stream):
            if isinstance(end, socket.socket):
                socket.socket.close(end)  # this very one: a subclass may end the parent's connection too

    def _run(self) -> None:
        try:
            _tune(self._client)
            stream = self._reach()
            if stream is not None:
                self._copy_both_ways(stream)
        finally:
            self._close()

    def _reach(self) -> ByteStream | None:
        """Dial; None if the connection is over."""
        try:
            stream = self._dial()
        except Exception as error:
            self._say_unavailable(error)
            self._drain()
            if isinstance(error, (OSError, FalServerlessException)):
                return None
            raise
        with self._lock:
            self._stream = stream
            return None if self._stopped else stream

    def _copy_both_ways(self, stream: ByteStream) -> None:
        requests = threading.Thread(
            target=self._copy_requests, args=(stream,), name=f"forward {self._name}: requests", daemon=True
        )
        self._is_reading = True
        try:
            requests.start()
        except RuntimeError as error:  # this process may have no more threads
            self._say_unavailable(error)
            self._drain()
            return
        try:
            if self._copy_answers(stream):
                self._await_client()
        finally:
            self.stop()
            requests.join()

    def _copy_answers(self, stream: ByteStream) -> bool:
        """Copy until the app ends its side; False if the connection is over altogether."""
        pour = getattr(stream, "pour", None)
        if pour is not None:
            pour(self._take_now)
        while True:
            try:
                data = stream.recv(PIECE)
            except OSError as error:
                if self._has_answered:
                    self.stop(reset=True)  # half an answer must not look like a whole one
                    return False
                self._say_unavailable(error)
                return True
            try:
                if not data:
                    self._client.shutdown(socket.SHUT_WR)
                    return True
                self._client.sendall(data)
            except OSError:  # the client has gone
                return False
            self._has_answered = True

    def _take_now(self, data: bytes) -> int:
        """Pass on what the client's socket has room for: a change of threads less for most answers."""
        try:
            taken = self._client.send(data, socket.MSG_DONTWAIT)
        except OSError:  # it has no room; or the client has gone, as the thread that copies will find
            return 0
        self._has_answered = True
        return taken

    def _copy_requests(self, stream: ByteStream) -> None:
        try:
            self._read_requests(stream)
        except OSError:  # the client has gone
            self.stop()
            return
        finally:
            self._read_all.set()
        with self._lock:
            self._is_reading = False
            if self._stopped:
                return
        # Whoever stops the connection, and a client that goes away altogether, end the wait.
        _end_input(stream)
        _wait_until_gone(self._client)
        self.stop()

    def _read_requests(self, stream: ByteStream) -> None:
        is_taken = True
        while data := self._client.recv(PIECE):
            self._pieces += 1
            if is_taken:
                try:
                    stream.sendall(data)
                except OSError:
                    # The app has answered without reading it all, or has gone. The rest is read and dropped:
                    # closing a socket that holds unread bytes would take the answer from the client.
                    is_taken = False

    def _await_client(self) -> None:
        """The app has ended its side: wait while the client sends, and let it end its own."""
        pieces = -1
        while pieces != self._pieces:
            pieces = self._pieces
            if self._read_all.wait(LINGER):
                return

    def _say_unavailable(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            self._client.sendall(_unavailable(str(error) or type(error).__name__))
            self._client.shutdown(socket.SHUT_WR)

    def _drain(self) -> None:
        """Read and drop the request of a client that has been answered, so that the answer arrives."""
        deadline = time.monotonic() + LINGER
        self._client.settimeout(UNANSWERED_LINGER)
        with contextlib.suppress(OSError):  # it is silent, or gone
            while self._client.recv(PIECE) and time.monotonic() < deadline:
                pass

    def _close(self) -> None:
        self._client.close()
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
        self._ended(self)


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on port {port} of {LOOPBACK}: {getattr(error, 'strerror', None) or error}. "
            "Choose another port, or 0 for a free one"
        ) from error
    return listener


def _wake_listener(listener: socket.socket, port: int) -> None:
    """Make a waiting `accept` return."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # does it on Linux, and ends the listening
    with contextlib.suppress(OSError):
        socket.create_connection((LOOPBACK, port), 1.0).close()  # does it elsewhere


def _tune(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES:
        if hasattr(socket, option):
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _shut(end: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """End directions of a socket; threads that wait on it are let go. The file stays open."""
    with contextlib.suppress(OSError):  # it is not connected any more
        end.shutdown(how)


def _break(stream: ByteStream) -> None:
    if isinstance(stream, socket.socket):
        _shut(stream)  # closed once no thread uses its file descriptor
        return
    with contextlib.suppress(OSError):
        stream.close()


def _end_input(stream: ByteStream) -> None:
    """Tell the app that no more bytes will come, by whatever the stream has for it."""
    end = getattr(stream, "end_input", None)
    if end is None and isinstance(stream, socket.socket):
        end = functools.partial(stream.shutdown, socket.SHUT_WR)
    if end is not None:
        with contextlib.suppress(OSError):  # it is gone, as the other thread will find
            end()


def _wait_until_gone(client: socket.socket) -> None:
    """Wait until a client that has ended its side is reset, or is shut in both directions."""
    watch = select.poll()
    watch.register(client, 0)  # errors and hang-ups are always told
    watch.poll()


def _unavailable(text: str) -> bytes:
    body = json.dumps({"detail": text}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


@functools.cache
def _let_go_when_forked() -> None:
    def let_go() -> None:
        for forwarder in list(_every):
            forwarder._let_go()  # noqa: SLF001 - one module, one thing

    os.register_at_fork(after_in_child=let_go)
