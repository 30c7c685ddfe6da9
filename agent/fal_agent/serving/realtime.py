"""Serve one connection of a realtime endpoint, from its acceptance to its close.

Runs in the worker that serves an app, on its event loop. Two tasks share a connection: one reads inputs
into an inbox, the other runs the handler and sends what it gives, in order. Whatever fails ends this
connection alone. When `serve_realtime` returns, nothing of the connection is running any more.

A client that leaves is noticed by the reader at once, unless so many inputs wait that it reads no more;
then by the next outputs, or when the handler has taken enough of them.

How the ends differ: a handler or an input that fails, and a session without inputs, end with an
`x-fal-error`; a stream that is complete ends with `x-fal-end` (see `realtime_codec`). Each is followed by
a close with code 1000.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from fal_agent.serving import realtime_codec as control
from fal_agent.serving.failures import report
from fal_agent.serving.realtime_calls import call, outputs
from fal_agent.serving.realtime_codec import Codec
from fal_agent.serving.realtime_inbox import MAX_WAITING_BYTES, Inbox, Input, InputsOver

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.runtime.routes import RouteSignature

__all__ = ["SERVER_OPTIONS", "serve_realtime"]

# What uvicorn should be given. While inputs pile up, a connection is not read, so answers to pings are
# not seen either: a deadline for them would cut off a client whose only fault is a slow handler.
SERVER_OPTIONS: dict[str, Any] = {
    "ws_max_size": MAX_WAITING_BYTES,  # bytes of one message; a larger one closes its connection (1009)
    "ws_ping_timeout": None,
    "ws_per_message_deflate": False,  # messages are mostly compressed already, and the link is short
}

_GONE = (WebSocketDisconnect, OSError)  # what sending to a client that has left raises


async def serve_realtime(
    app: Any, route: RouteSignature, function: Callable[..., Any], websocket: WebSocket
) -> None:
    """Accept a connection and serve it until the client leaves or the session is over.

    Errors of the handler and of the inputs go to standard error, with their traceback, and to the client.

    Args:
        app: whose endpoint it is; for messages.
        route: the endpoint's mode, codecs and limits.
        function: the handler, bound to the app.
        websocket: not accepted yet.
    """
    try:
        await websocket.accept()
    except _GONE:
        return
    await _Session(app, route, function, websocket).run()


class _ClientLeft(Exception):  # noqa: N818 - it ends a session, as an event does
    """The client is gone, so an output could not be sent."""


class _Inputs:
    """The asynchronous iterator that a handler gets when its client sends a stream."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    def __aiter__(self) -> _Inputs:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._session.next_input()
        except InputsOver:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Take no more inputs."""
        self._session.take_no_more()


class _Session:
    """One connection."""

    def __init__(
        self, app: Any, route: RouteSignature, function: Callable[..., Any], websocket: WebSocket
    ) -> None:
        self._name = f"{route.path} of {type(app).__name__}"
        self._route, self._function, self._websocket = route, function, websocket
        self._codec, self._inbox = Codec(route), Inbox(route.buffering)
        self._is_cancelled = False  # by us: the client left, or the server stops
        self._is_closing = False

    async def run(self) -> None:
        """Serve until either side ends it; cancels the handler when the client leaves."""
        reader, worker = asyncio.ensure_future(self._read()), asyncio.ensure_future(self._work())
        try:
            await asyncio.wait({reader, worker}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not self._is_closing:
                self._is_cancelled = True
                worker.cancel()
            await asyncio.wait({worker})
            reader.cancel()
            await asyncio.wait({reader})
        for task in (worker, reader):
            if not task.cancelled():
                task.result()

    # ------------------------------------------------------------ the reader

    async def _read(self) -> None:
        """Fill the inbox until the client leaves."""
        while True:
            await self._inbox.room()
            limit = None if self._inbox.is_closed else self._route.session_timeout
            try:
                message = await asyncio.wait_for(self._websocket.receive(), limit)
            except asyncio.TimeoutError:
                self._inbox.close(InputsOver(timed_out=True))
                continue
            if message["type"] == "websocket.disconnect":
                return
            text, frame = message.get("text") or "", message.get("bytes")
            if frame is not None:
                self._inbox.put(bytes(frame))
            elif control.is_end(text):
                self._inbox.close(InputsOver(timed_out=False))
            else:
                self._inbox.close(TypeError("a text frame is no input: send inputs as binary frames"))

    # ------------------------------------------------------------ the handler

    async def _work(self) -> None:
        """Run the handler to its end, and say how it ended."""
        modes = {
            "unary": self._unary,
            "server_streaming": self._server_streaming,
            "client_streaming": self._client_streaming,
            "bidi": self._bidi,
        }
        try:
            await modes[self._route.realtime_mode or "unary"]()
        except _ClientLeft:
            return
        except InputsOver as over:
            ending = control.TIMEOUT if over.timed_out else control.END
        except asyncio.CancelledError as error:
            if self._is_cancelled:
                raise
            ending = self._failure(error)  # the handler awaited something that was cancelled
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it ends this connection, and no other
            ending = self._failure(error)
        else:
            ending = control.END
        await self._finish(ending)

    async def _unary(self) -> None:
        while True:
            batch = await self._next_batch()
            await self._send(await call(self._function, *batch))

    async def _server_streaming(self) -> None:
        first = await self.next_input()
        self.take_no_more()
        await self._send_all(first)

    async def _client_streaming(self) -> None:
        await self._send(await call(self._answer, _Inputs(self)))

    async def _answer(self, inputs: _Inputs) -> Any:
        answer = self._function(inputs)
        if not hasattr(answer, "__await__"):
            raise TypeError("a handler that takes a stream of inputs must be an `async def`")
        return await answer

    async def _bidi(self) -> None:
        await self._send_all(_Inputs(self))

    async def _send_all(self, argument: Any) -> None:
        """Send each item of a streaming handler; it makes the next one when the client has room."""
        items = outputs(self._function, argument)
        try:
            async for item in items:
                await self._send(item)
        finally:
            await items.aclose()

    # ------------------------------------------------------------ inputs

    async def next_input(self) -> Any:
        """Give the next input.

        Raises:
            InputsOver: there is none, and none will come.
        """
        item = await self._inbox.take()
        try:
            return await self._opened(item)
        except asyncio.CancelledError:  # the handler gave up waiting, and may ask again
            self._inbox.put_back(item)
            raise

    def take_no_more(self) -> None:
        """Drop what waits and whatever the client still sends."""
        self._inbox.close(InputsOver(timed_out=False))
        self._inbox.clear()

    async def _opened(self, item: Input) -> Any:
        if not item.is_open:
            item.value = await self._codec.open(item.frame)
            item.is_open = True
        return item.value

    async def _next_batch(self) -> list[Any]:
        """Give the next input, and those waiting after it that go along in the same call."""
        first = await self.next_input()
        batch = [first]
        goes_along = getattr(first, "can_batch", None)
        while len(batch) < self._route.max_batch_size:
            item = self._inbox.take_waiting()
            if item is None:
                break
            try:
                further = await self._opened(item)
            except Exception:  # noqa: BLE001 - raised again when its turn comes; those before it are answered
                self._inbox.put_back(item)
                break
            if goes_along is not None and not goes_along(further, len(batch)):
                self._inbox.put_back(item)
                break
            batch.append(further)
        return batch

    # ------------------------------------------------------------ outputs

    async def _send(self, output: Any) -> None:
        frame = await self._codec.write(output)
        try:
            await self._websocket.send_bytes(frame)
        except _GONE as error:
            raise _ClientLeft from error

    async def _finish(self, ending: str) -> None:
        if self._is_cancelled:
            return
        self._is_closing = True
        self.take_no_more()  # a client that is busy sending reads this only when its sending goes on
        try:
            await self._websocket.send_text(ending)
            await self._websocket.close(code=1000)
        except _GONE:
            return  # it has left, so nobody is there to be told

    def _failure(self, error: BaseException) -> str:
        """Log an error; gives the control message that tells the client."""
        report(error, f"realtime endpoint {self._name}")
        try:
            reason = str(error) or type(error).__name__
        except Exception:  # noqa: BLE001 - a user's __str__ may do anything
            reason = type(error).__name__
        return control.error_frame("INTERNAL_ERROR", reason)
