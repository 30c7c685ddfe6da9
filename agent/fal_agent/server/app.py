"""One app: its runners are started, scaled, replaced and let go, and its requests led to them.

Runs in the agent, on its event loop. An app is a run that goes on until it is stopped, whether a
notebook is connected or not. One runner is reached without a further hop; several stand behind a gateway.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
import uuid
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import FalServerlessError
from fal_agent.server.gateway import GatewayRun
from fal_agent.server.runner import Runner, SwapRun
from fal_agent.server.scaling import most_runners, wanted_runners
from fal_agent.wire import Failure, Result, Serve, Serving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fal_agent.framing import Buffer
    from fal_agent.server.functions import FunctionStore
    from fal_agent.server.pool import Pool
    from fal_agent.server.runs import Run
    from fal_agent.wire import Event, Load

__all__ = ["App"]

_log = logging.getLogger(__name__)
_RESTART_FIRST, _RESTART_LAST = 0.5, 60.0  # seconds between a runner's unexpected end and the next one
_STEADY = 120.0  # seconds of serving after which earlier ends are forgotten


class App:
    """One app.

    Args:
        run: the app's own run, whose environment is ready.
        folder: where sockets lie, reachable by this user alone.
        pool: starts workers.
        functions: data of classes.
        on_ready: called when it serves for the first time, and when it does again.
        on_end: called when it has ended.

    Attributes:
        run: the app's own run, which the notebook watches.
        spec: how it is served.
        runners: those that requests go to, and those that are starting.
        state: "starting", "ready", "idle" (no runner, one starts with the next request), "stopping",
            "stopped" or "failed".
        since: when it was spawned, in seconds since the Unix epoch.
        is_held: no runner may start before `start` is called (again).
    """

    def __init__(
        self,
        run: Run,
        *,
        folder: Path,
        pool: Pool,
        functions: FunctionStore,
        on_ready: Callable[[App], None],
        on_end: Callable[[App], None],
    ) -> None:
        assert run.call.app is not None
        self.run, self.spec, self.since = run, run.call.app, time.time()
        self.runners: list[Runner] = []
        self.state, self.is_held = "starting", False
        self._folder, self._pool, self._functions = folder, pool, functions
        self._on_ready, self._on_end = on_ready, on_end
        self._function = functions.data(run.call.function or "", offset=0)
        self._scaling = run.call.scaling
        self._most = most_runners(self._scaling)
        self._gateway: Optional[GatewayRun] = None
        self._changed = asyncio.Event()
        self._restarts = self._told = 0
        self._has_served = self._is_wanted = False
        self._ready_at = self._idle_at = 0.0
        self._draining: set[Runner] = set()
        self._stopping: Optional[Event] = None

    # ------------------------------------------------------------ runners

    def start(self) -> None:
        """Start what the app begins with: a gateway if it may have several runners, and the runners."""
        self.is_held = False
        if self._most > 1:
            self._start_gateway()
        self._start_runners(max(1, wanted_runners(self._scaling, 0)))

    def take_over(self, old: App) -> None:
        """Serve in the place of an earlier version, without a moment in which nobody answers."""
        runner = old.single if self.spec.port is None and old.spec.port is None else None
        if self._most == 1 and runner is not None and runner.prepared.key == self.run.prepared.key:
            self._swap(old, runner)
        else:
            self.start()

    @property
    def single(self) -> Optional[Runner]:
        """The only runner, where requests go straight to one."""
        ready = [runner for runner in self.runners if runner.is_ready]
        return ready[0] if ready and self._gateway is None else None

    @property
    def may_repeat(self) -> bool:
        """Whether a request may be sent again whose runner, or gateway, ended before it answered."""
        return "connection_error" not in self.spec.skip_retry

    @property
    def may_repeat_refused(self) -> bool:
        """Whether whoever connects to the app may send a request again that was answered 503.

        A gateway has done so already; and what a function's own server answers is its own matter.
        """
        is_runners = self._most == 1 and self.spec.port is None
        return is_runners and "server_error" not in self.spec.skip_retry

    def _swap(self, old: App, runner: Runner) -> None:
        """Load this version into the process that serves the old one; what is cached there stays."""
        self._pin_function()

        def done(event: Event, buffers: Sequence[Buffer]) -> None:
            if isinstance(event, Failure):
                self._fail(event, buffers)
                return
            old.runners.remove(runner)
            runner.serve_for(self.run, on_change=self._runner_changed, on_end=self._runner_ended)
            self.runners.append(runner)
            self.run.emit(Serving(self.run.run_id, sent_at=time.time()))
            self._look()

        assert runner.worker is not None
        runner.worker.execute(SwapRun(self.run, Serve(runner.path, self.spec, runner.agent_secret), done))

    def _start_runners(self, wanted: int) -> None:
        """Start runners until there are so many."""
        if self._stopping is not None or self.state == "failed" or self.is_held:
            return
        if self.spec.port is not None and self._draining:
            self._is_wanted = True  # as soon as the port is free
            return
        while len(self.runners) < min(wanted, self._most):
            self._pin_function()
            runner = Runner(
                self.run,
                path=self._new_path(),
                agent_secret=secrets.token_hex(16),
                behind_gateway=self._gateway is not None,
                on_change=self._runner_changed,
                on_end=self._runner_ended,
            )
            self.runners.append(runner)
            self._pool.enqueue(runner)
        if self.state == "idle":
            self._set_state("starting")

    def _new_path(self) -> str:
        return str(self._folder / f"app-{uuid.uuid4().hex[:10]}.sock")

    def _pin_function(self) -> None:
        """The store forgets what was not used for long; an app may start a runner at any time."""
        refs, buffers = self._function
        self._functions.put(self.run.call.function or "", refs, buffers)

    def _runner_changed(self, runner: Runner) -> None:
        if runner.sick is not None and runner in self.runners:
            self._say(f"replacing a runner: {runner.sick}")
            self._let_go(runner)
            self._start_runners(max(1, len(self.runners) + 1))
        self._look()

    def _look(self) -> None:
        """Tell the gateway which runners there are, and see whether the app serves."""
        ready = [runner for runner in self.runners if runner.is_ready]
        if self._gateway is not None:
            self._gateway.route([[runner.run_id, runner.path] for runner in ready])
        if len(ready) != self._told and self._stopping is None and self.state != "failed":
            self._told = len(ready)
            self.run.stage("runners", str(self._told))
        if not ready and self.state == "ready":
            self._set_state("starting")
        elif ready and self.state == "starting" and (self._gateway is None or self._gateway.is_ready):
            self._has_served, self._ready_at = True, time.monotonic()
            self._set_state("ready")
            self._on_ready(self)

    def _let_go(self, runner: Runner) -> None:
        """Take a runner out and let it finish what it has."""
        self.runners.remove(runner)
        self._draining.add(runner)
        self._look()
        runner.stop()

    def _runner_ended(self, runner: Runner, event: Event, buffers: Sequence[Buffer]) -> None:
        was_expected = runner.is_ending
        self._draining.discard(runner)
        if runner in self.runners:
            self.runners.remove(runner)
        if self._is_wanted and not self._draining:
            self._is_wanted = False
            self._start_runners(1)
        self._look()
        if self._stopping is not None:
            self._finish_stopping()
        elif not was_expected:
            self._runner_lost(event, buffers)

    def _runner_lost(self, event: Event, buffers: Sequence[Buffer]) -> None:
        """A runner ended by itself: the app has failed if it never served, else another one is started."""
        if isinstance(event, Failure) and not self._has_served:
            self._fail(event, buffers)
            return
        if isinstance(event, Result) and self.spec.port is not None:
            self._returned(event, buffers)
            return
        reason = event.message if isinstance(event, Failure) else "it ended by itself"
        if time.monotonic() - self._ready_at > _STEADY:
            self._restarts = 0
        delay = min(_RESTART_FIRST * 2**self._restarts, _RESTART_LAST)
        self._restarts += 1
        self._say(f"a runner is gone: {reason}. Another one starts in {delay:g} s")
        if not self.runners:
            self._set_state("starting")
        asyncio.get_running_loop().call_later(delay, self._start_runners, len(self.runners) + 1)

    def _returned(self, event: Result, buffers: Sequence[Buffer]) -> None:
        """The function has returned, and its server is no more: what it gave is what the run gives."""
        self._set_state("stopped")
        self.run.emit(dataclasses.replace(event, run_id=self.run.run_id), buffers)
        self._on_end(self)

    def _fail(self, event: Failure, buffers: Sequence[Buffer]) -> None:
        self._set_state("failed")
        for runner in list(self.runners):
            self._let_go(runner)
        if self._gateway is not None:
            self._gateway.kill()
        self.run.emit(dataclasses.replace(event, run_id=self.run.run_id), buffers)
        self._on_end(self)

    # ------------------------------------------------------------ the gateway

    def _start_gateway(self) -> None:
        self._gateway = GatewayRun(
            self.run,
            path=self._new_path(),
            agent_secret=secrets.token_hex(16),
            on_load=self._on_load,
            on_sick=self._on_sick,
            on_change=self._look,
            on_end=self._gateway_ended,
        )
        self._pool.enqueue(self._gateway)

    def _on_load(self, load: Load) -> None:
        """Start runners for what waits; those that are too many end when they have been idle."""
        if load.waiting and load.oldest >= self._scaling.scaling_delay:
            self._start_runners(wanted_runners(self._scaling, load.in_flight + load.waiting))
        elif load.waiting:
            later = self._scaling.scaling_delay - load.oldest
            asyncio.get_running_loop().call_later(later, self._look_at_load)
        for runner in self.runners:
            count = load.runners.get(runner.run_id, 0)
            if count or runner.in_flight:
                runner.idle_since = time.monotonic()
            runner.in_flight = count

    def _look_at_load(self) -> None:
        """Requests may have waited long enough by now."""
        if self._gateway is not None and self._gateway.load.waiting:
            load = self._gateway.load
            self._start_runners(wanted_runners(self._scaling, load.in_flight + load.waiting))

    def _on_sick(self, name: str, reason: str) -> None:
        for runner in list(self.runners):
            if runner.run_id == name and runner.is_ready:
                runner.is_sick(reason)

    def _gateway_ended(self, event: Event, buffers: Sequence[Buffer]) -> None:
        gateway, self._gateway = self._gateway, None
        if self._stopping is not None:
            self._stop_runners()
        elif self.state == "failed" or gateway is None:
            return
        elif gateway.has_served:
            self._say("the gateway is gone; another one starts")
            self._set_state("starting")
            self._start_gateway()
        elif isinstance(event, Failure):
            self._fail(event, buffers)

    # ------------------------------------------------------------ what notebooks want

    async def address(self, timeout: float, refusing: str = "") -> str:
        """Give the socket to connect to, once somebody listens there; starts a runner if there is none.

        Args:
            timeout: seconds to wait.
            refusing: the socket of a runner that answered 503; it is replaced if it still is there.

        Raises:
            FalServerlessError: the app has ended, or no runner is ready within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self.state in ("stopped", "failed", "stopping"):
                raise FalServerlessError(f"the app {self.spec.name!r} is {self.state}; spawn it again")
            if self._gateway is not None and self._gateway.is_ready and self.state in ("ready", "idle"):
                return self._gateway.path
            if self.single is not None and self.single.path == refusing:
                self.single.is_sick("an answer had status 503")
            if self.single is not None:
                self.single.idle_since = time.monotonic()
                return self.single.path
            if self.state == "idle":
                self._start_runners(1)
            left = deadline - time.monotonic()
            if left <= 0:
                raise FalServerlessError(f"no runner of {self.spec.name!r} was ready within {timeout:g} s")
            await self._next_change(left)

    def stop(self, why: str = "stopped") -> None:
        """End the app: what it has is finished first."""
        if self._stopping is not None or self.state in ("stopped", "failed"):
            return
        self._stopping = (
            Result(self.run.run_id, sent_at=time.time())
            if why in ("stopped", "replaced")
            else Failure(self.run.run_id, "cancelled", f"{self.spec.name} was {why}", sent_at=time.time())
        )
        self._set_state("stopping")
        if self._gateway is not None:  # it ends when its requests have been answered, then the runners end
            self._gateway.stop(asyncio.get_running_loop(), self.spec.grace)
        else:
            self._stop_runners()

    def kill(self) -> None:
        """End the app at once."""
        self.stop("killed")
        if self._gateway is not None:
            self._gateway.kill()
        for runner in [*self.runners, *self._draining]:
            runner.kill()

    def _stop_runners(self) -> None:
        for runner in list(self.runners):
            self._let_go(runner)
        self._finish_stopping()

    def _finish_stopping(self) -> None:
        if self._draining or self._gateway is not None or self._stopping is None or self.run.is_finished:
            return
        self._set_state("stopped")
        self.run.emit(self._stopping)
        self._on_end(self)

    def tend(self, now: float) -> None:
        """Let runners go that nobody has used for `keep_alive` seconds; end an app that nobody can reach."""
        if self.state == "idle" and self.run.connection is None and now - self._idle_at > self.run.call.lease:
            self.stop("idle, and no notebook was connected for its lease")
        load = sum(runner.in_flight for runner in self.runners)
        for runner in list(self.runners):
            if len(self.runners) <= wanted_runners(self._scaling, load):
                return
            idle = now - runner.idle_since
            if runner.is_ready and not runner.in_flight and idle > self._scaling.keep_alive:
                self._let_go(runner)
        if not self.runners and self.state in ("ready", "starting") and not self.is_held:
            self._idle_at = now
            self._set_state("idle")

    def describe(self) -> dict[str, Any]:
        """What is said of it in a list."""
        return {
            "name": self.spec.name,
            "run_id": self.run.run_id,
            "label": self.run.call.label,
            "state": self.state,
            "auth": self.spec.auth,
            "since": self.since,
            "attended": self.run.connection is not None,
            "in_flight": sum(runner.in_flight for runner in self.runners),
            "runners": sum(1 for runner in self.runners if runner.is_ready),
        }

    # ------------------------------------------------------------ small things

    def _set_state(self, state: str) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self, timeout: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except asyncio.TimeoutError:  # whoever waits looks at the time
            return

    def _say(self, text: str) -> None:
        _log.info("app %s: %s", self.spec.name, text)
        self.run.stage("serve", text)
