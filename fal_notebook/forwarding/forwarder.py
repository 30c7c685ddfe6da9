"""A port of this machine that leads to an app on a host.

Runs in the notebook. Listens on the loopback address alone, and dials when a client asks something. What
passes is passed byte by byte; it is only watched, to know what it means when it breaks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import socket
import threading
import weakref
from typing import TYPE_CHECKING

from fal_agent.errors import ConfigurationError
from fal_notebook.forwarding.connection import Connection
from fal_notebook.forwarding.exchanges import plain_answer
from fal_notebook.forwarding.waiting import WaitingRoom

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.forwarding.connection import Target
    from fal_notebook.hosts.base import ByteStream

__all__ = ["Forwarder"]

LOOPBACK = "127.0.0.1"
BACKLOG = 512  # connections that wait to be accepted
JOIN_TIMEOUT = 5.0  # seconds that `close` waits for a thread; one that dials ends when its dialling does
_LEAST, _MOST = 64, 2048  # connections at a time, whatever files this process may open
_UNAVAILABLE = 503

_every: weakref.WeakSet[Forwarder] = weakref.WeakSet()


class _Dialled:
    """A target that is a mere function; nothing is asked there twice."""

    may_repeat = may_repeat_refused = own_user_only = False

    def refused(self, _stream: ByteStream, /) -> None:
        """Nothing is sent again."""

    def __init__(self, dial: Callable[[], ByteStream]) -> None:
        self.dial = dial


class Forwarder:
    """Gives an app on a host a URL on this machine, until `close()`.

    Clients that have nothing to ask hold no connection to the app. There may be as many with a connection as
    a third of the files that this process may open, at most 2048, and as many without; beyond that the answer
    is 503, and those are let go that have been silent for longest. A process that is forked off does not
    serve: it lets go of the port and of all connections.

    Args:
        target: gives a new stream to the app: something to dial, or a function that does. Called in a thread
        of
            its own for each connection; it may take as long as a runner needs to start. Raises OSError or one
            of `fal.exceptions` if the app cannot be reached, which a client gets as an answer with status
            503.
        name: what is forwarded to, for the names of threads.
        port: of 127.0.0.1; 0 takes a free one.

    Attributes:
        port: the port.

    Raises:
        ConfigurationError: the port is in use, or this user may not have it.
    """

    def __init__(self, target: Target | Callable[[], ByteStream], *, name: str, port: int = 0) -> None:
        self._target: Target = _Dialled(target) if callable(target) else target
        self._name, self._most = name, _most_connections()
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._closing = threading.Event()
        self._room = WaitingRoom(self._listener, self._serve, self._most)
        self._thread = threading.Thread(target=self._room.run, name=f"forward {name}", daemon=True)
        _let_go_when_forked()
        _every.add(self)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the app is reached: "http://127.0.0.1:PORT"."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def connections(self) -> int:
        """How many clients are being served now."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """How many clients are there that have asked nothing, or nothing new."""
        return len(self._room)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    def close(self) -> None:
        """Stop listening and end all connections; may be called again."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            connections = list(self._open)
        self._room.close()
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

    def _serve(self, client: socket.socket, begun: bytes) -> None:
        """Serve a client that has asked something; called by the thread that accepts."""
        connection = Connection(client, begun, self._target, self._name, self._ended)
        with self._lock:
            is_closing, is_full = self._closing.is_set(), len(self._open) >= self._most
            if not is_closing and not is_full:
                self._open.add(connection)
        if is_closing or is_full:
            if is_full:
                text = f"{self._most} connections to {self._name} are open, the most there may be; close some"
                with contextlib.suppress(OSError):  # it has gone
                    client.send(plain_answer(_UNAVAILABLE, text), socket.MSG_DONTWAIT)
            client.close()
        else:
            connection.start()

    def _ended(self, connection: Connection, client: socket.socket | None) -> None:
        with self._lock:
            self._open.discard(connection)
            is_closing = self._closing.is_set()
        if client is not None and is_closing:
            client.close()
        elif client is not None:
            self._room.take_back(client)

    def _let_go(self) -> None:
        """In a forked child: close what it inherited, without a word to the other ends."""
        self._lock = threading.Lock()  # another thread may have held it
        self._closing.set()
        self._listener.close()
        self._room.let_go()
        for connection in self._open:
            connection.let_go()
        self._open = set()


def _most_connections() -> int:
    """Connections that may be open at a time: one takes two files on this machine, and others need some."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST
    return min(max(_LEAST, files // 3), _MOST)


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


@functools.cache
def _let_go_when_forked() -> None:
    def let_go() -> None:
        for forwarder in list(_every):
            forwarder._let_go()  # noqa: SLF001 - one module, one thing

    os.register_at_fork(after_in_child=let_go)
