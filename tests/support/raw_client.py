"""A notebook that speaks to an agent's socket frame by frame."""

from __future__ import annotations

import socket
import uuid
from typing import TYPE_CHECKING, Any

from fal_agent.framing import FrameDecoder
from fal_agent.wire import Hello, Message, decode, encode

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RawClient"]


class RawClient:
    """One connection.

    Args:
        path: of the socket.
        client_id: whose runs are whose.
        hello: say hello and wait for the welcome, as every notebook does first.
    """

    def __init__(self, path: Path, *, client_id: str = "", hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self._decoder = FrameDecoder()
        self._waiting: list[Any] = []
        if hello:
            self.send(Hello(client_id or uuid.uuid4().hex))
            self.receive("welcome")

    def send(self, message: Message, buffers: Any = ()) -> None:
        self.socket.sendall(encode(message, buffers))

    def receive(self, *types: str) -> Any:
        """Give the next message of one of some types; None at the end of the stream."""
        while True:
            while self._waiting:
                frame = self._waiting.pop(0)
                message = decode(frame)
                if message.type in types:
                    return message, frame.buffers
            data = self.socket.recv(1 << 16)
            if not data:
                return None
            self._waiting += self._decoder.feed(data)

    def close(self) -> None:
        self.socket.close()
