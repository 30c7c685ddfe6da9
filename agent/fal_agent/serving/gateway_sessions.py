"""One websocket session through the gateway: opened at a runner, then passed on in both directions.

Runs in the gateway process. Always true: one message at a time is on its way in each direction, so whoever
reads slowly slows the other side down; and both sides learn with which code and reason the other closed.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, Optional, cast

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import Message, Receive, Send

    from fal_agent.serving.balancing import RunnerAddress
    from fal_agent.serving.gateway_headers import RawHeaders

__all__ = ["LOOPBACK", "Incoming", "headers_of", "knock", "open_session", "relay"]

LOOPBACK = "127.0.0.1"

_LARGEST = 64 << 20  # bytes of one message of a runner; a larger one ends the session with 1009
_FRAMES = 4  # of a runner's that may lie here before it has to wait
_CLOSE_TIMEOUT = 5.0  # seconds for a runner to answer that the session is closed
_NORMAL, _NO_STATUS, _ABNORMAL, _INTERNAL = 1000, 1005, 1006, 1011
_HOST = re.compile(r"[A-Za-z0-9._~-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_OF_THE_HANDSHAKE = "sec-websocket-"


class Incoming:
    """What a client sends; one can look whether it has left without taking anything away.

    Attributes:
        is_open: whether the session was accepted.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._next: Optional[asyncio.Future[Message]] = None
        self.is_open = False

    @property
    def next(self) -> asyncio.Future[Message]:
        """The next message, which is not taken."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
        return self._next

    async def take(self) -> Message:
        """Wait for the next message."""
        message = await self.next
        if message["type"] != "websocket.disconnect":
            self._next = None
        return message

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._next is not None:
            self._next.cancel()


class _Connect(connect):
    """Opens a connection to a runner; its answers are passed on, a redirection too."""

    def process_redirect(self, exc: Exception) -> Exception:
        """Follow no redirection."""
        return exc


async def open_session(
    runner: RunnerAddress, target: str, host: str, subprotocols: list[str], headers: RawHeaders
) -> ClientConnection:
    """Open a session at a runner; the handshake takes as long as the runner needs.

    Args:
        runner: where.
        target: path and query of the session.
        host: what the client called the server.
        subprotocols: those that the client offers.
        headers: those of the client's request that pass.

    Raises:
        OSError: there was no connection, or it broke.
        websockets.exceptions.InvalidHandshake: the runner answered something else.
    """
    opening: Any = _Connect(
        f"ws://{host if _HOST.fullmatch(host) else 'localhost'}{target}",
        **({"unix": True, "path": runner.path} if runner.port is None else _at(runner.port)),
        subprotocols=[Subprotocol(name) for name in subprotocols] or None,
        additional_headers=[
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name != b"host" and not name.startswith(_OF_THE_HANDSHAKE.encode())
        ],
        user_agent_header=None,
        compression=None,  # on the same machine it costs more than it saves
        open_timeout=None,
        ping_interval=None,  # a Unix socket tells when the other side is gone
        close_timeout=_CLOSE_TIMEOUT,
        max_size=_LARGEST,
        max_queue=_FRAMES,
    )
    return cast("ClientConnection", await opening)


async def knock(runner: RunnerAddress) -> None:
    """Connect to a runner, and say nothing.

    Raises:
        OSError: nobody listens there.
    """
    if runner.port is None:
        _, writer = await asyncio.open_unix_connection(runner.path)
    else:
        _, writer = await asyncio.open_connection(LOOPBACK, runner.port)
    writer.close()


def _at(port: int) -> dict[str, Any]:
    return {"host": LOOPBACK, "port": port, "proxy": None}


def headers_of(items: Iterable[tuple[str, str]]) -> RawHeaders:
    """Give a runner's headers as ASGI has them, without those of the handshake."""
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1", "surrogateescape"))
        for name, value in items
        if not name.lower().startswith(_OF_THE_HANDSHAKE)
    ]


async def relay(incoming: Incoming, send: Send, session: ClientConnection) -> bool:
    """Pass messages on until one side closes, then close the other likewise.

    Returns:
        Whether the runner's connection broke; the client was told 1011 then.
    """
    to_runner = asyncio.ensure_future(_to_runner(incoming, session))
    to_client = asyncio.ensure_future(_to_client(session, send))
    try:
        await asyncio.wait({to_runner, to_client}, return_when=asyncio.FIRST_COMPLETED)
        if to_runner.done() and to_runner.result() is None:
            await asyncio.wait({to_client})  # the runner has closed; what it sent before is passed on
        elif to_client.done() and not to_client.result():
            await asyncio.wait({to_runner})  # the client is gone; how, is told next
        if to_runner.done() and (farewell := to_runner.result()) is not None:
            await _leave(session, farewell.get("code", _NO_STATUS), farewell.get("reason") or "")
            return False
        return await _dismiss(send, session) if to_client.result() else False
    finally:
        to_runner.cancel()
        to_client.cancel()
        await asyncio.gather(to_runner, to_client, return_exceptions=True)
        session.transport.abort()


async def _to_runner(incoming: Incoming, session: ClientConnection) -> Optional[Message]:
    """Pass on what the client sends; give its last message, None if the runner closed first."""
    try:
        while (message := await incoming.take())["type"] == "websocket.receive":
            data = message.get("bytes")
            await session.send(message["text"] if data is None else data)
    except ConnectionClosed:
        return None
    return message


async def _to_client(session: ClientConnection, send: Send) -> bool:
    """Pass on what the runner sends until it closes; False if the client was gone first."""
    while True:
        try:
            data = await session.recv()
        except ConnectionClosed:
            return True
        try:
            if isinstance(data, str):
                await send({"type": "websocket.send", "text": data})
            else:
                await send({"type": "websocket.send", "bytes": data})
        except OSError:  # what servers raise for it
            return False


async def _leave(session: ClientConnection, code: int, reason: str) -> None:
    if code == _ABNORMAL:
        session.transport.abort()
    elif code == _NO_STATUS:
        await session.close(cast("int", None))  # a closing frame that states no code
    else:
        await session.close(code, reason)


async def _dismiss(send: Send, session: ClientConnection) -> bool:
    code, reason = session.protocol.close_code or _ABNORMAL, session.protocol.close_reason or ""
    is_broken = code == _ABNORMAL
    if is_broken:
        code, reason = _INTERNAL, "the connection to the app's runner broke; connect again"
    elif code == _NO_STATUS:
        code = _NORMAL
    try:
        await send({"type": "websocket.close", "code": code, "reason": reason})
    except OSError:
        return is_broken  # the client is gone too
    return is_broken
