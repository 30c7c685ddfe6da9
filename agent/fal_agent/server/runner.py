"""One runner of an app as the agent sees it: a run in a worker of its own that lasts as long as it serves.

Runs in the agent, on its event loop. What the runner says is said in the name of the app's own run, so
that the notebook sees one run whatever runners come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Optional

from fal_agent.server.health import check_health
from fal_agent.server.parts import Part
from fal_agent.wire import Activity, Failure, Result, Serve, Unwell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.server.runs import Run
    from fal_agent.wire import AppSpec, Event, Message

__all__ = ["Runner", "SwapRun"]

_log = logging.getLogger(__name__)
_CHECK_EVERY = 15.0  # seconds between two health checks
_STARTUP_TIMEOUT = 600.0  # seconds from a ready worker to the end of `setup`, unless the app says otherwise
_UNLINKED = 0.1  # seconds between taking a runner's address away and telling it to end


class SwapRun(Part):
    """The loading of an app's new version into a runner that serves the old one."""

    def __init__(self, app: Run, serve: Serve, done: Callable[[Event, Sequence[Buffer]], None]) -> None:
        super().__init__(app)
        self.serve, self._done = serve, done

    def ended(self, event: Event, buffers: Sequence[Buffer]) -> None:
        """Say whether the new version serves."""
        self._done(event, buffers)


class Runner(Part):
    """One runner.

    Args:
        app: the app's run.
        path: where it is to listen.
        agent_secret: proves to it that a request is the agent's.
        behind_gateway: requests come through a gateway, which asks for keys.
        on_change: called when it begins to serve, when its load changes, and when it is sick.
        on_end: called with its last event.

    Attributes:
        is_ready: whether it answers requests.
        in_flight: requests that it has.
        idle_since: when it had the last one.
        sick: why it should be replaced; None while it is well.
        is_ending: it has been told to end.
    """

    def __init__(
        self,
        app: Run,
        *,
        path: str,
        agent_secret: str,
        behind_gateway: bool,
        on_change: Callable[[Runner], None],
        on_end: Callable[[Runner, Event, Sequence[Buffer]], None],
    ) -> None:
        super().__init__(app)
        assert app.call.app is not None
        self.arguments, self.buffers = app.arguments, app.buffers  # of a function with a server of its own
        self.spec: AppSpec = app.call.app
        self.path, self.agent_secret = path, agent_secret
        # A gateway has looked who may come in, and nobody else reaches the socket.
        spec = dataclasses.replace(self.spec, auth="public", secrets=[]) if behind_gateway else self.spec
        self.serve = Serve(path, spec, agent_secret)
        self.is_ready = self.is_ending = False
        self.in_flight = 0
        self.idle_since = time.monotonic()
        self.sick: Optional[str] = None
        self._on_change, self._on_end = on_change, on_end
        self._checks: Optional[asyncio.Task[None]] = None
        self._ask_for_check = asyncio.Event()

    def serve_for(
        self,
        app: Run,
        *,
        on_change: Callable[[Runner], None],
        on_end: Callable[[Runner, Event, Sequence[Buffer]], None],
    ) -> None:
        """Belong to another version of the app, which has been loaded into this runner."""
        assert app.call.app is not None
        self.app, self.prepared, self.spec = app, app.prepared, app.call.app
        self._on_change, self._on_end = on_change, on_end
        self._begin_checks()

    def tell_running(self) -> None:
        """The worker has the call: watch how long `setup` takes."""
        seconds = self.call.startup_timeout or _STARTUP_TIMEOUT
        self.timers["startup"] = asyncio.get_running_loop().call_later(seconds, self._too_slow, seconds)

    def on_message(self, message: Message) -> None:
        """Take what the worker says about its load and health."""
        if isinstance(message, Activity):
            self.in_flight = message.in_flight
            self.idle_since = time.monotonic()
            self._on_change(self)
        elif isinstance(message, Unwell):
            if not message.reason:
                self._ask_for_check.set()
            else:
                self.is_sick(message.reason)

    def is_sick(self, reason: str) -> None:
        """Take note that it should be replaced."""
        if self.sick is None and not self.is_ending:
            self.sick = reason
            self._on_change(self)

    def stop(self) -> None:
        """Let it finish what it has, tear down and end; by force after the app's grace."""
        if self.is_ending:
            return
        self.is_ending = True
        self.is_ready = False
        if self.worker is None:
            self.emit(Result(self.run_id, sent_at=time.time()))
            return
        self.worker.is_ending = True
        loop = asyncio.get_running_loop()
        try:
            os.unlink(self.path)  # noqa: PTH108 - nobody new finds it
        except FileNotFoundError:
            self._terminate()
        else:
            loop.call_later(_UNLINKED, self._terminate)
        self.timers["grace"] = loop.call_later(self.spec.grace, self.kill)

    def kill(self) -> None:
        """End it by force."""
        self.is_ending = True
        if self.worker is not None:
            self.worker.end(0.0)

    def serves(self) -> None:
        """It answers requests from now on."""
        self.timers.pop("startup").cancel()
        self.is_ready = True
        self.idle_since = time.monotonic()
        self._begin_checks()
        self._on_change(self)

    def _begin_checks(self) -> None:
        if self._checks is not None:
            self._checks.cancel()  # those of the version before
        self._checks = asyncio.get_running_loop().create_task(self._watch())

    def ended(self, event: Event, buffers: Sequence[Buffer]) -> None:
        """It has ended."""
        self.is_ready = False
        if self._checks is not None:
            self._checks.cancel()
        if self.worker is not None:
            self.worker.end(0.0)  # nothing else runs there, and what the app holds is to be freed
        self._on_end(self, event, buffers)

    def _terminate(self) -> None:
        if self.worker is not None and self.worker.pid and not self.is_finished:
            try:
                os.kill(self.worker.pid, signal.SIGTERM)  # it alone: its children end with it
            except ProcessLookupError:
                return

    @property
    def _awaited(self) -> str:
        if self.spec.port is None:
            return "setup() was not done"
        return f"nobody listened on port {self.spec.port} of 127.0.0.1 on this host"

    def _too_slow(self, seconds: float) -> None:
        self.ended_by = Failure(
            self.run_id,
            "timeout",
            f"{self.spec.name}: {self._awaited} after {seconds:g} s (startup_timeout)",
            detail={"seconds": seconds},
            sent_at=time.time(),
        )
        if self.worker is not None:
            self.worker.end(0.0)

    async def _watch(self) -> None:
        """Check its health now and then, or when it asks for it."""
        policy, failures = self.spec.health, 0
        start_period = max(policy.start_period, self.call.startup_timeout or 0.0) if policy.regularly else 0.0
        threshold = policy.threshold if policy.regularly else 1  # who asks for a check has seen trouble
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        while not self.is_ending:
            every = _CHECK_EVERY if policy.regularly else None
            with contextlib.suppress(asyncio.TimeoutError):  # then it is time for the regular check
                await asyncio.wait_for(self._ask_for_check.wait(), every)
            self._ask_for_check.clear()
            problem = await loop.run_in_executor(None, check_health, self.path, policy, self.agent_secret)
            if problem is None or time.monotonic() - began < start_period:
                failures = 0
                continue
            failures += 1
            _log.info("runner %s of %s is not well: %s", self.run_id, self.spec.name, problem)
            if failures >= threshold:
                times = (
                    f"{failures} health checks failed, the last one"
                    if failures > 1
                    else "a health check failed"
                )
                self.is_sick(f"{times}: {problem}")
                return
