"""A real server of one app's realtime endpoints, on a port of its own."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from support.waiting import until

from fal_agent.serving.realtime import SERVER_OPTIONS, serve_realtime

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RealtimeServer", "serving"]


class RealtimeServer:
    """Where the app is served, and how many of its connections are being served.

    Attributes:
        url: `ws://127.0.0.1:PORT`.
        open: connections whose `serve_realtime` has not returned.
        finished: those whose has.
    """

    def __init__(self, url: str) -> None:
        self.url, self.open, self.finished = url, 0, 0

    async def serve(self, app: Any, method: Any, websocket: WebSocket) -> None:
        """Serve one connection."""
        self.open += 1
        try:
            await serve_realtime(
                app, method.route_signature, partial(method.original_func, app), websocket
            )
        finally:
            self.open -= 1
            self.finished += 1


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[RealtimeServer]:
    """Serve the methods of `app` that `fal.realtime` marked."""
    listener = socket.create_server(("127.0.0.1", 0))
    served = RealtimeServer(f"ws://127.0.0.1:{listener.getsockname()[1]}")
    methods = [item for item in vars(type(app)).values() if hasattr(item, "route_signature")]
    routes = [
        WebSocketRoute(method.route_signature.path, partial(_endpoint, served, app, method)) for method in methods
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
