"""uvicorn's HTTP protocol, with the head of an answer and the body behind it written as one piece.

Runs in the process that serves an app. Each piece costs a system call here and a packet on the way to the
notebook, and for most answers the head would be one of two. A client that offers HTTP/2 (as
curl --http2 and Java do) is served by h11: httptools takes the offer for the end of the request, and
the body would be lost.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Optional, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

__all__ = ["CorkedProtocol"]

_HEAD = b"HTTP/1.1 "
_OFFERS_HTTP_2 = re.compile(rb"^upgrade:[^\r\n]*\bh2c\b", re.IGNORECASE | re.MULTILINE)
_JOINED = 64 << 10  # bytes of a body beyond which copying it costs more than a second piece


class CorkedProtocol(HttpToolsProtocol):
    """A connection whose answers leave in as few pieces as can be."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin to serve a client."""
        super().connection_made(cast("asyncio.Transport", _Cork(transport, self.loop)))

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client's."""
        if b"h2c" in data and self._is_between_requests() and _OFFERS_HTTP_2.search(_head_of(data)):
            self._hand_over(data)
        else:
            super().data_received(data)

    def _is_between_requests(self) -> bool:
        cycle: Any = self.cycle  # None before the first request
        return cycle is None or cycle.response_complete

    def _hand_over(self, data: bytes) -> None:
        """Let h11 serve the client from here on; it ignores the offer, as HTTP allows."""
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        other = H11Protocol(self.config, self.server_state, self.app_state, self.loop)
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(data)

    def handle_websocket_upgrade(self) -> None:
        """Give the connection to a websocket, which writes whole messages anyway."""
        cork: Any = self.transport
        self.transport = cork.uncorked()
        super().handle_websocket_upgrade()


def _head_of(data: bytes) -> bytes:
    return data.partition(b"\r\n\r\n")[0]


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
