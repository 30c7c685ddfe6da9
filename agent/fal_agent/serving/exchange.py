"""Put one ASGI application in the place of another while requests are being answered.

Runs in the process that serves an app, on its event loop. Every request is answered from beginning to end by
one application: the one that was current when it came.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Exchange"]

_LAST_SECONDS = 5.0  # that a request has for its own clean-up when it is cancelled


class Exchange:
    """An application that passes everything to the current one.

    Args:
        application: the first one.
    """

    def __init__(self, application: ASGIApp) -> None:
        self._current = _Counted(application)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the current application answer."""
        await self._current(scope, receive, send)

    def swap(self, application: ASGIApp, *, patience: Optional[float] = None) -> Coroutine[Any, Any, None]:
        """Put another application in place, at once; await it to have the former one's requests end.

        Args:
            application: gets the requests and websockets that come from now on.
            patience: seconds after which those of the former one are cancelled; None: they are waited for.
        """
        former, self._current = self._current, _Counted(application)
        return former.empty(patience)


class _Counted:
    """An application with the requests that it is answering."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application
        self._tasks: dict[object, Optional[asyncio.Task[Any]]] = {}
        self._is_empty: Optional[asyncio.Future[None]] = None  # while somebody waits for that

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = object()
        self._tasks[request] = asyncio.current_task()
        try:
            await self._application(scope, receive, send)
        finally:
            del self._tasks[request]
            if not self._tasks and self._is_empty is not None and not self._is_empty.done():
                self._is_empty.set_result(None)

    async def empty(self, patience: Optional[float]) -> None:
        if not self._tasks:
            return
        self._is_empty = asyncio.get_running_loop().create_future()
        await asyncio.wait({self._is_empty}, timeout=patience)
        for task in list(self._tasks.values()):
            if task is not None:
                task.cancel()
        await asyncio.wait({self._is_empty}, timeout=_LAST_SECONDS)
