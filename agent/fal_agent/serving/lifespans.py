"""The life of one app in its server: made, set up, told of its end, torn down.

Runs in the process that serves an app, on its event loop. Where another app is answering meanwhile, hooks
that are not `async` run in a thread, so that they do not hold it up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import os
import threading
from contextlib import AsyncExitStack, contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from fal_agent.runtime.app import RUNNER_STATE, call_hook
from fal_agent.serving.failures import report
from fal_agent.serving.http import build_application

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from fastapi import FastAPI

    from fal_agent.runtime.app import BaseServable
    from fal_agent.serving.metrics import Metrics

__all__ = ["Life", "beside_another", "in_thread"]


class Life:
    """One app: begun once and ended once.

    Args:
        app: the app; it is not set up yet.
        metrics: where its requests are counted.

    Attributes:
        application: the ASGI application that serves it.

    Raises:
        ValueError: the app cannot be served.
    """

    def __init__(self, app: BaseServable, metrics: Metrics) -> None:
        self.application: FastAPI = build_application(app, metrics)
        self._app = app
        self._stack = AsyncExitStack()
        self._was_told = False

    async def begin(self) -> None:
        """Set the app up.

        Raises:
            BaseException: what `setup` raised; there is nothing to end then.
        """
        threads = anyio.to_thread.current_default_thread_limiter()
        threads.total_tokens = max(threads.total_tokens, getattr(self._app, "max_multiplexing", None) or 0)
        lifespan = self.application.router.lifespan_context(self.application)
        await self._stack.enter_async_context(lifespan)

    def tell(self) -> None:
        """Call `handle_exit`, once; what it raises is reported. From any thread, also by a signal."""
        if self._was_told:
            return
        self._was_told = True  # no lock: a signal handler must not wait for what it interrupted
        try:
            self._app.handle_exit()
        except Exception as error:  # noqa: BLE001 - reported; the exit goes on
            report(error, f"{type(self._app).__name__}.handle_exit()")

    async def end(self) -> None:
        """Tear the app down, once.

        Raises:
            BaseException: what `teardown` raised.
        """
        await self._stack.aclose()


@contextmanager
def beside_another() -> Iterator[None]:
    """Begin or end an app within while another one is answering."""
    before = call_hook.set(in_thread)
    try:
        yield
    finally:
        call_hook.reset(before)
        os.environ[RUNNER_STATE] = "RUNNING"  # of the runner, whatever became of this app


def in_thread(function: Callable[[], Any]) -> Coroutine[Any, Any, Any]:
    """Call a function in a thread of its own, unless it is `async`; gives what it gives.

    The thread sees the context variables of here. It is not waited for once the caller is cancelled, nor by
    the end of the process.
    """

    async def call() -> Any:
        value = function() if inspect.iscoroutinefunction(function) else await _outcome(function)
        return await value if inspect.isawaitable(value) else value

    return call()


async def _outcome(function: Callable[[], Any]) -> Any:
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()
    context = copy_context()

    def run() -> None:
        try:
            outcome.set_result(context.run(function))
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            outcome.set_exception(error)

    threading.Thread(target=run, name="fal-hook", daemon=True).start()
    return await asyncio.wrap_future(outcome)
