"""A worker that serves an app or a function: on its main thread, until it is told to end.

Runs in a worker whose environment has what `fal_agent.serving` needs. The agent's word to end is
SIGTERM, which the server hears; the process then ends of that signal. Another version of the app may be
loaded into the running server, and meets what was cached there.
"""

from __future__ import annotations

import gc
import math
import threading
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.worker.front import Front

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from fal_agent.framing import Buffer
    from fal_agent.wire import Message, Serve
    from fal_agent.worker.context import CallContext

__all__ = ["AppRunner"]


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
        self._call, self._serve = call, serve
        self._front = Front(call, serve, tell)
        self._server: Any = None

    def run(self, target: Any, setup_function: Optional[Callable[[], Any]]) -> None:
        """Serve until SIGTERM, which ends the process when the app has been torn down.

        Args:
            target: the class of an app, or a function.
            setup_function: of the function, if it has one.

        Raises:
            BaseException: what `setup` raised.
        """
        from fal_agent.serving.served import servable
        from fal_agent.serving.server import AppServer, bind_socket

        self._server = AppServer(
            servable(target, setup_function),
            bind_socket(self._serve.path),
            on_ready=self._call.serving,
            drain_seconds=math.ceil(self._serve.app.grace),
            wrap=self._front.around,
        )
        _forget_about_what_stays()
        self._server.run()

    def swap(self, target: Any, setup_function: Optional[Callable[[], Any]], serve: Serve) -> None:
        """Let another version of the app answer from now on; waits until it does.

        What the version before had begun is finished, and it is torn down, after this has returned.

        Args:
            target: the new version.
            setup_function: of a function, if it has one.
            serve: who may use it, and its limits.

        Raises:
            BaseException: what its `setup` raised; the version before goes on then.
        """
        from fal_agent.serving.served import servable

        is_current, is_decided = threading.Event(), threading.Event()

        def became_current() -> None:
            self._front.set_rules(serve.app)
            is_current.set()
            is_decided.set()

        def ended(done: Future[None]) -> None:
            is_decided.set()
            error = done.exception()
            if is_current.is_set() and error is not None:
                from fal_agent.serving.failures import report

                report(error, "teardown() of the version before")

        done = self._server.swap(servable(target, setup_function), on_current=became_current)
        done.add_done_callback(ended)
        is_decided.wait()
        if not is_current.is_set():
            done.result()


def _forget_about_what_stays() -> None:
    """Spare the garbage collector what was imported so far, which is never garbage.

    Looking through it takes 20 ms at a time, in which no request goes on. What `setup` makes is not among it.
    """
    gc.collect()
    gc.freeze()
