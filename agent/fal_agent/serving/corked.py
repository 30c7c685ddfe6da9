"""uvicorn's HTTP protocol, with the head of an answer and the body behind it written as one piece.

Runs in the process that serves an app. Each piece costs a system call here and a packet on the way to the
notebook, and for most answers the head would be one of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

__all__ = ["CorkedProtocol"]

_HEAD = b"HTTP/1.1 "
_JOINED = 64 << 10  # bytes of a body beyond which copying it costs more than a second piece


class CorkedProtocol(HttpToolsProtocol):
    """A connection whose answers leave in as few pieces as can be."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin to serve a client."""
        super().connection_made(cast("asyncio.Transport", _Cork(transport, self.loop)))

    def handle_websocket_upgrade(self) -> None:
        """Give the connection to a websocket, which writes whole messages anyway."""
        cork: Any = self.transport
        self.transport = cork.uncorked()
        super().handle_websocket_upgrade()


class _Cork:
    """A transport that holds back an answer's head until the body comes, or the event loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: Optional[bytes] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        held = self._held
        if held is None and data.startswith(_HEAD):
            self._held = data
            self._loop.call_soon(self.flush)
        elif held is not None and len(data) < _JOINED:
            self._held = None
            self._transport.write(held + data)
        else:
            self.flush()
            self._transport.write(data)

    def flush(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._transport.write(held)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def uncorked(self) -> asyncio.Transport:
        self.flush()
        return self._transport
