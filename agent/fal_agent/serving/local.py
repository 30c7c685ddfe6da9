"""`App.run_local()`: serve an app in this process until it is interrupted.

Runs in whatever process calls it; in a notebook's kernel, whose thread has an event loop already, the app
is served in a thread of its own while the cell waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Optional

from fal_agent.errors import FalServerlessError
from fal_agent.serving.served import ServedFunction
from fal_agent.serving.server import AppServer, bind_port

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from fal_agent.runtime.app import BaseServable

__all__ = ["run_local"]

DEFAULT_PORT = 8080
DEFAULT_METRICS_PORT = 9090


def run_local(app: BaseServable, *, port: Optional[int] = None, metrics_port: Optional[int] = None) -> None:
    """Serve an app on the loopback address; returns after an interrupt, when it is torn down.

    Args:
        app: the app; it is not set up yet.
        port: where; None: 8080; 0: a free one.
        metrics_port: where `/metrics` is; None: 9090, and nowhere if that is in use; 0: a free one.

    Raises:
        FalServerlessError: a port is in use.
        ValueError: the app cannot be served.
        BaseException: what `setup` or `teardown` raised.
        KeyboardInterrupt: there was an interrupt before the app was ready.
    """
    listener = bind_port(DEFAULT_PORT if port is None else port)
    metrics_listener = None
    try:
        metrics_listener = _bind_metrics(metrics_port)
        server = AppServer(
            app,
            listener,
            metrics_listener=metrics_listener,
            on_ready=lambda: _say(app, url),
        )
    except BaseException:
        for opened in (listener, metrics_listener):
            if opened is not None:
                opened.close()
        raise
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if _is_loop_running():
        _run_in_thread(server)
        return
    try:
        server.run()
    except KeyboardInterrupt:
        if not server.is_ready:
            raise


def _bind_metrics(port: Optional[int]) -> Optional[socket.socket]:
    if port is not None:
        return bind_port(port)
    try:
        return bind_port(DEFAULT_METRICS_PORT)
    except FalServerlessError:
        return None  # nobody asked for them; the app itself can be served


def _say(app: BaseServable, url: str) -> None:
    name = app.app_name if isinstance(app, ServedFunction) else type(app).__name__
    print(f"{name} is served at {url} (documentation: {url}/docs); interrupt to stop", flush=True)  # noqa: T201 - for the person at the keyboard


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_in_thread(server: AppServer) -> None:
    """Serve in another thread and wait for it; an interrupt stops the server, a second one hurries it."""
    failures: list[BaseException] = []
    ended = threading.Event()

    def serve() -> None:
        try:
            server.run()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            failures.append(error)
        finally:
            ended.set()

    # A daemon, since `setup` in another thread cannot be interrupted, and must not hold up the kernel's end.
    thread = threading.Thread(target=serve, name="fal-run-local", daemon=True)
    thread.start()
    was_interrupted = False
    with _interruptible():
        while not _is_over(ended):
            if was_interrupted and not server.is_ready:
                raise KeyboardInterrupt
            server.hurry() if was_interrupted else server.stop()
            was_interrupted = True
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Have an interrupt raise at once: asyncio's own handler would wait for the loop, which waits for us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_over(ended: threading.Event) -> bool:
    """Wait for the end; False after an interrupt."""
    try:
        while not ended.wait(0.2):  # not join(), which takes an interrupted wait for the thread's end
            continue
    except KeyboardInterrupt:
        return False
    return True
