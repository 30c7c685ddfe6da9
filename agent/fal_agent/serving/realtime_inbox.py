"""The inputs of one realtime connection that wait for the handler.

Runs in the worker that serves an app, on its event loop. Memory stays bounded: either the oldest input
makes room, or whoever fills the inbox waits in `room`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Optional

__all__ = ["MAX_WAITING_BYTES", "MAX_WAITING_INPUTS", "Inbox", "Input", "InputsOver"]

MAX_WAITING_INPUTS = 1024  # that an endpoint without `buffering` keeps
MAX_WAITING_BYTES = 64 * 1024 * 1024  # of inputs that wait


class InputsOver(Exception):  # noqa: N818 - it ends a stream, as StopIteration does
    """No more inputs come.

    Attributes:
        timed_out: none came for the session's timeout; otherwise the client said that it has no more.
    """

    def __init__(self, *, timed_out: bool) -> None:
        super().__init__(timed_out)
        self.timed_out = timed_out


class Input:
    """One message of the client.

    Attributes:
        frame: its bytes.
        value: what they mean, once `is_open`.
    """

    __slots__ = ("frame", "is_open", "value")

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.is_open = False
        self.value: Any = None


class Inbox:
    """A queue of inputs with a bound.

    Args:
        most: inputs that may wait; one more pushes out the oldest. None keeps all of them, and lets the
            reader wait when there are `MAX_WAITING_INPUTS`. With either, it waits rather than let more
            than `MAX_WAITING_BYTES` gather.
    """

    def __init__(self, most: Optional[int]) -> None:
        self._most = most
        self._waiting: deque[Input] = deque()
        self._bytes = 0
        self._over: Optional[Exception] = None
        self._news, self._space = asyncio.Event(), asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether no more inputs are taken in; some may still wait."""
        return self._over is not None

    async def room(self) -> None:
        """Wait until another input may be read from the connection."""
        while self._is_full():
            self._space.clear()
            await self._space.wait()

    def _is_full(self) -> bool:
        if self.is_closed:
            return False
        if self._most is None:
            return len(self._waiting) >= MAX_WAITING_INPUTS or self._bytes >= MAX_WAITING_BYTES
        return len(self._waiting) < self._most and self._bytes >= MAX_WAITING_BYTES

    def put(self, frame: bytes) -> None:
        """Add an input; after `close` it is dropped."""
        if self.is_closed:
            return
        if self._most is not None and len(self._waiting) >= self._most:
            self.take_waiting()
        self._waiting.append(Input(frame))
        self._bytes += len(frame)
        self._news.set()

    async def take(self) -> Input:
        """Give the oldest input, and wait for it.

        Raises:
            Exception: what `close` was called with, when nothing waits any more.
        """
        while True:
            item = self.take_waiting()
            if item is not None:
                return item
            if self._over is not None:
                raise self._over
            self._news.clear()
            await self._news.wait()

    def take_waiting(self) -> Optional[Input]:
        """Give the oldest input if one waits."""
        if not self._waiting:
            return None
        item = self._waiting.popleft()
        self._bytes -= len(item.frame)
        self._space.set()
        return item

    def put_back(self, item: Input) -> None:
        """Make an input the oldest again, unless others that came meanwhile push it out."""
        if self._most is not None and len(self._waiting) >= self._most:
            return
        self._waiting.appendleft(item)
        self._bytes += len(item.frame)
        self._news.set()

    def close(self, reason: Exception) -> None:
        """Take in nothing more; those who take get `reason` after what waits. The first reason counts."""
        if self._over is None:
            self._over = reason
        self._news.set()
        self._space.set()

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._bytes = 0
        self._space.set()
