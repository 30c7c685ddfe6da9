"""The apps of one agent, by name: spawned, replaced by new versions, listed, stopped.

Runs in the agent, on its event loop. Each app is an `fal_agent.server.app.App`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import FalServerlessError
from fal_agent.server.app import App

if TYPE_CHECKING:
    from pathlib import Path

    from fal_agent.server.functions import FunctionStore
    from fal_agent.server.pool import Pool
    from fal_agent.server.runs import Run

__all__ = ["Apps"]

_LOOK_AGAIN = 0.05  # seconds between two looks at whether an environment has been built


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
        self._building: dict[str, Run] = {}  # apps whose environment is not ready yet
        self._all: dict[str, App] = {}  # by run id
        self._held: list[App] = []  # until a port is free

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
        if self._building.get(name) is run:
            del self._building[name]
        self._all[run.run_id] = app
        earlier = self._coming.pop(name, None)
        if earlier is not None:
            earlier.stop("replaced")
        old = self._apps.get(name)
        if old is None or old.state == "stopping" or _share_a_port(app, old):
            self._apps[name] = app
            if old is not None:
                old.stop("replaced")
            self._start(app)
        else:
            self._coming[name] = app  # requests go to the old one until this one is ready
            app.take_over(old)

    def _start(self, app: App) -> None:
        """Start an app, as soon as none that is ending has the port that its function opens."""
        ending = [other for other in self._all.values() if other.state == "stopping"]
        app.is_held = any(_share_a_port(app, other) for other in ending)
        if app.is_held:
            self._held.append(app)
        else:
            app.start()

    def announce(self, run: Run) -> None:
        """Take note of an app whose environment is being built: requests for it wait."""
        assert run.call.app is not None
        self._building[run.call.app.name] = run

    async def address(self, name: str, timeout: float, refusing: str = "") -> str:
        """Give the socket of an app once somebody listens there; not that of a runner that is `refusing`.

        Raises:
            FalServerlessError: there is no such app, it has ended, or nobody listens in `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while name not in self._apps:
            run = self._building.get(name)
            if run is None or run.is_finished or time.monotonic() > deadline:
                break
            await asyncio.sleep(_LOOK_AGAIN)
        return await self.get(name).address(deadline - time.monotonic(), refusing)

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
        held, self._held = self._held, []
        for waiting in held:
            if waiting.state == "starting":
                self._start(waiting)


def _share_a_port(one: App, other: App) -> bool:
    """Whether the functions of two apps open the same port."""
    return one.spec.port is not None and one.spec.port == other.spec.port
