"""A worker that is the gateway of an app: it runs no user code, and ends on SIGTERM.

Runs in a worker, on its main thread.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.wire import Load, Sick

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Message, Serve
    from fal_agent.worker.context import CallContext

__all__ = ["GatewayRunner"]

_BACKLOG = 2048  # connections that may wait to be accepted


class GatewayRunner:
    """What spreads an app's requests over its runners.

    Args:
        call: the call that lasts as long as the gateway.
        serve: where it listens, and for whom.
        tell: sends a message to the agent.
    """

    def __init__(
        self, call: CallContext, serve: Serve, tell: Callable[[Message, Sequence[Buffer]], None]
    ) -> None:
        self._call, self._serve, self._tell = call, serve, tell
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._gateway: Any = None
        self._runners: list[list[str]] = []

    def run(self) -> None:
        """Serve until SIGTERM, and then until the requests in flight have been answered."""
        from fal_agent.serving.speedups import run

        run(self._run())

    def route(self, runners: list[list[str]]) -> None:
        """Take the runners that are ready; from any thread."""
        self._runners = runners
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._set_runners)

    async def _run(self) -> None:
        from fal_agent.serving.gateway import Gateway, serve_gateway
        from fal_agent.serving.guard import Guard, GuardPolicy
        from fal_agent.serving.server import bind_socket

        app, stop = self._serve.app, asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        self._gateway = Gateway(
            multiplexing=self._serve.multiplexing,
            request_timeout=app.request_timeout,
            skip_retry_conditions=app.skip_retry,
            on_load=self._on_load,
            on_sick=lambda runner, reason: self._tell(Sick(self._call.run_id, runner, reason), ()),
        )
        self._loop = loop
        self._set_runners()
        policy = GuardPolicy(app.auth, frozenset(app.secrets))
        guarded = Guard(self._gateway, policy, agent_secret=self._serve.agent_secret)
        listener = bind_socket(self._serve.path)
        listener.listen(_BACKLOG)
        self._call.serving()
        await serve_gateway(self._gateway, listener, stop, application=guarded)

    def _set_runners(self) -> None:
        from fal_agent.serving.gateway import RunnerAddress

        self._gateway.set_runners([RunnerAddress(name, path) for name, path in self._runners])

    def _on_load(self, load: Any) -> None:
        self._tell(
            Load(
                self._call.run_id,
                load.waiting,
                load.in_flight,
                load.oldest_wait_seconds,
                dict(load.per_runner),
            ),
            (),
        )
