"""A server that answers each HTTP request with bytes that a test gives, right or wrong."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class RawServer:
    """Answers every request on a connection of its own; requests have no body that matters.

    Args:
        answer: gives the bytes for a request's head; None: there is no answer until the server ends.

    Attributes:
        url: where.
        requests: the heads that came.
    """

    def __init__(self, answer: Callable[[str], bytes | None]) -> None:
        self.requests: list[str] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> RawServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        for connection in self._open:
            connection.close()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            self._serve_one(connection)

    def _serve_one(self, connection: Any) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(1 << 16)
            if not piece:
                return
            head += piece
        self.requests.append(head.decode())
        answer = self._answer(self.requests[-1])
        if answer is not None:
            with contextlib.suppress(OSError):
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_RDWR)
