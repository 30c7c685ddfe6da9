"""Which app a server serves, and how another one takes its place.

Runs in the process that serves an app. At any time one app is current; it is set up, and it is torn down
when it has answered everything, also if others have come after it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import FalServerlessError
from fal_agent.serving.exchange import Exchange
from fal_agent.serving.lifespans import Life, beside_another, in_thread
from fal_agent.serving.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from fal_agent.runtime.app import BaseServable

__all__ = ["Tenancy"]


def _nothing() -> None:
    return None


class Tenancy:
    """The current app of a server, and those before it that have not ended.

    Args:
        app: the first one.
        drain_seconds: an app's requests in flight are cancelled so long after it was replaced; None: they are
            waited for.

    Attributes:
        application: the ASGI application that has the current app answer.
        metrics: the counts of all apps together.

    Raises:
        ValueError: the app cannot be served.
    """

    def __init__(self, app: BaseServable, drain_seconds: Optional[float] = None) -> None:
        self.metrics = Metrics()
        self._current = Life(app, self.metrics)
        self.application = Exchange(self._current.application)
        self._drain_seconds = drain_seconds
        self._gate = threading.Lock()  # before `_loop`, which other threads read
        self._loop: Optional[asyncio.AbstractEventLoop] = None  # while apps may be swapped
        self._swaps: set[asyncio.Task[Any]] = set()
        self._beginning: set[asyncio.Task[Any]] = set()  # those of them whose app is not current yet
        self._is_ending = False

    @asynccontextmanager
    async def lasting(self, is_hurried: Callable[[], bool]) -> AsyncIterator[None]:
        """Set the first app up, serve in the body, end whatever app is there then.

        Args:
            is_hurried: says at the end of the body whether requests in flight are to be given up.
        """
        await self._current.begin()
        try:
            yield
        finally:
            try:
                await self._end_swaps(is_hurried=is_hurried())
            finally:
                await self._current.end()

    def open(self) -> None:
        """Allow swaps from now on; called on the event loop."""
        self._turn = asyncio.Lock()  # one app at a time takes over
        with self._gate:
            self._loop = asyncio.get_running_loop()

    def tell(self) -> None:
        """Tell the current app of its end; none takes its place any more. From any thread."""
        self._is_ending = True
        self._current.tell()

    def swap(
        self, app: BaseServable, on_current: Callable[[], None] = _nothing
    ) -> concurrent.futures.Future[None]:
        """Put an app in place of the current one; see `AppServer.swap`."""
        with self._gate:
            if self._loop is not None and not self._is_ending:
                return asyncio.run_coroutine_threadsafe(self._swap(app, on_current), self._loop)
        refused: concurrent.futures.Future[None] = concurrent.futures.Future()
        refused.set_exception(_not_serving(app))
        return refused

    async def _swap(self, app: BaseServable, on_current: Callable[[], None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._swaps.add(task)
        task.add_done_callback(self._swaps.discard)
        self._beginning.add(task)
        try:
            async with self._turn:
                new = await self._begun(app)
                old, self._current = self._current, new
                emptied = self.application.swap(new.application, patience=self._drain_seconds)
                on_current()
        except (asyncio.CancelledError, SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, asyncio.CancelledError) and not self._is_ending:
                raise  # whoever has the future changed their mind
            raise _not_serving(app) if self._is_ending else _gave_up(app, error) from error
        finally:
            self._beginning.discard(task)
        try:
            old.tell()
            await emptied
        finally:
            with beside_another():
                await old.end()

    async def _begun(self, app: BaseServable) -> Life:
        """Set an app up beside the current one."""
        if self._is_ending:
            raise _not_serving(app)
        new: Life = await in_thread(lambda: Life(app, self.metrics))
        with beside_another():
            await new.begin()
            if self._is_ending:
                await new.end()
                raise _not_serving(app)
        return new

    async def _end_swaps(self, *, is_hurried: bool) -> None:
        self._is_ending = True
        with self._gate:
            self._loop = None
        for _ in range(2):  # what other threads have just begun gets to where it can be cancelled
            await asyncio.sleep(0)
        for task in list(self._swaps if is_hurried else self._beginning):
            task.cancel()
        if self._swaps:
            await asyncio.wait(set(self._swaps))


def _not_serving(app: BaseServable) -> FalServerlessError:
    return FalServerlessError(
        f"{type(app).__name__} cannot take over: the server is not serving, or has begun to end. "
        "Spawn it anew."
    )


def _gave_up(app: BaseServable, error: BaseException) -> FalServerlessError:
    return FalServerlessError(
        f"setup() of {type(app).__name__} ended with {type(error).__name__}({error}); the app before it stays"
    )
