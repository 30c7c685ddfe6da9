"""Clients that have not asked anything yet, or nothing new: one thread watches all of them.

Runs in the notebook, in the thread of a forwarder that accepts. A client here costs a file descriptor and
what it has sent of a head; it is handed on once that is complete, and let go when it takes too long.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fal_notebook.forwarding.exchanges import MOST_OF_A_HEAD, is_whole_head, may_be_http, plain_answer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WaitingRoom"]

HEAD_PATIENCE = 60.0  # seconds that a client may take to say what it asks, from when it came
IDLE_PATIENCE = 300.0  # seconds that one may be silent that was answered before
OUT_OF_FILES_PAUSE = 0.1  # seconds between two tries to accept when this process has no file left
_PIECE = 64 << 10
_REQUEST_TIMEOUT = 408


@dataclass(eq=False)
class _Client:
    socket: socket.socket
    deadline: float
    said: bytearray = field(default_factory=bytearray)


class WaitingRoom:
    """Accepts clients and hands on those that ask something.

    Args:
        listener: where they come in.
        on_request: called with a client's socket and what it has said so far.
        most: clients that may wait; one more, and the one is let go that has least time left.
    """

    def __init__(
        self, listener: socket.socket, on_request: Callable[[socket.socket, bytes], None], most: int
    ) -> None:
        self._listener, self._on_request, self._most = listener, on_request, most
        self._clients: dict[socket.socket, _Client] = {}
        self._returned: deque[socket.socket] = deque()
        self._selector = selectors.PollSelector()  # nothing of it is shared with a forked child
        self._wakes, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._is_closing = False

    def __len__(self) -> int:
        return len(self._clients)

    def take_back(self, client: socket.socket) -> None:
        """Let a client wait that was answered; from any thread."""
        self._returned.append(client)
        self._wake()

    def close(self) -> None:
        """Let everybody go; from any thread. Returns at once."""
        self._is_closing = True
        self._wake()

    def let_go(self) -> None:
        """In a forked child: close what it inherited."""
        self._is_closing = True
        for inherited in [*self._clients, *self._returned, self._wakes, self._waker]:
            inherited.close()

    def run(self) -> None:
        """Serve until `close`."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakes, selectors.EVENT_READ)
        try:
            while not self._is_closing:
                self._turn()
        finally:
            for client in [*self._clients, *self._returned]:
                client.close()
            self._clients.clear()
            self._selector.close()
            self._wakes.close()
            self._waker.close()

    def _turn(self) -> None:
        first = min((client.deadline for client in self._clients.values()), default=None)
        timeout = None if first is None else max(0.0, first - time.monotonic())
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wakes:
                self._wakes.recv(_PIECE)
            else:
                self._hear(key.data)
        while self._returned:
            self._admit(self._returned.popleft(), IDLE_PATIENCE)
        now = time.monotonic()
        for client in [client for client in self._clients.values() if client.deadline <= now]:
            self._dismiss(client)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # the client has gone already, or there are too many open files
            self._make_room()
            if not self._is_closing:
                time.sleep(OUT_OF_FILES_PAUSE)
            return
        self._admit(client, HEAD_PATIENCE)

    def _admit(self, client: socket.socket, patience: float) -> None:
        if len(self._clients) >= self._most:
            self._make_room()
        waiting = _Client(client, time.monotonic() + patience)
        self._clients[client] = waiting
        self._selector.register(client, selectors.EVENT_READ, waiting)
        self._hear(waiting)  # mostly it has asked already

    def _make_room(self) -> None:
        if self._clients:
            self._dismiss(min(self._clients.values(), key=lambda client: client.deadline))

    def _hear(self, client: _Client) -> None:
        if client.socket not in self._clients:  # it was let go in this very turn
            return
        try:
            data = client.socket.recv(_PIECE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._leave(client)
            client.socket.close()
            return
        if not client.said:
            client.deadline = min(client.deadline, time.monotonic() + HEAD_PATIENCE)
        client.said += data
        is_asked = not may_be_http(client.said) or is_whole_head(client.said)
        if is_asked or len(client.said) > MOST_OF_A_HEAD:
            self._leave(client)
            self._on_request(client.socket, bytes(client.said))

    def _leave(self, client: _Client) -> None:
        self._selector.unregister(client.socket)
        del self._clients[client.socket]

    def _dismiss(self, client: _Client) -> None:
        self._leave(client)
        if client.said:
            with contextlib.suppress(OSError):  # it has gone, or reads nothing
                text = f"the request was not complete within {HEAD_PATIENCE:g} s"
                client.socket.send(plain_answer(_REQUEST_TIMEOUT, text), socket.MSG_DONTWAIT)
        client.socket.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake, or has ended
            self._waker.send(b".")
