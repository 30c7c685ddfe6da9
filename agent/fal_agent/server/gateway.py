"""The gateway in front of an app that has several runners, as the agent sees it.

Runs in the agent, on its event loop. It is a process of its own that spreads requests over the runners
(`fal_agent.serving.gateway`); it says how much there is to do, and the app decides about runners.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from typing import TYPE_CHECKING

from fal_agent.server.parts import Part
from fal_agent.server.prepared import Prepared
from fal_agent.wire import Load, Resources, Result, Runners, Scaling, Serve, Sick

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.server.runs import Run
    from fal_agent.wire import Event, Message

__all__ = ["GatewayRun"]


class GatewayRun(Part):
    """The run of a gateway.

    Args:
        app: the app's run.
        path: where it is to listen.
        agent_secret: proves to it that a request is the agent's.
        on_load: called with what it says of its load.
        on_sick: called with the name of a runner, and why it should be replaced.
        on_change: called when it begins to listen.
        on_end: called with its last event.

    Attributes:
        is_ready: whether it takes requests.
        is_ending: it has been told to end.
        has_served: whether it took requests at some time.
        load: what it said last.
    """

    def __init__(
        self,
        app: Run,
        *,
        path: str,
        agent_secret: str,
        on_load: Callable[[Load], None],
        on_sick: Callable[[str, str], None],
        on_change: Callable[[], None],
        on_end: Callable[[Event, Sequence[Buffer]], None],
    ) -> None:
        assert app.call.app is not None
        spec = dataclasses.replace(app.call.app, environ={})  # it runs none of the app's code
        call = dataclasses.replace(
            app.call,
            kind="gateway",
            function=None,
            resources=Resources(num_gpus=0),
            scaling=Scaling(keep_alive=0.0),
            app=dataclasses.replace(spec, name=f"{spec.name}/gateway"),
        )
        prepared = Prepared(call)
        environment = app.prepared.environment
        assert environment is not None
        prepared.match = dataclasses.replace(app.prepared.match, gpus=0, gpu_model=None)  # type: ignore[type-var]
        prepared.found(environment, app.prepared.folder)
        super().__init__(app, prepared)
        self.path = path
        self.serve = Serve(path, spec, agent_secret, multiplexing=app.call.scaling.max_multiplexing)
        self.is_ready = self.is_ending = self.has_served = False
        self.load = Load(self.run_id, 0, 0, 0.0)
        self._routed: list[list[str]] = []
        self._on_load, self._on_sick, self._on_change, self._on_end = on_load, on_sick, on_change, on_end

    def route(self, runners: list[list[str]]) -> None:
        """Say which runners there are: the name and the socket of each."""
        if self.is_ready and runners != self._routed:
            self._routed = runners
            self.worker.send(Runners(self.run_id, runners))

    def on_message(self, message: Message) -> None:
        """Take what it says of its load and of its runners."""
        if isinstance(message, Load):
            self.load = message
            self._on_load(message)
        elif isinstance(message, Sick):
            self._on_sick(message.runner, message.reason)

    def serves(self) -> None:
        """It takes requests."""
        self.is_ready = self.has_served = True
        self._on_change()

    def ended(self, event: Event, buffers: Sequence[Buffer]) -> None:
        """It has ended."""
        self.is_ready = False
        if self.worker is not None:
            self.worker.end(0.0)
        self._on_end(event, buffers)

    def stop(self, loop: asyncio.AbstractEventLoop, grace: float) -> None:
        """Let it finish the requests it has and end; by force after `grace` seconds."""
        self.is_ending, self.is_ready = True, False
        if self.worker is None:  # it has not begun
            self.emit(Result(self.run_id, sent_at=time.time()))
        elif self.worker.pid:
            self.worker.is_ending = True
            self.timers["grace"] = loop.call_later(grace, self.kill)
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(self.worker.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it by force."""
        self.is_ending = True
        if self.worker is not None:
            self.worker.end(0.0)
        else:
            self.emit(Result(self.run_id, sent_at=time.time()))
