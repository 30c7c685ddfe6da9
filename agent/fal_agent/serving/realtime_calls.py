"""Call a handler whatever its kind: coroutines on the event loop, the rest in threads.

Runs in the worker that serves an app. Code in a thread cannot be interrupted, so whoever is cancelled
meanwhile waits for it: nothing of a connection is still running when its serving has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Optional, TypeVar

from starlette.concurrency import run_in_threadpool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

__all__ = ["call", "outputs"]

_T = TypeVar("_T")
_EXHAUSTED = object()


async def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function and give its value; one that is not asynchronous runs in a thread of the pool.

    Raises:
        Exception: what the function raised. `SystemExit` and `StopIteration` become `RuntimeError`, since
            they would end the server, or never reach the caller.
    """
    if _is_coroutine_function(function):
        value = function(*args)
    else:
        value = await _to_its_end(asyncio.ensure_future(run_in_threadpool(_guarded, function, *args)))
    return await value if inspect.isawaitable(value) else value


async def outputs(function: Callable[..., Any], *args: Any) -> AsyncGenerator[Any, None]:
    """Call a function that gives an iterator, and give its items, each made when it is asked for.

    A plain iterator is advanced in one thread of its own, with one context: what it set up there
    (torch's inference mode, a current device, a database connection) holds until its end. Close this
    generator to close the iterator.

    Raises:
        TypeError: the function gave no iterator.
        Exception: what the function or its iterator raised.
    """
    thread = _OwnThread()
    try:
        if _is_coroutine_function(function):
            produced = await function(*args)
        elif inspect.isasyncgenfunction(function):
            produced = function(*args)
        else:
            produced = await thread.run(function, *args)
            if inspect.isawaitable(produced):
                produced = await produced
        items = _items(produced, thread)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # or it would be closed some time later, its thread gone
    finally:
        thread.end()


async def _items(produced: Any, thread: _OwnThread) -> AsyncGenerator[Any, None]:
    if hasattr(produced, "__aiter__"):
        iterator = produced.__aiter__()
        try:
            async for item in iterator:
                yield item
        finally:
            if hasattr(iterator, "aclose"):
                await iterator.aclose()
    elif hasattr(produced, "__next__"):
        try:
            while (item := await thread.run(next, produced, _EXHAUSTED)) is not _EXHAUSTED:
                yield item
        finally:
            if hasattr(produced, "close"):
                await thread.run(produced.close)
    else:
        raise TypeError(f"Expected an iterator as output, got {type(produced)}")


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an instance with an asynchronous __call__
    )


class _OwnThread:
    """One thread, started when it is first used."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._executor: Optional[ThreadPoolExecutor] = None

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function there."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fal-realtime-stream")
        loop = asyncio.get_running_loop()
        return await _to_its_end(
            loop.run_in_executor(self._executor, self._context.run, _guarded, function, *args)
        )

    def end(self) -> None:
        """Let the thread end."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)


def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except (StopIteration, SystemExit) as error:
        raise RuntimeError(f"{type(error).__name__}({error}) was raised") from error


async def _to_its_end(future: asyncio.Future[_T]) -> _T:
    """Wait for what runs in a thread, also when cancelled; its error then comes before the cancellation."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        if not future.cancelled():
            future.result()
        raise
