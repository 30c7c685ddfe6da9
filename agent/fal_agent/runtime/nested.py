"""A function made by `fal.function`, as other user code on a host finds it: its calls run right there.

Runs wherever user code runs. A decorated function that another one uses travels as this; there is no
second trip, and the first function's environment must have what both need.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Optional

from fal_agent import calling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["NestedFunction"]


class NestedFunction:
    """A function whose calls run in this process.

    Args:
        raw_func: the plain function.
        setup_function: makes the first argument of every call, once.
    """

    def __init__(
        self, raw_func: Callable[..., Any], setup_function: Optional[Callable[[], Any]] = None
    ) -> None:
        self.__name__ = self.__qualname__ = type(raw_func).__qualname__  # for callables that have no name
        functools.update_wrapper(self, raw_func)
        self.raw_func = raw_func
        self._setup_function = setup_function
        self._first: Optional[tuple[Any, ...]] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function here; a coroutine is run to its end."""
        return calling.complete(self._start(args, kwargs))

    run_local = __call__

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run the function here and now; gives a future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(self(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it belongs to the future
            future.set_exception(error)
        return future

    spawn = submit

    def aio(self, *args: Any, **kwargs: Any) -> Any:
        """Give an awaitable of the value; for a generator function, an asynchronous iterator."""
        value = self._start(args, kwargs)
        if hasattr(value, "__aiter__"):
            return value
        return _items(value) if hasattr(value, "__next__") else _value(value)

    def map(self, *iterables: Iterable[Any], **_how: Any) -> Iterator[Any]:
        """Give the value for each item, in order."""
        return map(self, *iterables)

    def on(self, *_host: Any, **_config: Any) -> NestedFunction:
        """Give this function: what is on a host already stays there."""
        return self

    def __get__(self, instance: Any, owner: Optional[type] = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __reduce__(self) -> Any:
        return NestedFunction, (self.raw_func, self._setup_function)

    def __repr__(self) -> str:
        return f"<fal function {self.__qualname__}, which runs here>"

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._first is None:
            self._first = () if self._setup_function is None else (self._setup_function(),)
        return self.raw_func(*self._first, *args, **kwargs)


async def _value(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value


async def _items(items: Any) -> Any:
    for item in items:
        yield item
