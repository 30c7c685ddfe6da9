"""A request's body on its way through the gateway: kept while it is small, streamed when it is large.

Runs in the gateway process. Always true: of one body at most `KEPT` bytes and one part lie here, and of all
bodies together no more than the allowance and one part each; a client that sends faster has to wait.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive

__all__ = ["KEPT", "Allowance", "Body", "Upload"]

KEPT = 1 << 20  # bytes of a body that are kept, so that it can be sent to another runner too
_PART = 1 << 16  # bytes that are sent at once


@dataclass
class Allowance:
    """Bytes that all bodies together may still keep."""

    left: int = 256 << 20


class Body:
    """The body of one request; made in the loop that it is used in.

    Args:
        receive: gives the ASGI messages of the request.
        allowance: what is kept is taken from it, and given back by `discard`.
    """

    def __init__(self, receive: Receive, allowance: Allowance) -> None:
        self._receive, self._allowance = receive, allowance
        self._kept = bytearray()
        self._start = 0  # where in the body `_kept` begins
        self._received = 0  # bytes
        self._is_complete = self._is_discarded = False
        self._arrived, self._taken = asyncio.Event(), asyncio.Event()

    @property
    def is_replayable(self) -> bool:
        """Whether it can still be sent from its beginning."""
        return not (self._start or self._is_discarded)

    async def listen(self) -> None:
        """Take in what the client sends, as there is room, and return when the client is gone."""
        while True:
            while not (self._is_complete or self._has_room()):
                self._taken.clear()
                await self._taken.wait()
            message = await self._receive()
            if message["type"] != "http.request":
                return
            self._add(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            self._arrived.set()

    async def read(self, offset: int) -> bytes:
        """Give some of it, from an offset on; nothing at its end.

        What does not fit is dropped behind the reader: there is one reader at a time, and a second
        one comes only while the body is replayable.
        """
        while offset >= self._received:
            if self._is_complete:
                return b""
            if not self._has_room():
                self._drop()
            self._arrived.clear()
            await self._arrived.wait()
        begin = offset - self._start
        part = bytes(self._kept[begin : begin + _PART])
        if self._received > KEPT:
            self._drop(begin + len(part))
        return part

    def discard(self) -> None:
        """Keep nothing of it any longer; what still arrives is thrown away."""
        self._is_discarded = True
        self._drop()

    def _has_room(self) -> bool:
        return not self._kept or (len(self._kept) <= KEPT and self._allowance.left > 0)

    def _add(self, part: bytes) -> None:
        if not self._is_discarded:
            self._received += len(part)
            self._kept += part
            self._allowance.left -= len(part)

    def _drop(self, size: Optional[int] = None) -> None:
        size = len(self._kept) if size is None else size
        del self._kept[:size]
        self._start += size
        self._allowance.left += size
        self._taken.set()


class Upload(httpx.AsyncByteStream):
    """A body as what httpx sends; each one begins at the body's beginning."""

    def __init__(self, body: Body) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset = 0
        while part := await self._body.read(offset):
            offset += len(part)
            yield part
