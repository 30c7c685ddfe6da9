"""A web application on a Unix socket, served by uvicorn in a thread of this process."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from fal_agent.serving.server import bind_socket, quiet_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.requests import Request
    from starlette.websockets import WebSocket

PIECE = bytes(range(256)) * 4096  # 1 MiB


class Backend:
    """A web application on a Unix socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.abandoned = threading.Event()  # a request's client went away
        self.is_hanging = threading.Event()
        self.refusals = 0  # answers of 503 that are to come
        application = Starlette(
            routes=[
                Route("/hello", self.hello),
                Route("/digest", self.digest, methods=["POST"]),
                Route("/bytes/{count:int}", self.give),
                Route("/refuse", self.refuse, methods=["POST"]),
                Route("/recover", self.recover),
                Route("/hang", self.hang),
                WebSocketRoute("/echo", self.echo),
            ]
        )
        ready = threading.Event()

        class Server(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                ready.set()

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        self.server = Server(quiet_config(application))
        self.thread = threading.Thread(target=self.server.run, args=([bind_socket(path)],))
        self.thread.start()
        assert ready.wait(30)

    def dial(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(self.path)
        return stream

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(30)

    async def hello(self, request: Request) -> Response:
        return JSONResponse({"hello": "you"})

    async def digest(self, request: Request) -> Response:
        digest, size = hashlib.sha256(), 0
        async for piece in request.stream():
            digest.update(piece)
            size += len(piece)
        return JSONResponse({"sha256": digest.hexdigest(), "size": size})

    async def give(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(request.path_params["count"]):
                yield PIECE

        return StreamingResponse(pieces())

    async def refuse(self, request: Request) -> Response:
        return JSONResponse({"detail": "too large"}, 413, headers={"Connection": "close"})

    async def recover(self, request: Request) -> Response:
        self.refusals -= 1
        return JSONResponse({"left": self.refusals}, 503 if self.refusals >= 0 else 200)

    async def hang(self, request: Request) -> Response:
        self.is_hanging.set()
        assert (await request.receive())["type"] == "http.request"
        assert (await request.receive())["type"] == "http.disconnect"
        self.abandoned.set()
        return Response()

    async def echo(self, connection: WebSocket) -> None:
        await connection.accept()
        async for text in connection.iter_text():
            await connection.send_text(text)
