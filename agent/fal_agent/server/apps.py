"""The apps of one agent: started, reached, scaled to zero and back, replaced, stopped.

Runs in the agent, on its event loop. An app is a run that goes on until it is stopped, whether a
notebook is connected or not; its runners are runs in workers of their own (`fal_agent.server.runner`).
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
from fal_agent.server.runner import Runner, SwapRun
from fal_agent.wire import Failure, Result, Serve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fal_agent.framing import Buffer
    from fal_agent.server.functions import FunctionStore
    from fal_agent.server.pool import Pool
    from fal_agent.server.runs import Run
    from fal_agent.wire import Event

__all__ = ["App", "Apps"]

_log = logging.getLogger(__name__)
_RESTART_FIRST, _RESTART_LAST = 0.5, 60.0  # seconds between a runner's unexpected end and the next one
_STEADY = 120.0  # seconds of serving after which earlier ends are forgotten


class App:
    """One app.

    Attributes:
        run: the app's own run, which the notebook watches.
        spec: how it is served.
        runner: the one that requests go to, or that is starting; None while there is none.
        state: "starting", "ready", "idle" (no runner, one starts with the next request), "stopping",
            "stopped" or "failed".
        since: when it was spawned, in seconds since the Unix epoch.
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
        self.runner: Optional[Runner] = None
        self.state = "starting"
        self.served_once = False
        self._folder, self._pool, self._functions = folder, pool, functions
        self._on_ready, self._on_end = on_ready, on_end
        self._function = functions.data(run.call.function or "", offset=0)
        self._changed = asyncio.Event()
        self._restarts = 0
        self._ready_at = self._idle_at = 0.0
        self._draining: set[Runner] = set()
        self._stopping: Optional[Event] = None

    # ------------------------------------------------------------ runners

    def start(self) -> None:
        """Start a runner, if there is none."""
        if self.runner is not None or self._stopping is not None:
            return
        self._set_state("starting")
        self.runner = self._new_runner()
        self._pool.enqueue(self.runner)

    def take_over(self, old: App) -> None:
        """Serve in the place of an earlier version, without a moment in which nobody answers."""
        runner = old.runner
        if runner is not None and runner.is_ready and runner.prepared.key == self.run.prepared.key:
            self._swap(old, runner)
            return
        self.start()

    def _swap(self, old: App, runner: Runner) -> None:
        """Load this version into the process that serves the old one; what is cached there stays."""
        self._pin_function()

        def done(event: Event, buffers: Sequence[Buffer]) -> None:
            if isinstance(event, Failure):
                self._fail(event, buffers)
                return
            old.runner = None
            runner.serve_for(self.run, on_change=self._runner_changed, on_end=self._runner_ended)
            self.runner = runner
            self._became_ready()

        assert runner.worker is not None
        runner.worker.execute(SwapRun(self.run, Serve(runner.path, self.spec, runner.agent_secret), done))

    def _new_runner(self) -> Runner:
        self._pin_function()
        return Runner(
            self.run,
            path=str(self._folder / f"app-{uuid.uuid4().hex[:10]}.sock"),
            agent_secret=secrets.token_hex(16),
            on_change=self._runner_changed,
            on_end=self._runner_ended,
        )

    def _pin_function(self) -> None:
        """The store forgets what was not used for long; an app may start a runner at any time."""
        refs, buffers = self._function
        self._functions.put(self.run.call.function or "", refs, buffers)

    def _runner_changed(self, runner: Runner) -> None:
        if runner is not self.runner:
            return
        if runner.sick is not None:
            self._say(f"replacing the runner: {runner.sick}")
            self._let_go(runner)
            self.start()
        elif runner.is_ready and self.state == "starting":
            self._became_ready()

    def _became_ready(self) -> None:
        self.served_once, self._ready_at = True, time.monotonic()
        self._set_state("ready")
        self._on_ready(self)

    def _let_go(self, runner: Runner) -> None:
        if runner is self.runner:
            self.runner = None
        self._draining.add(runner)
        runner.stop()

    def _runner_ended(self, runner: Runner, event: Event, buffers: Sequence[Buffer]) -> None:
        expected = runner.is_ending
        self._draining.discard(runner)
        if runner is self.runner:
            self.runner = None
        if self._stopping is not None:
            self._finish_stopping()
        elif not expected:
            self._runner_lost(event, buffers)

    def _runner_lost(self, event: Event, buffers: Sequence[Buffer]) -> None:
        """A runner ended by itself: the app has failed if it never served, else another one is started."""
        if isinstance(event, Failure) and not self.served_once:
            self._fail(event, buffers)
            return
        reason = event.message if isinstance(event, Failure) else "it ended by itself"
        if time.monotonic() - self._ready_at > _STEADY:
            self._restarts = 0
        delay = min(_RESTART_FIRST * 2**self._restarts, _RESTART_LAST)
        self._restarts += 1
        self._say(f"the runner is gone: {reason}. Another one starts in {delay:g} s")
        self._set_state("starting")
        asyncio.get_running_loop().call_later(delay, self.start)

    def _fail(self, event: Failure, buffers: Sequence[Buffer]) -> None:
        self._set_state("failed")
        self.run.emit(dataclasses.replace(event, run_id=self.run.run_id), buffers)
        self._on_end(self)

    # ------------------------------------------------------------ what notebooks want

    async def address(self, timeout: float) -> str:
        """Give the socket to connect to, once somebody listens there; starts a runner if there is none.

        Raises:
            FalServerlessError: the app has ended, or no runner is ready within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            runner = self.runner
            if runner is not None and runner.is_ready:
                runner.idle_since = time.monotonic()
                return runner.path
            if self.state in ("stopped", "failed", "stopping"):
                raise FalServerlessError(f"the app {self.spec.name!r} is {self.state}; spawn it again")
            if self.state == "idle":
                self.start()
            left = deadline - time.monotonic()
            if left <= 0:
                raise FalServerlessError(f"no runner of {self.spec.name!r} was ready within {timeout:g} s")
            await self._next_change(left)

    def stop(self, why: str = "stopped") -> None:
        """End the app: its runners finish what they have."""
        if self._stopping is not None or self.state in ("stopped", "failed"):
            return
        self._stopping = (
            Failure(self.run.run_id, "cancelled", f"{self.spec.name} was {why}", sent_at=time.time())
            if why not in ("stopped", "replaced")
            else Result(self.run.run_id, sent_at=time.time())
        )
        self._set_state("stopping")
        if self.runner is not None:
            self._let_go(self.runner)
        self._finish_stopping()

    def kill(self) -> None:
        """End the app at once."""
        self.stop("killed")
        for runner in list(self._draining):
            runner.kill()

    def _finish_stopping(self) -> None:
        if self._draining or self._stopping is None or self.run.is_finished:
            return
        self._set_state("stopped")
        self.run.emit(self._stopping)
        self._on_end(self)

    def tend(self, now: float) -> None:
        """Let a runner go that nobody has used for `keep_alive` seconds; end an app that nobody can reach."""
        scaling, runner = self.run.call.scaling, self.runner
        if self.state == "idle" and self.run.connection is None and now - self._idle_at > self.run.call.lease:
            self.stop("idle, and no notebook was connected for its lease")
        if runner is None or not runner.is_ready or runner.in_flight or scaling.min_concurrency:
            return
        if now - runner.idle_since > scaling.keep_alive:
            self._let_go(runner)
            self._idle_at = now
            self._set_state("idle")

    def describe(self) -> dict[str, Any]:
        """What is said of it in a list."""
        worker = self.runner.worker if self.runner is not None else None
        return {
            "name": self.spec.name,
            "run_id": self.run.run_id,
            "label": self.run.call.label,
            "state": self.state,
            "auth": self.spec.auth,
            "since": self.since,
            "attended": self.run.connection is not None,
            "in_flight": self.runner.in_flight if self.runner is not None else 0,
            "pid": worker.pid if worker is not None else None,
        }

    # ------------------------------------------------------------ small things

    def _set_state(self, state: str) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self, timeout: Optional[float] = None) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except asyncio.TimeoutError:  # whoever waits looks at the time
            return

    def _say(self, text: str) -> None:
        _log.info("app %s: %s", self.spec.name, text)
        self.run.stage("serve", text)


class Apps:
    """All apps of one agent, by name.

    Args:
        folder: where sockets lie, reachable by this user alone.
        pool: starts workers.
        functions: data of classes.
    """

    def __init__(self, folder: Path, *, pool: Pool, functions: FunctionStore) -> None:
        self._folder, self._pool, self._functions = folder, pool, functions
        self._apps: dict[str, App] = {}
        self._coming: dict[str, App] = {}  # new versions that are not ready yet
        self._all: dict[str, App] = {}  # by run id

    def spawn(self, run: Run) -> None:
        """Start an app whose environment is ready; one of the same name is replaced."""
        assert run.call.app is not None
        name = run.call.app.name
        app = App(
            run,
            folder=self._folder,
            pool=self._pool,
            functions=self._functions,
            on_ready=self._ready,
            on_end=self._ended,
        )
        run.set_state("running")
        self._all[run.run_id] = app
        earlier = self._coming.pop(name, None)
        if earlier is not None:
            earlier.stop("replaced")
        old = self._apps.get(name)
        if old is None or old.state == "stopping":
            self._apps[name] = app
            app.start()
        else:
            self._coming[name] = app  # requests go to the old one until this one is ready
            app.take_over(old)

    def of_run(self, run_id: str) -> Optional[App]:
        """The app of a run; None for other runs."""
        return self._all.get(run_id)

    def get(self, name: str) -> App:
        """Give an app.

        Raises:
            FalServerlessError: there is none of that name.
        """
        if name not in self._apps:
            known = ", ".join(sorted(self._apps)) or "none"
            raise FalServerlessError(f"there is no app {name!r} here; running: {known}")
        return self._apps[name]

    def infos(self) -> list[dict[str, Any]]:
        """What is said of each app in a list."""
        return [app.describe() for _, app in sorted(self._apps.items())]

    def tend(self) -> None:
        """Scale idle apps to zero."""
        now = time.monotonic()
        for app in list(self._apps.values()):
            app.tend(now)

    def _ready(self, app: App) -> None:
        """A new version is ready: requests go there from now on."""
        name = app.spec.name
        if self._coming.get(name) is app:
            del self._coming[name]
            old = self._apps.get(name)
            self._apps[name] = app
            if old is not None:
                old.stop("replaced")

    def _ended(self, app: App) -> None:
        if self._coming.get(app.spec.name) is app:
            del self._coming[app.spec.name]
        self._all.pop(app.run.run_id, None)
        if self._apps.get(app.spec.name) is app:
            del self._apps[app.spec.name]
