"""The gateway of an app with several runners: one door, behind it whichever runner has room.

Runs in the gateway process, on one loop. Always true: a runner has at most as many requests as the app
allows; every request is answered by a runner, or with a status and `{"detail": ...}` that say why not; and
bodies stream both ways, as fast as the slower side goes.

A request is passed on before its answer is: an app that answers while it still reads must not answer more
than sockets hold, as with any client that does one after the other.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import anyio
import httpx
from starlette.middleware.cors import CORSMiddleware
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
)

from fal_agent.errors import AppException
from fal_agent.serving.balancing import Load, RunnerAddress
from fal_agent.serving.gateway_answer import parts_of
from fal_agent.serving.gateway_body import Allowance, Body, Upload
from fal_agent.serving.gateway_call import Call, call_of, refuse, refuse_opening
from fal_agent.serving.gateway_headers import (
    CROSS_ORIGIN,
    HINTS_HEADER,
    RawHeaders,
    detail_answer,
    end_to_end,
    first,
    hints_in,
)
from fal_agent.serving.gateway_line import Line
from fal_agent.serving.gateway_server import serve_gateway
from fal_agent.serving.gateway_sessions import LOOPBACK, Incoming, headers_of, knock, open_session, relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from starlette.types import Receive, Scope, Send
    from websockets.asyncio.client import ClientConnection

    from fal_agent.serving.balancing import Ticket

__all__ = ["Gateway", "Load", "RunnerAddress", "serve_gateway"]

_IDLE = 60  # seconds that a connection to a runner is kept for the next request; runners keep theirs longer
_IDLE_PORT = 2  # the same for a server of the user's own, many of which close theirs after 5 s
_CONNECT_TIMEOUT = 10.0  # seconds
_CONDITIONS = frozenset(["timeout", "server_error", "connection_error"])
_BAD_REQUEST, _BAD_GATEWAY, _REPLACE, _TOO_LONG = 400, 502, 503, 504
_URL = httpx.URL("http://app/")


@dataclass(frozen=True)
class _Failure:
    """Why a try was in vain: a condition of `skip_retry_conditions`, and the answer if it was the last."""

    condition: str
    detail: str
    status: int


_BROKEN = _Failure("connection_error", "the connection to the app's runner broke", _BAD_GATEWAY)


class Gateway:
    """An ASGI application that passes requests and websockets on to runners; all on one loop.

    A request is tried again, up to twice, if there was no connection, if it broke before any of the answer
    was passed on (up to 64 KiB are when they are whole), or after a 503; and if its body is at most 1 MiB,
    which is kept, or not begun. A client that leaves is noticed at once; one that sends more than is kept,
    when its turn has come.

    Args:
        multiplexing: requests that one runner may have at a time; a websocket session counts as one.
        request_timeout: seconds that one request may take from when it has a runner, all tries together;
            then it is answered 504, or broken off if its answer has begun. For a websocket: until it is
            open. None: as long as it likes.
        skip_retry_conditions: in which cases a request is not tried again: "server_error" (a runner answered
            503) or "connection_error" (there was no connection, or it broke before the answer). "timeout" is
            accepted too; what took too long is never tried again.
        max_waiting: requests that may wait for a runner; one more is answered 503.
        queue_timeout: seconds that one may wait before it is answered 504; None: as long as its client does.
        on_load: called with the load after it changed, at most every 50 ms.
        on_sick: called once with the name of a runner that must be replaced, and why: it answered 503, or its
            connection broke. It gets nothing new as long as it is listed.

    Raises:
        ValueError: a condition is unknown, or a number too small.
    """

    def __init__(
        self,
        *,
        multiplexing: int = 1,
        request_timeout: Optional[float] = None,
        skip_retry_conditions: Sequence[str] = (),
        max_waiting: int = 10_000,
        queue_timeout: Optional[float] = None,
        on_load: Callable[[Load], None],
        on_sick: Callable[[str, str], None],
    ) -> None:
        unknown = set(skip_retry_conditions) - _CONDITIONS
        if unknown:
            raise ValueError(
                f"skip_retry_conditions has {', '.join(sorted(unknown))}; "
                f"known are {', '.join(sorted(_CONDITIONS))}"
            )
        self._line = Line(
            multiplexing=multiplexing,
            max_waiting=max_waiting,
            queue_timeout=queue_timeout,
            on_load=on_load,
            on_sick=on_sick,
        )
        self._multiplexing, self._request_timeout = multiplexing, request_timeout
        self._skipped = frozenset(skip_retry_conditions)
        self._allowance = Allowance()
        self._transports: dict[RunnerAddress, httpx.AsyncHTTPTransport] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; saves reading certificates
        cross_origin: dict[str, Any] = CROSS_ORIGIN
        self._application = CORSMiddleware(self._dispatch, **cross_origin)

    def set_runners(self, runners: Sequence[RunnerAddress]) -> None:
        """Say which runners are ready; the others finish what they have and get nothing new."""
        self._line.set_runners(runners)
        self._close_unused()

    async def aclose(self) -> None:
        """Close the connections to the runners; called when nothing is in flight any more."""
        self._line.close()
        transports, self._transports = list(self._transports.values()), {}
        for transport in transports:
            await transport.aclose()
        await asyncio.gather(*self._closing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or websocket; a browser's preflight is answered at once."""
        await self._application(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(call_of(scope), receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(call_of(scope), scope, receive, send)

    # ------------------------------------------------------------ runners

    async def _try(
        self, call: Call, ticket: Ticket, attempt: Callable[[RunnerAddress], Awaitable[Optional[_Failure]]]
    ) -> RunnerAddress:
        """Try until a runner has answered, and give that runner.

        Raises:
            AppException: none has; with the status to answer.
        """
        loop, left = asyncio.get_running_loop(), self._request_timeout
        while True:
            runner, began = ticket.holder, loop.time()
            with anyio.move_on_after(left) as limit:
                failure = await attempt(runner)
            if limit.cancelled_caught:
                raise AppException(f"the app did not answer within {self._request_timeout:g} s", _TOO_LONG)
            if failure is None:
                return runner
            if not self._may_repeat(call, failure.condition):
                raise AppException(failure.detail, failure.status)
            call.retries -= 1
            left = None if left is None else max(0.0, left - (loop.time() - began))
            await self._line.again(ticket)
            self._close_unused()

    def _may_repeat(self, call: Call, condition: str) -> bool:
        return condition not in self._skipped and call.can_repeat

    def _broke(self, runner: RunnerAddress, error: BaseException) -> _Failure:
        """Note that there was no connection to a runner, or that it ended before an answer."""
        reason = f"its connection broke: {str(error) or type(error).__name__}"
        self._line.suspect(runner, reason)
        return _BROKEN

    async def _broke_off(self, runner: RunnerAddress) -> None:
        """Note that a connection ended in the middle: a failing handler does that too, so look."""
        try:
            await asyncio.wait_for(knock(runner), _CONNECT_TIMEOUT)
        except (OSError, asyncio.TimeoutError) as error:
            self._broke(runner, error)

    def _read_answer(self, runner: RunnerAddress, status: int, headers: RawHeaders) -> None:
        """Note what the head of an answer tells about its runner."""
        hints = first(headers, HINTS_HEADER)
        if hints is not None:
            self._line.remember_hints(runner, hints_in(hints))
        if status == _REPLACE:
            self._line.suspect(runner, "it answered 503")

    def _transport(self, runner: RunnerAddress) -> httpx.AsyncHTTPTransport:
        """Give the connections to a runner: without cookies, redirections or proxies of a client's."""
        if runner not in self._transports:
            limits = httpx.Limits(
                max_connections=None,
                max_keepalive_connections=self._multiplexing,
                keepalive_expiry=_IDLE if runner.port is None else _IDLE_PORT,
            )
            self._transports[runner] = httpx.AsyncHTTPTransport(
                uds=runner.path if runner.port is None else None, limits=limits, verify=self._tls
            )
        return self._transports[runner]

    def _close_unused(self) -> None:
        for runner in [runner for runner in self._transports if runner not in self._line]:
            task = asyncio.get_running_loop().create_task(self._transports.pop(runner).aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # ------------------------------------------------------------ requests

    async def _http(self, call: Call, receive: Receive, send: Send) -> None:
        body = call.body = Body(receive, self._allowance)

        async def until_gone() -> None:
            await body.listen()
            group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(until_gone)
                await self._answer(call, body, send)
                group.cancel_scope.cancel()
        except asyncio.CancelledError:  # by the server, whose task this is and which waits no longer
            await refuse(call, send, AppException("the app is being stopped", _REPLACE))
        finally:
            body.discard()
            self._close_unused()

    async def _answer(self, call: Call, body: Body, send: Send) -> None:
        async def attempt(runner: RunnerAddress) -> Optional[_Failure]:
            return await self._exchange(call, body, send, runner)

        try:
            async with self._line.place(call.hint) as ticket:
                await self._try(call, ticket, attempt)
        except AppException as refusal:
            await refuse(call, send, refusal)

    async def _exchange(
        self, call: Call, body: Body, send: Send, runner: RunnerAddress
    ) -> Optional[_Failure]:
        """Pass a request on and its answer back.

        Raises:
            AppException: the request cannot be passed on.
        """
        request = httpx.Request(
            call.method,
            _URL if runner.port is None else _URL.copy_with(host=LOOPBACK, port=runner.port),
            headers=call.headers,
            stream=Upload(body),
            extensions={"target": call.target, "timeout": {"connect": _CONNECT_TIMEOUT}},
        )
        try:
            response = await self._transport(runner).handle_async_request(request)
        except httpx.LocalProtocolError as error:
            raise AppException(f"the request cannot be passed on: {error}", _BAD_REQUEST) from error
        except httpx.TransportError as error:
            return self._broke(runner, error)
        try:
            headers = end_to_end(response.headers.raw)
            self._read_answer(runner, response.status_code, headers)
            if response.status_code == _REPLACE and self._may_repeat(call, "server_error"):
                return _Failure("server_error", "the app's runner answered 503", _REPLACE)
            parts = await parts_of(response, headers)
            if parts is None:
                await self._broke_off(runner)
                return _BROKEN
            body.discard()
            call.has_begun = True
            start = {"type": "http.response.start", "status": response.status_code}
            await send({**start, "headers": call.labelled(headers)})
            if not await self._pass_on(parts, send):
                await self._broke_off(runner)
        finally:
            await response.aclose()
        return None

    async def _pass_on(self, parts: AsyncIterator[bytes], send: Send) -> bool:
        """Pass an answer's body on; False if it broke off."""
        while True:
            try:
                part = await parts.__anext__()
            except StopAsyncIteration:
                await send({"type": "http.response.body", "body": b""})
                return True
            except httpx.TransportError:
                return False
            await send({"type": "http.response.body", "body": part, "more_body": True})

    # ------------------------------------------------------------ websockets

    async def _websocket(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        incoming = Incoming(receive)
        session = asyncio.ensure_future(self._session(call, scope, incoming, send))
        try:
            waits: set[asyncio.Future[Any]] = {session, incoming.next}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not session.done() and not incoming.is_open:
                return  # the client left before it was let in
            await session
        finally:
            session.cancel()
            await asyncio.gather(session, return_exceptions=True)
            incoming.close()
            self._close_unused()

    async def _session(self, call: Call, scope: Scope, incoming: Incoming, send: Send) -> None:
        opened: list[ClientConnection] = []

        async def attempt(runner: RunnerAddress) -> Optional[_Failure]:
            return await self._open(call, scope["subprotocols"], runner, opened)

        try:
            async with self._line.place(call.hint) as ticket:
                runner = await self._try(call, ticket, attempt)
                response = opened[0].response
                headers = [] if response is None else end_to_end(headers_of(response.headers.raw_items()))
                accept = {"type": "websocket.accept", "subprotocol": opened[0].subprotocol}
                incoming.is_open = True
                try:
                    await send({**accept, "headers": call.labelled(headers)})
                    is_broken = await relay(incoming, send, opened[0])
                finally:
                    opened[0].transport.abort()
                if is_broken:
                    await self._broke_off(runner)
        except AppException as refusal:
            await refuse_opening(
                send, scope, refusal.status_code, *detail_answer(refusal.message, call.labelled([]))
            )
        except InvalidStatus as error:
            answer = error.response
            headers = call.labelled(end_to_end(headers_of(answer.headers.raw_items())))
            await refuse_opening(send, scope, answer.status_code, headers, bytes(answer.body or b""))

    async def _open(
        self, call: Call, subprotocols: list[str], runner: RunnerAddress, opened: list[ClientConnection]
    ) -> Optional[_Failure]:
        """Open a session at a runner and add it to a list.

        Raises:
            InvalidStatus: the runner refused it.
            AppException: it cannot be opened.
        """
        host = (first(call.headers, b"host") or b"").decode("latin-1")
        try:
            session = await open_session(
                runner, call.target.decode("latin-1"), host, subprotocols, call.headers
            )
        except InvalidStatus as error:
            status = error.response.status_code
            self._read_answer(runner, status, headers_of(error.response.headers.raw_items()))
            if status == _REPLACE and self._may_repeat(call, "server_error"):
                return _Failure("server_error", "the app's runner answered 503", _REPLACE)
            raise
        except (OSError, EOFError, InvalidMessage, ConnectionClosed) as error:
            return self._broke(runner, error)
        except InvalidURI as error:
            raise AppException(f"the request cannot be passed on: {error}", _BAD_REQUEST) from error
        except InvalidHandshake as error:
            raise AppException(f"the app does not open a websocket: {error}", _BAD_GATEWAY) from error
        opened.append(session)
        return None
