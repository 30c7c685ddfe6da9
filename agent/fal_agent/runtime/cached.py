"""`fal.cached`: memoize a function for as long as its process lives, so that a model is loaded once.

Runs wherever user code runs; in a worker what is cached stays warm between calls, and cells and
functions of one worker share it. The store belongs to the process and is keyed by what a function
does (`fal_agent.runtime.fingerprints`), so the same definition made again, by a re-run cell or by
the next call's unpickling, finds what is there.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Optional, TypeVar, overload

from fal_agent.runtime.fingerprints import Fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Cached", "CachedEntry", "cached", "cached_entries"]

_R = TypeVar("_R")
_KEYWORDS = object()  # stands between positional and keyword arguments in a key


@dataclass(frozen=True)
class CachedEntry:
    """One value in the store."""

    name: str  # qualified name of the function
    arguments: str  # as they were written, cut to 200 characters
    seconds: float  # that making it took
    age: float  # seconds since it was made


class _Entry:
    """One value, or the making of it."""

    def __init__(self, name: str, arguments: str) -> None:
        self.name, self.arguments = name, arguments
        self.lock = threading.RLock()
        self.is_made = False
        self.value: Any = None
        self.seconds = self.made_at = 0.0


_ONCE_ONLY = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)

_store: dict[str, dict[Any, _Entry]] = {}
_store_lock = threading.Lock()


class Cached(Generic[_R]):
    """A memoized function; made by `fal.cached`.

    Attributes:
        __wrapped__: the plain function.
    """

    def __init__(self, func: Callable[..., _R]) -> None:
        if not callable(func):
            raise TypeError(f"fal.cached memoizes functions, not {type(func).__name__}")
        if any(is_one(func) for is_one in _ONCE_ONLY):
            name = getattr(func, "__qualname__", repr(func))
            raise TypeError(
                f"fal.cached cannot memoize {name}(): a coroutine or generator can be used only once. "
                "Cache the plain function that does the work and call that"
            )
        self.__name__ = self.__qualname__ = type(func).__qualname__  # for callables that have no name
        functools.update_wrapper(self, func)
        self.__wrapped__: Callable[..., _R] = func
        self._fingerprint: Optional[Fingerprint] = None

    def __call__(self, *args: Any, **kwargs: Any) -> _R:
        """Give the function's value for these arguments, made at most once in this process.

        Two first calls at the same time make it once. An exception is not kept.

        Raises:
            TypeError: an argument cannot be hashed.
        """
        value: _R = self._value(_key(args, kwargs), args, kwargs)
        return value

    def __get__(self, instance: Any, owner: Optional[type] = None) -> Any:
        return self if instance is None else _BoundCached(self, instance)

    def __reduce__(self) -> Any:
        return Cached, (self.__wrapped__,)

    def __repr__(self) -> str:
        return f"<cached function {self.__qualname__}>"

    def clear(self) -> int:
        """Forget every value of this function in this process; gives how many there were."""
        with _store_lock:
            return _count(_store.pop(self._digest(), {}))

    def _digest(self) -> str:
        known = self._fingerprint
        if known is None or not known.is_current():
            known = self._fingerprint = Fingerprint(self.__wrapped__)
        return known.digest

    def _value(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        digest = self._digest()
        while True:
            entry = _store.get(digest, {}).get(key)
            if entry is None:
                with _store_lock:
                    made = _Entry(self.__qualname__, _written(args, kwargs))
                    entry = _store.setdefault(digest, {}).setdefault(key, made)
            if entry.is_made:
                return entry.value
            if self._make(entry, digest, key, args, kwargs):
                return entry.value

    def _make(
        self, entry: _Entry, digest: str, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Make an entry's value, or wait for the thread that does; False if that one failed."""
        while not entry.lock.acquire(
            timeout=0.2
        ):  # so that an interrupt is seen while another thread makes it
            continue
        try:
            if entry.is_made:
                return True
            if _store.get(digest, {}).get(key) is not entry:
                return False
            started = time.perf_counter()
            try:
                entry.value = self.__wrapped__(*args, **kwargs)
            except BaseException:
                with _store_lock:
                    _store.get(digest, {}).pop(key, None)
                raise
            entry.seconds, entry.made_at = time.perf_counter() - started, time.time()
            entry.is_made = True
            return True
        finally:
            entry.lock.release()


class _BoundCached:
    """A memoized method of one instance, which is part of the key and stays alive with its values."""

    def __init__(self, function: Cached[Any], instance: Any) -> None:
        self.__func__, self.__self__ = function, instance
        self.__wrapped__ = function.__wrapped__
        self.__name__, self.__qualname__, self.__doc__ = (
            function.__name__,
            function.__qualname__,
            function.__doc__,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Give the method's value for these arguments."""
        full = (self.__self__, *args)
        try:
            key = _key(full, kwargs)
        except TypeError:
            key = _key((_ById(self.__self__), *args), kwargs)
        return self.__func__._value(key, full, kwargs)  # noqa: SLF001 - the other half of one class

    def clear(self) -> int:
        """Forget every value of this method, of all instances, in this process."""
        return self.__func__.clear()


class _ById:
    """An instance that cannot be hashed, told apart by its identity."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __hash__(self) -> int:
        return id(self._instance)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other._instance is self._instance


class _CachedDecorator:
    """The type of `fal.cached`."""

    @overload
    def __call__(self, func: Callable[..., _R]) -> Cached[_R]: ...

    @overload
    def __call__(self) -> Callable[[Callable[..., _R]], Cached[_R]]: ...

    def __call__(self, func: Optional[Callable[..., Any]] = None) -> Any:
        """Memoize a function for as long as the worker lives; `@fal.cached` and `@fal.cached()` both work.

        Args:
            func: a plain function or method. Its arguments must be hashable; `f(1)` and `f(x=1)` are
                kept apart, as by `functools.lru_cache`.

        Raises:
            TypeError: it is not a plain function.
        """
        return Cached if func is None else Cached(func)

    def clear(self) -> int:
        """Forget everything that is cached in this process; gives how many values there were."""
        with _store_lock:
            count = sum(_count(entries) for entries in _store.values())
            _store.clear()
            return count

    def __reduce__(self) -> str:
        return "cached"

    def __repr__(self) -> str:
        return "<function fal.cached>"


def cached_entries() -> list[CachedEntry]:
    """List what is cached in this process, oldest first."""
    with _store_lock:
        made = [entry for entries in _store.values() for entry in entries.values() if entry.is_made]
    now = time.time()
    made.sort(key=lambda entry: entry.made_at)
    return [CachedEntry(entry.name, entry.arguments, entry.seconds, now - entry.made_at) for entry in made]


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    key = (*args, _KEYWORDS, *kwargs.items()) if kwargs else args
    hash(key)
    return key


def _count(entries: dict[Any, _Entry]) -> int:
    return sum(entry.is_made for entry in list(entries.values()))


def _written(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    try:
        text = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
    except Exception:  # noqa: BLE001 - a user's __repr__ may do anything; this is for people only
        text = "..."
    return text if len(text) <= 200 else f"{text[:197]}..."  # noqa: PLR2004 - see CachedEntry


cached = _CachedDecorator()
