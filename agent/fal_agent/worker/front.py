"""What stands before whatever a runner serves: who may come in, how many, and what the agent hears of it.

Runs in a worker whose environment has what `fal_agent.serving` needs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.wire import Activity, Unwell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import AppSpec, Message, Serve
    from fal_agent.worker.context import CallContext

__all__ = ["Front"]

_REPORT_SECONDS = 0.1  # between two words about the load


class Front:
    """The layers around an application, and their rules.

    Args:
        call: the call that lasts as long as it is served.
        serve: to whom, and within which limits.
        tell: sends a message to the agent.
    """

    def __init__(
        self, call: CallContext, serve: Serve, tell: Callable[[Message, Sequence[Buffer]], None]
    ) -> None:
        self._call, self._serve, self._tell = call, serve, tell
        self._guard: Any = None
        self._limits: Any = None
        self._in_flight = 0
        self._reported: Optional[bool] = None
        self._is_reporting = False

    def around(self, application: Any) -> Any:
        """Put around an application what decides who may come in, and how many."""
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

    def set_rules(self, app: AppSpec) -> None:
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

        if reason == CHECK_ASKED:
            self._tell(Unwell(self._call.run_id, ""), ())
        elif self._serve.app.port is None:  # a server that is not ours may mean something else by 503
            self._tell(Unwell(self._call.run_id, reason), ())


def _policy(app: AppSpec) -> Any:
    from fal_agent.serving.guard import GuardPolicy

    return GuardPolicy(app.auth, frozenset(app.secrets))
