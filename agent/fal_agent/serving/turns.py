"""Let a bounded number of requests go on at once, in the order in which they came.

Runs in the process that serves an app, on its event loop. Whoever waits and goes away leaves the queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Message, Receive

__all__ = ["Inbox", "Turns"]

_READ_AHEAD = (
    1 << 20
)  # bytes of a body; of a request with a longer one it is not noticed that it was given up
_ENDS = ("http.disconnect", "websocket.disconnect")


class Inbox:
    """What a client sends, some of which can be read ahead to notice that the client has gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead: deque[Message] = deque()

    async def receive(self) -> Message:
        """Give the next message: stands for the ASGI server's own `receive`."""
        return self._ahead.popleft() if self._ahead else await self._receive()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[asyncio.Task[None]]:
        """Read ahead within; gives a task that ends when the client goes away."""
        task = asyncio.create_task(self._read_ahead())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()  # what went wrong with the connection, if anything

    async def _read_ahead(self) -> None:
        size = 0
        while size < _READ_AHEAD:
            message = await self._receive()
            self._ahead.append(message)
            if message["type"] in _ENDS:
                return
            size += len(message.get("body", b""))
        await asyncio.get_running_loop().create_future()  # until cancelled: the rest stays with the server


class Turns:
    """Gives turns, first come, first served.

    Attributes:
        places: so many turns are out at most; None: any number.
    """

    def __init__(self, places: Optional[int]) -> None:
        self.places = places
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    async def take(self, inbox: Inbox) -> bool:
        """Wait for a turn, which `leave` ends; False if the client went away first."""
        if self._has_room() and not self._waiting:
            self._taken += 1
            return True
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        has_turn = False
        try:
            async with inbox.watched() as gone:
                await asyncio.wait({turn, gone}, return_when=asyncio.FIRST_COMPLETED)
            has_turn = turn.done()
        finally:
            if not has_turn:
                self._give_up(turn)
        return has_turn

    def leave(self) -> None:
        """End a turn, which is somebody else's then."""
        self._taken -= 1
        self.admit()

    def admit(self) -> None:
        """Give the turns that are free, for example after `places` has grown."""
        while self._waiting and self._has_room():
            self._taken += 1
            self._waiting.popleft().set_result(None)

    def _has_room(self) -> bool:
        return self.places is None or self._taken < self.places

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn.done():
            self.leave()  # it had come meanwhile
        else:
            self._waiting.remove(turn)
