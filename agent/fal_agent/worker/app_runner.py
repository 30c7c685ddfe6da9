"""A worker that serves an app: on its main thread, until it is told to end.

Runs in a worker whose environment has what `fal_agent.serving` needs. The agent's word to end is
SIGTERM, which the server hears; the process then ends of that signal. Another version of the app may be
loaded into the running server, and meets what was cached there.
"""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.wire import Activity, Unwell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from fal_agent.framing import Buffer
    from fal_agent.wire import AppSpec, Message, Serve
    from fal_agent.worker.context import CallContext

__all__ = ["AppRunner"]

_REPORT_SECONDS = 0.1  # between two words about the load


class AppRunner:
    """What serves an app in this process.

    Args:
        call: the call that lasts as long as the app is served.
        serve: where, and to whom.
        tell: sends a message to the agent.
    """

    def __init__(
        self, call: CallContext, serve: Serve, tell: Callable[[Message, Sequence[Buffer]], None]
    ) -> None:
        self._call, self._serve, self._tell = call, serve, tell
        self._server: Any = None
        self._guard: Any = None
        self._limits: Any = None
        self._in_flight = 0
        self._reported: Optional[bool] = None
        self._is_reporting = False

    def run(self, cls: type) -> None:
        """Serve until SIGTERM, which ends the process when the app has been torn down.

        Raises:
            BaseException: what `setup` raised.
        """
        from fal_agent.serving.server import AppServer, bind_socket

        self._server = AppServer(
            cls(_allow_init=True),
            bind_socket(self._serve.path),
            on_ready=self._call.serving,
            drain_seconds=math.ceil(self._serve.app.grace),
            wrap=self._wrap,
        )
        _forget_about_what_stays()
        self._server.run()

    def swap(self, cls: type, serve: Serve) -> None:
        """Let another version of the app answer from now on; waits until it does.

        What the version before had begun is finished, and it is torn down, after this has returned.

        Args:
            cls: the new version.
            serve: who may use it, and its limits.

        Raises:
            BaseException: what its `setup` raised; the version before goes on then.
        """
        is_current, is_decided = threading.Event(), threading.Event()

        def became_current() -> None:
            self._set_rules(serve.app)
            is_current.set()
            is_decided.set()

        def ended(done: Future[None]) -> None:
            is_decided.set()
            error = done.exception()
            if is_current.is_set() and error is not None:
                from fal_agent.serving.failures import report

                report(error, "teardown() of the version before")

        done = self._server.swap(cls(_allow_init=True), on_current=became_current)
        done.add_done_callback(ended)
        is_decided.wait()
        if not is_current.is_set():
            done.result()

    def _wrap(self, application: Any) -> Any:
        """Put around the app what decides who may come in, and how many."""
        from fal_agent.serving.guard import Guard
        from fal_agent.serving.limits import Limits

        app = self._serve.app
        self._limits = Limits(
            application,
            request_timeout=app.request_timeout,
            multiplexing=app.multiplexing,
            on_activity=self._on_activity,
            on_unwell=self._on_unwell,
        )
        self._guard = Guard(self._limits, _policy(app), agent_secret=self._serve.agent_secret)
        return self._guard

    def _set_rules(self, app: AppSpec) -> None:
        """Let in whom a new version lets in, and as many; on the event loop."""
        self._guard.policy = _policy(app)
        self._limits.change(request_timeout=app.request_timeout, multiplexing=app.multiplexing)

    def _on_activity(self, in_flight: int) -> None:
        """Take note of the load, in the serving thread; the agent wants to know whether there is any."""
        self._in_flight = in_flight
        if not self._is_reporting and bool(in_flight) != self._reported:
            self._is_reporting = True
            self._report()
            asyncio.get_running_loop().call_later(_REPORT_SECONDS, self._report_again)

    def _report_again(self) -> None:
        self._is_reporting = False
        if bool(self._in_flight) != self._reported:
            self._on_activity(self._in_flight)

    def _report(self) -> None:
        self._reported = bool(self._in_flight)
        self._tell(Activity(self._call.run_id, self._in_flight), ())

    def _on_unwell(self, reason: str) -> None:
        from fal_agent.serving.limits import CHECK_ASKED

        self._tell(Unwell(self._call.run_id, "" if reason == CHECK_ASKED else reason), ())


def _forget_about_what_stays() -> None:
    """Spare the garbage collector what was imported so far, which is never garbage.

    Looking through it takes 20 ms at a time, in which no request goes on. What `setup` makes is not among it.
    """
    gc.collect()
    gc.freeze()


def _policy(app: AppSpec) -> Any:
    from fal_agent.serving.guard import GuardPolicy

    return GuardPolicy(app.auth, frozenset(app.secrets))
