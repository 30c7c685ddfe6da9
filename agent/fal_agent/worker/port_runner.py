"""A worker whose function runs a server of its own, which is reached through a Unix socket like any app.

Runs in a worker: the function on the main thread, and in a thread a gateway before its port. Other users of
the machine reach that port too, as they would if the function ran there by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import FalServerlessError
from fal_agent.worker.front import Front

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Message, Serve
    from fal_agent.worker.context import CallContext

__all__ = ["PortRunner"]

_LOOK_AGAIN = 0.05  # seconds between two looks at whether the server listens
_CONNECT_SECONDS = 1.0
_FREE_SECONDS = 3.0  # in which what the version before has left behind lets go of the port
_MANY = 10_000  # requests at once, which is for the function's server to limit
_BACKLOG = 2048  # connections that may wait to be accepted
_GRACE = 2.0  # seconds that answers on their way get when the function has returned


class PortRunner:
    """What leads to the server that a function runs.

    Args:
        call: the call of the function.
        serve: where it is to be reached, by whom, and which port the function opens.
        tell: sends a message to the agent.
    """

    def __init__(
        self, call: CallContext, serve: Serve, tell: Callable[[Message, Sequence[Buffer]], None]
    ) -> None:
        assert serve.app.port is not None
        self._call, self._serve, self._port = call, serve, serve.app.port
        self._front = Front(call, serve, tell)
        self._names = (f"server-{number}" for number in itertools.count())
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._is_over = threading.Event()
        self._stop: Optional[asyncio.Event] = None

    def run(self, work: Callable[[], Any]) -> Any:
        """Run the function, and lead to its server as soon as that listens; give the function's value.

        Raises:
            FalServerlessError: somebody else has the port.
            BaseException: what the function raised.
        """
        deadline = time.monotonic() + _FREE_SECONDS
        while _listens(self._port) and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN)
        if _listens(self._port):
            raise FalServerlessError(
                f"port {self._port} (exposed_port) is in use on this host, and {self._call.task.label} "
                "cannot have it: end what listens there, or choose another port"
            )
        thread = threading.Thread(target=self._lead, name="fal-port", daemon=True)
        thread.start()
        try:
            return work()
        finally:
            self._is_over.set()
            loop, stop = self._loop, self._stop
            if loop is not None and stop is not None:
                with contextlib.suppress(RuntimeError):  # it has ended already
                    loop.call_soon_threadsafe(stop.set)
                thread.join(_GRACE)

    def _lead(self) -> None:
        while not _listens(self._port):
            if self._is_over.wait(_LOOK_AGAIN):
                return
        from fal_agent.serving.speedups import run

        run(self._pass_on())

    async def _pass_on(self) -> None:
        from fal_agent.serving.gateway import Gateway, serve_gateway
        from fal_agent.serving.server import bind_socket

        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._is_over.is_set():
            return
        # The function's server is the only one there is: what it answers is passed on as it is.
        gateway = Gateway(
            multiplexing=_MANY,
            skip_retry_conditions=("server_error", "connection_error"),
            on_load=lambda _: None,
            on_sick=lambda *_: self._offer_soon(gateway),
        )
        self._offer(gateway)
        listener = bind_socket(self._serve.path)
        listener.listen(_BACKLOG)
        self._call.serving()
        guarded = self._front.around(self._with_health(gateway))
        await serve_gateway(gateway, listener, self._stop, application=guarded)

    def _offer(self, gateway: Any) -> None:
        """Have the gateway ask the server, under a name that it has not found wanting yet."""
        from fal_agent.serving.gateway import RunnerAddress

        gateway.set_runners([RunnerAddress(next(self._names), "", self._port)])

    def _offer_soon(self, gateway: Any) -> None:
        asyncio.get_running_loop().call_soon(self._offer, gateway)

    def _with_health(self, gateway: Any) -> Any:
        """Answer the agent's usual health check here: not every server has a page for it."""
        from fal_agent.serving.guard import IS_AGENT
        from fal_agent.serving.refusals import refuse

        async def application(scope: Any, receive: Any, send: Any) -> None:
            if not scope.get(IS_AGENT) or self._serve.app.health.path:
                await gateway(scope, receive, send)
                return
            is_there = await asyncio.get_running_loop().run_in_executor(None, _listens, self._port)
            detail = "it listens" if is_there else f"nobody listens on port {self._port}"
            await refuse(scope, receive, send, status=200 if is_there else 503, detail=detail)

        return application


def _listens(port: int) -> bool:
    """Whether somebody takes connections on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
