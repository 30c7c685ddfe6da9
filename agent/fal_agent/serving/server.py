"""Run an app under uvicorn: on a Unix socket or a port, in the main thread or in another one.

Runs in the process that serves an app. The order is always: the address is bound, `setup`, requests,
`handle_exit`, the requests in flight are answered, `teardown`. Nobody can connect before `setup` is done;
if it fails, nobody ever can, and its error is raised. An app that is put in another one's place goes through
the same, and no request is lost over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import uvicorn

from fal_agent.errors import FalServerlessError
from fal_agent.serving import speedups
from fal_agent.serving.metrics import metrics_application
from fal_agent.serving.realtime import SERVER_OPTIONS
from fal_agent.serving.tenancy import Tenancy

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import AsyncIterator, Callable, Iterator
    from types import FrameType

    from starlette.types import ASGIApp

    from fal_agent.runtime.app import BaseServable

__all__ = ["AppServer", "bind_port", "bind_socket", "quiet_config"]

LOOPBACK = "127.0.0.1"
KEEP_ALIVE = 300  # seconds that a connection without requests stays open
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _identity(application: ASGIApp) -> ASGIApp:
    return application


class AppServer:
    """Serves one app once.

    Args:
        app: the app; it is not set up yet.
        listener: a bound socket, from `bind_socket` or `bind_port`; it is closed at the end.
        on_ready: called in the serving thread once requests are accepted.
        drain_seconds: requests in flight are cancelled after so long; None: they are waited for.
        metrics_listener: a bound socket that `/metrics` is served on; None: it is not served.
        wrap: puts layers around the application; they stay when the app is swapped.

    Attributes:
        is_ready: whether requests were accepted at some time.

    Raises:
        ValueError: the app has no routes, or one that cannot be served.
    """

    def __init__(
        self,
        app: BaseServable,
        listener: socket.socket,
        *,
        on_ready: Optional[Callable[[], None]] = None,
        drain_seconds: Optional[float] = None,
        metrics_listener: Optional[socket.socket] = None,
        wrap: Callable[[ASGIApp], ASGIApp] = _identity,
    ) -> None:
        self.is_ready = False
        self._metrics_listener = metrics_listener
        self._listener, self._on_ready = listener, on_ready
        name = listener.getsockname() if listener.family == socket.AF_UNIX else ""
        self._path = Path(name) if isinstance(name, str) and name else None
        self._tenancy = Tenancy(app, drain_seconds)
        config = quiet_config(wrap(self._tenancy.application))
        config.timeout_keep_alive = KEEP_ALIVE
        config.timeout_graceful_shutdown = drain_seconds  # type: ignore[assignment] # seconds; whole or not
        self._uvicorn = _Uvicorn(config, self._became_ready)
        self._signals: list[int] = []

    def run(self) -> None:
        """Serve until `stop()` is called or, on the main thread, until SIGTERM or SIGINT arrives.

        On the main thread a signal takes its usual effect in the end: SIGTERM ends the process
        (status -15), and SIGINT raises KeyboardInterrupt.

        Raises:
            BaseException: what `setup` or `teardown` raised.
            KeyboardInterrupt: after SIGINT.
        """
        try:
            with self._catching_signals():
                speedups.run(self._serve())
        finally:
            self._close_listeners()
        for number in self._signals[:1]:
            signal.raise_signal(number)

    def stop(self) -> None:
        """End serving, from any thread: as SIGTERM does, first telling the app. Returns at once."""
        if self.is_ready:
            self._tenancy.tell()
        self._uvicorn.should_exit = True

    def swap(
        self, app: BaseServable, *, on_current: Callable[[], None] = lambda: None
    ) -> concurrent.futures.Future[None]:
        """Put another app in the place of the one that is served, from any thread. Returns at once.

        The new app is set up while the old one answers, in a thread if its `setup` is not `async`. Then it
        gets all new requests; the old one has its `handle_exit` called, answers what it had begun (cancelled
        after `drain_seconds`; so are websockets), and is torn down.

        Args:
            app: the new one; it is not set up yet.
            on_current: called on the event loop at the moment when new requests begin to go to it.

        Returns:
            A future that is done when the old app is torn down. Its error is what the new app's making or
            `setup` raised, and the old one stays; or what the old one's `teardown` raised, and the new one
            serves; or a FalServerlessError, if nothing is being served or serving ends before.
        """
        return self._tenancy.swap(app, on_current)

    def hurry(self) -> None:
        """Do not wait for the requests in flight any longer; from any thread."""
        self._uvicorn.force_exit = True

    async def _serve(self) -> None:
        async with self._tenancy.lasting(lambda: self._uvicorn.force_exit), self._metrics():
            await self._uvicorn.serve(sockets=[self._listener])

    @contextlib.asynccontextmanager
    async def _metrics(self) -> AsyncIterator[None]:
        if self._metrics_listener is None:
            yield
            return
        server = _Uvicorn(quiet_config(metrics_application(self._tenancy.metrics)), lambda: None)
        task = asyncio.create_task(server.serve(sockets=[self._metrics_listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await task

    def _became_ready(self) -> None:
        self.is_ready = True
        self._tenancy.open()
        if self._on_ready is not None:
            self._on_ready()

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, _frame: Optional[FrameType]) -> None:
        if not self.is_ready:  # in `setup`, which nobody may wait for
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        if self._signals and number == signal.SIGINT:
            self.hurry()
        self._signals.append(number)
        self.stop()

    def _close_listeners(self) -> None:
        for listener in (self._listener, self._metrics_listener):
            if listener is not None:
                listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class _Uvicorn(uvicorn.Server):
    """uvicorn's server without its own signals, which would end the process before `teardown`."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `AppServer`."""
        yield

    async def startup(self, sockets: Optional[list[socket.socket]] = None) -> None:
        """Accept connections, and say so."""
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()


def quiet_config(application: Any) -> uvicorn.Config:
    """Give uvicorn's settings for an application whose log is the app's own."""
    return uvicorn.Config(
        application,
        lifespan="off",  # run by `AppServer`, so that what it raises is not lost
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        http=speedups.http_protocol(),
        **SERVER_OPTIONS,
    )


def bind_socket(path: str) -> socket.socket:
    """Bind a Unix socket that only this user can reach; one that was left behind is replaced.

    Raises:
        FalServerlessError: the path is too long, or its folder cannot be written.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket():
            Path(path).unlink()
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
    except OSError as error:
        listener.close()
        raise FalServerlessError(f"cannot listen at {path}: {error}") from error
    return listener


def bind_port(port: int, host: str = LOOPBACK) -> socket.socket:
    """Bind a TCP port; 0 takes a free one.

    Raises:
        FalServerlessError: the port is in use, or this user may not have it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY on sockets that name their protocol alone; without it each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise FalServerlessError(
            f"cannot listen on port {port} of {host}: {getattr(error, 'strerror', None) or error}. "
            "Choose another port, or 0 for a free one."
        ) from error
    return listener
