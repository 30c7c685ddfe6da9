"""A spawned app in the notebook: its local URL, its logs, its card, and its end.

Runs in the notebook. The app goes on when the notebook ends; only its URL here ends with it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from fal_agent.errors import AppClientError, FalServerlessError
from fal_agent.wire import AppSpec, Failure, Log, Result, Serving, Stage
from fal_notebook.app_ports import ADDRESS_TIMEOUT, close_when_gone, local_url, url_if_open
from fal_notebook.display import apps as app_display
from fal_notebook.display import in_kernel

if TYPE_CHECKING:
    from types import TracebackType

    from fal_notebook.hosts.base import Host, Received
    from fal_notebook.run import Run

__all__ = ["AppSpawnInfo", "LogEntry"]

_STOP_SECONDS = 10.0  # beyond the app's grace, in which a stop is over
_NO_ANSWER = 504  # the status of an error about an answer that did not come
_ENDS = {"cancelled": "stopped", "interrupted": "stopped", "link": "disconnected"}  # by kind of failure
_KEPT_LOGS = 10_000  # entries that wait for somebody to take them from `logs`


@dataclass(frozen=True)
class LogEntry:
    """One piece of what an app, or the building of its environment, said.

    Attributes:
        message: text, mostly a line.
        level: "INFO", or "ERROR" for the app's standard error.
        source: "USER", "BUILDER", or "BRIDGE" for what is said about runners and the connection.
        timestamp: seconds since the Unix epoch, by the host's clock.
        request_id: of the request that was being answered; empty outside one.
    """

    message: str
    level: str
    source: str
    timestamp: float
    request_id: str = ""


class AppSpawnInfo:
    """A spawned app: its URL, its logs, and its end. Also a context manager, which stops it.

    Attributes:
        name: the app's name, unique on the host.
        host: where it runs.
        application: the name, as the functions of `fal.apps` take it.
        logs: entries as they come, the last 10,000 of those nobody took.
        future: the app's run: done when the app has ended, failed if it could not start.
        headers: what requests must carry; with `app_auth="private"` the key.
        state: "starting", "ready", "stopped", "failed" or, when the connection to the host broke,
        "disconnected":
            then the app goes on if the host and the agent there do, its URL connects again, and `stop()` ends
            it.
    """

    def __init__(
        self,
        host: Host,
        spec: AppSpec,
        *,
        headers: dict[str, str],
        token: str,
        startup_timeout: float | None,
        quiet: bool = False,
    ) -> None:
        self.host, self.name, self.application = host, spec.name, spec.name
        self.headers, self.state = headers, "starting"
        self.logs: queue.Queue[LogEntry] = queue.Queue()
        self.stream = _Stream(self)
        self.future: Run
        self._spec, self._token = spec, token
        self._decided = threading.Event()  # whether this version serves, or will not
        self._patience = max(ADDRESS_TIMEOUT, startup_timeout or 0.0)
        self._face = app_display.card(self, quiet=quiet)

    # ------------------------------------------------------------ reaching it

    @property
    def url(self) -> str:
        """The local address, "http://127.0.0.1:PORT"; a request waits until a runner is ready.

        A minute after the app's end nobody listens there any more; spawned again, it gets the port again, if
        that is still free.
        """
        had = url_if_open(self.host, self.name) if self.state in ("stopped", "failed") else None
        return had or local_url(self.host, self.name, patience=self._patience)

    @property
    def link(self) -> str:
        """The address of the app's documentation, to open; with `app_auth="shared"` the token is in it.

        That of a function with a server of its own is its URL.
        """
        if self._spec.port is not None:
            return self.url
        query = f"?{urlencode({'token': self._token})}" if self._token else ""
        return f"{self.url}/docs{query}"

    @property
    def return_value(self) -> Any:
        """What the function returned, once it has; None for an app.

        Raises:
            BaseException: what it raised, or why it could not be served.
        """
        return self.future.result()

    def wait(
        self,
        *,
        health_request_timeout: float = 30,
        startup_timeout: float = 60,
        health_check_interval: float = 0.5,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Wait until the app is well; times are in seconds.

        Raises:
            AppClientError: it was not within `startup_timeout`, or its health check says something else
                than yes or wait.
            BaseException: what `setup` raised, as soon as it did; or why the app could not start.
        """
        from fal_notebook.app_client import wait_until_healthy

        began = time.monotonic()
        if not self._decided.wait(startup_timeout):  # a version before this one may be serving meanwhile
            raise AppClientError(
                f"{self.name!r} on {self.host.name!r} was not ready within {startup_timeout:g} s. "
                "Look at its logs, or give it more time with startup_timeout",
                _NO_ANSWER,
            )
        problem = self._problem()
        if self._spec.port is not None and problem is None:
            return  # its server listens; what it says to a health check is its own matter
        left = max(0.0, startup_timeout - (time.monotonic() - began))
        wait_until_healthy(
            self.url,
            health_request_timeout=health_request_timeout,
            startup_timeout=left,
            health_check_interval=health_check_interval,
            headers={**self.headers, **(headers or {})},
            problem=self._problem,
        )

    def stop(self) -> None:
        """End the app: it finishes the requests it has and tears down. Waits until it has ended.

        Raises:
            FalServerlessError: it has not ended `termination_grace_period_seconds` and 10 s later.
            HostError: the host cannot be reached.
        """
        self.stream.cancel()
        deadline = time.monotonic() + self._spec.grace + _STOP_SECONDS
        while not self._is_over():
            if time.monotonic() > deadline:
                raise FalServerlessError(
                    f"{self.name!r} on {self.host.name!r} has not ended; kill it: .kill()"
                )
            time.sleep(0.02)

    def kill(self) -> None:
        """End the app by force."""
        if self.state == "disconnected":
            self.ask_to_end(kill=True)
        else:
            self.future.kill()

    def ask_to_end(self, *, kill: bool = False) -> None:
        """End the app by its name, where the connection that it was spawned over is no more."""
        if self._is_listed():
            self.host.ask("app_stop", name=self.name, kill=kill)

    def __enter__(self) -> AppSpawnInfo:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<app {self.name!r} on {self.host.name!r}: {self.state}, {self.url}>"

    def _ipython_display_(self) -> None:
        """Show a card that is kept up to date."""
        if not in_kernel():
            raise NotImplementedError  # IPython then shows the text
        self._face.show()

    def _repr_mimebundle_(self, **_options: Any) -> dict[str, str]:
        return self._face.bundle()

    # ------------------------------------------------------------ inside

    def _problem(self) -> BaseException | None:
        """Why the app cannot become well any more."""
        if not self.future.done():
            return None
        return self.future.exception() or FalServerlessError(f"the app {self.name!r} was stopped")

    def _is_over(self) -> bool:
        """Whether the app has ended."""
        if self.state == "disconnected" and not self._is_listed():
            self.state = "stopped"
            close_when_gone(self.host, self.name)
        return self.future.done() and self.state != "disconnected"

    def _is_listed(self) -> bool:
        return any(app["run_id"] == self.future.run_id for app in self.host.ask("apps"))

    def begin(self, run: Run) -> None:
        """Belong to the app's run."""
        self.future = run

    def take(self, received: Received) -> None:
        """Take an event of the app's run; called in order by a thread of the host's."""
        event = received.event
        if isinstance(event, Log):
            self._log(event, bytes(received.data[0]).decode("utf-8", "replace"))
        elif isinstance(event, Serving):
            self.state = "ready"
            self._decided.set()
        elif isinstance(event, Result):
            self.state = "stopped"
        elif isinstance(event, Failure):
            self.state = _ENDS.get(event.kind, "failed")
        elif isinstance(event, Stage) and event.phase == "serve":
            self._keep(LogEntry(event.text + "\n", "INFO", "BRIDGE", event.sent_at))
        if isinstance(event, (Result, Failure)):
            self._decided.set()
            close_when_gone(self.host, self.name)
        self._face.take(received)

    def _log(self, event: Log, text: str) -> None:
        source = {"builder": "BUILDER", "link": "BRIDGE"}.get(event.source, "USER")
        level = "ERROR" if event.stream == "stderr" and source == "USER" else "INFO"
        for line in text.splitlines(keepends=True):
            self._keep(LogEntry(line, level, source, event.sent_at, event.request))

    def _keep(self, entry: LogEntry) -> None:
        if self.logs.qsize() >= _KEPT_LOGS:
            with contextlib.suppress(queue.Empty):  # somebody takes them at this very moment
                self.logs.get_nowait()
        self.logs.put(entry)


class _Stream:
    """What can be cancelled, as the fal SDK has it."""

    def __init__(self, info: AppSpawnInfo) -> None:
        self._info = info

    def cancel(self) -> None:
        """End the app; returns at once."""
        run = self._info.future
        if self._info.state == "disconnected":
            self._info.ask_to_end()
        elif not run.done():
            self._info._face.stopping()  # noqa: SLF001 - the two are one
            run.interrupt()
