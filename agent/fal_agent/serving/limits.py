"""Hold an app's requests to its limits, and tell how many there are and when something is wrong.

Runs in the process that serves an app, on its event loop, inside the guard, which marks what the agent
itself asks: health checks are neither counted nor queued nor limited.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Optional

from fal_agent.serving.failures import report
from fal_agent.serving.files import FILES_PATH
from fal_agent.serving.guard import IS_AGENT
from fal_agent.serving.refusals import header_values, refuse_any_origin
from fal_agent.serving.turns import Inbox, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["ANSWERED_503", "CHECK_ASKED", "CHECK_HEADER", "Limits"]

CHECK_HEADER = "x-fal-runner-health-check"  # in an answer or a request: the runner is to be checked
ANSWERED_503 = "an answer had status 503"
CHECK_ASKED = f"a health check was asked for by the header {CHECK_HEADER}"

_UNAVAILABLE = 503
_BEGINNINGS = frozenset(["http.response.start", "websocket.http.response.start", "websocket.accept"])


class Limits:
    """Counts and limits the requests of the application within.

    Args:
        application: what is limited.
        request_timeout: seconds that the application may take for a request, from the request's turn to the
            end of its answer; None: any time. Then the caller gets 504, or a broken connection if the answer
            had begun. A handler in a thread cannot be interrupted: it goes on, but nothing waits for it.
            Websockets have no such limit.
        multiplexing: requests and websockets at once; more wait, in the order in which they came. None: any
            number. Files of the store are not the app's work: they neither wait nor time out.
        on_activity: called with the number of requests and websockets, those that wait included, when it
            changes; must be quick and not raise.
        on_unwell: called with `ANSWERED_503` or `CHECK_ASKED` when an answer or a request says that the
            runner may be in a bad state; must be quick and not raise.
    """

    def __init__(
        self,
        application: ASGIApp,
        *,
        request_timeout: Optional[float] = None,
        multiplexing: Optional[int] = None,
        on_activity: Callable[[int], None],
        on_unwell: Callable[[str], None],
    ) -> None:
        self._application = application
        self._request_timeout = request_timeout
        self._turns = Turns(_positive(multiplexing))
        self._on_activity, self._on_unwell = on_activity, on_unwell
        self._count = 0
        self._abandoned: set[asyncio.Task[None]] = set()  # or the loop would forget them half way

    def change(self, *, request_timeout: Optional[float], multiplexing: Optional[int]) -> None:
        """Set new limits; what is being answered keeps the old ones. Called on the event loop."""
        self._request_timeout = request_timeout
        self._turns.places = _positive(multiplexing)
        self._turns.admit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request or websocket on when its turn has come."""
        if scope["type"] not in {"http", "websocket"} or scope.get(IS_AGENT):
            await self._application(scope, receive, send)
            return
        if header_values(scope, CHECK_HEADER.encode()):
            self._on_unwell(CHECK_ASKED)
        with self._counted():
            if scope["path"].startswith(f"{FILES_PATH}/"):
                await self._application(scope, receive, send)
                return
            inbox = Inbox(receive)
            if not await self._turns.take(inbox):
                return  # nobody is left to be answered
            try:
                await self._answer(scope, inbox.receive, self._watched(send))
            finally:
                self._turns.leave()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._count += 1
        self._on_activity(self._count)
        try:
            yield
        finally:
            self._count -= 1
            self._on_activity(self._count)

    def _watched(self, send: Send) -> Send:
        async def watched(message: Message) -> None:
            if message["type"] in _BEGINNINGS:
                if message.get("status") == _UNAVAILABLE:
                    self._on_unwell(ANSWERED_503)
                if any(name.lower() == CHECK_HEADER.encode() for name, _ in message.get("headers", ())):
                    self._on_unwell(CHECK_ASKED)
            await send(message)

        return watched

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self._request_timeout
        if seconds is None or scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        outgoing = _Outgoing(send)
        task = asyncio.ensure_future(self._application(scope, receive, outgoing.send))
        try:
            await asyncio.wait({task}, timeout=seconds)
            if outgoing.is_whole:
                await asyncio.wait({task})  # the caller has the answer; background tasks have no limit
        finally:
            if not task.done():
                outgoing.is_cut = True
                self._abandon(task, f"{scope['method']} {scope['path']}")
        if task.done():
            task.result()
            return
        detail = f"Request timed out after {seconds:g} s"
        sys.stderr.write(f"{scope['method']} {scope['path']}: {detail}\n")
        if outgoing.has_begun:
            # Only a broken connection tells the caller that the answer is not whole.
            raise _AnswerCutError(f"the answer to {scope['path']} was cut off after {seconds:g} s")
        await refuse_any_origin(scope, receive, send, status=504, detail=detail)

    def _abandon(self, task: asyncio.Task[None], what: str) -> None:
        def over(_: asyncio.Task[None]) -> None:
            self._abandoned.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None:
                report(error, f"{what}, which had timed out,")

        self._abandoned.add(task)
        task.add_done_callback(over)
        task.cancel()


class _Outgoing:
    """An answer on its way, which can be cut off."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = self.is_whole = self.is_cut = False

    async def send(self, message: Message) -> None:
        if self.is_cut:
            raise OSError("the request timed out")  # as a connection that is gone
        self.has_begun = True
        await self._send(message)
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)


class _AnswerCutError(Exception):
    """The time for an answer was over when part of it had been sent."""


def _positive(multiplexing: Optional[int]) -> Optional[int]:
    if multiplexing is not None and multiplexing < 1:
        raise ValueError(f"an app must be allowed one request at a time at least, not {multiplexing}")
    return multiplexing
