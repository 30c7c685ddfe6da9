"""Serve a gateway with uvicorn on a Unix socket.

Runs in the gateway process. Always true: it accepts requests until it is told to stop, and then ends when
those in flight are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import uvicorn

from fal_agent.serving.speedups import http_protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp

    from fal_agent.serving.gateway import Gateway

__all__ = ["serve_gateway"]

_MESSAGES = 4  # of a client's that may lie here before it has to wait
_KEEP_ALIVE = 300  # seconds that a client's connection without requests stays open


async def serve_gateway(
    gateway: Gateway,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    application: Optional[ASGIApp] = None,
    drain_seconds: Optional[int] = None,
) -> None:
    """Serve until told to stop, and then until nothing is in flight or in line any more.

    Websocket sessions are closed with 1012 when it stops. If this is cancelled, nothing is waited for.

    Args:
        gateway: what to serve; it is closed at the end.
        listener: a bound socket; it is closed at the end, and its file removed.
        stop: set to end serving.
        application: the gateway with other layers around it, if there are any.
        drain_seconds: requests are cancelled after so long; None: they are waited for.
    """
    file = _file_of(listener)
    config = uvicorn.Config(
        gateway if application is None else application,
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,  # the runners' passes
        proxy_headers=False,
        http=http_protocol(),
        ws_max_queue=_MESSAGES,
        ws_per_message_deflate=False,  # a few bytes could become more than may lie here
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=drain_seconds,
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await asyncio.shield(serving)
    finally:
        stopping.cancel()
        server.should_exit = server.force_exit = True
        for task in list(server.server_state.tasks):
            task.cancel()
        await asyncio.gather(serving, *server.server_state.tasks, return_exceptions=True)
        await gateway.aclose()
        listener.close()
        if file is not None:
            _remove(*file)


class _Server(uvicorn.Server):
    """uvicorn's server; signals are the process's own matter."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def _file_of(listener: socket.socket) -> Optional[tuple[Path, int]]:
    name = listener.getsockname() if listener.family == socket.AF_UNIX else ""
    return (Path(name), Path(name).stat().st_ino) if isinstance(name, str) and name else None


def _remove(path: Path, inode: int) -> None:
    """Remove a socket's file, unless another one has taken its place."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()
