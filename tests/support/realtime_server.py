"""A real server of one app's realtime endpoints, and a raw client of it."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from fal_agent.serving.realtime import SERVER_OPTIONS, serve_realtime
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Message

__all__ = [
    "END",
    "TIMEOUT",
    "RealtimeServer",
    "drain",
    "failure",
    "pack",
    "raw",
    "send_late",
    "serving",
    "unpack",
]

END = {"type": "x-fal-end"}
TIMEOUT = {"type": "x-fal-error", "error": "TIMEOUT", "reason": "no inputs, reconnect when needed!"}


class RealtimeServer:
    """Where an app is served, and what has happened there.

    Attributes:
        url: `ws://127.0.0.1:PORT`.
        open: connections whose `serve_realtime` has not returned.
        finished: those whose has.
        received: messages that were read from all connections.
    """

    def __init__(self, url: str) -> None:
        self.url, self.open, self.finished, self.received = url, 0, 0, 0

    async def serve(self, app: Any, method: Any, websocket: WebSocket) -> None:
        """Serve one connection."""
        counted = _Counted(websocket.scope, websocket.receive, websocket.send)
        counted.server = self
        self.open += 1
        try:
            await serve_realtime(app, method.route_signature, partial(method.original_func, app), counted)
        finally:
            self.open -= 1
            self.finished += 1


class _Counted(WebSocket):
    server: RealtimeServer

    async def receive(self) -> Message:
        message = await super().receive()
        self.server.received += message["type"] == "websocket.receive"
        return message


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[RealtimeServer]:
    """Serve the methods of `app` that `fal.realtime` marked."""
    listener = socket.create_server(("127.0.0.1", 0))
    served = RealtimeServer(f"ws://127.0.0.1:{listener.getsockname()[1]}")
    routes = [
        WebSocketRoute(method.route_signature.path, partial(_endpoint, served, app, method))
        for method in vars(type(app)).values()
        if hasattr(method, "route_signature")
    ]
    options = {**SERVER_OPTIONS, "log_level": "warning", "timeout_graceful_shutdown": 5, **options}
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), lifespan="off", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield served
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


async def _endpoint(served: RealtimeServer, app: Any, method: Any, websocket: WebSocket) -> None:
    await served.serve(app, method, websocket)


def raw(served: RealtimeServer, path: str = "/", **options: Any) -> ClientConnection:
    """Connect by the `websockets` library alone."""
    options = {"compression": None, "proxy": None, "max_size": None, "ping_interval": None, **options}
    return connect(served.url + path, close_timeout=1, **options)


def pack(message: Any) -> bytes:
    """Write a message as clients do."""
    return msgpack.packb(message, use_bin_type=True)


def unpack(frame: Any) -> Any:
    """Open a message as clients do; it must be a binary frame."""
    assert isinstance(frame, bytes), frame
    return msgpack.unpackb(frame, raw=False)


def send_late(client: ClientConnection, *frames: Any) -> None:
    """Send frames to an endpoint that may have ended the session meanwhile."""
    with suppress(ConnectionClosed):
        for frame in frames:
            client.send(frame)


def drain(client: ClientConnection) -> tuple[list[Any], Any, int | None]:
    """Read a connection to its end: the messages, the last control message, and the code of the close."""
    messages: list[Any] = []
    told = None
    while True:
        try:
            frame = client.recv(timeout=20)
        except ConnectionClosed as closed:
            return messages, told, closed.rcvd.code if closed.rcvd else None
        assert told is None, "nothing comes after a control message"
        if isinstance(frame, str):
            told = json.loads(frame)
        else:
            messages.append(unpack(frame))


def failure(reason: str) -> dict[str, str]:
    """Give the control message of a session that failed."""
    return {"type": "x-fal-error", "error": "INTERNAL_ERROR", "reason": reason}
