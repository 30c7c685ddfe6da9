"""Find what makes a value impossible to pickle, and name the way to it.

Runs in the notebook and in workers, only after pickling has failed. The search tries the parts of
the value one by one and goes down into the first that fails; its effort is bounded, so a very large
value may be blamed less precisely.
"""

from __future__ import annotations

import time
import types
from typing import TYPE_CHECKING, Any

from fal_agent.bytecode import facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["captured", "children", "explain"]

_MAX_TRIES = 400
_MAX_SECONDS = 2.0
_MAX_DEPTH = 12
_MAX_SIBLINGS = 200


def explain(value: Any, error: BaseException, try_pickle: Callable[[Any], None], name: str = "") -> str:
    """Say which part of a value cannot be pickled, and why.

    Args:
        value: what could not be pickled.
        error: what was raised then.
        try_pickle: raises if its argument cannot be pickled.
        name: what the value is called, the beginning of the path.

    Returns:
        "x['lock'].conn: cannot pickle 'socket' object"; just the reason when no part is to blame.
    """
    search = _Search(try_pickle)
    path, culprit = search.descend(value, name, error)
    reason = _reason(culprit)
    return f"{path.lstrip('.')}: {reason}" if path else reason


class _Search:
    """One search with its budget."""

    def __init__(self, try_pickle: Callable[[Any], None]) -> None:
        self._try_pickle = try_pickle
        self._tries = _MAX_TRIES
        self._end = time.monotonic() + _MAX_SECONDS
        self._seen: set[int] = set()

    def descend(
        self, value: Any, path: str, error: BaseException, depth: int = 0
    ) -> tuple[str, BaseException]:
        """Give the path to the deepest part that fails, and how it fails."""
        if depth >= _MAX_DEPTH or id(value) in self._seen:
            return path, error
        self._seen.add(id(value))
        for step, child in children(value):
            if self._tries <= 0 or time.monotonic() > self._end:
                break
            self._tries -= 1
            try:
                self._try_pickle(child)
            except Exception as problem:  # noqa: BLE001 - pickling runs the user's code
                if id(child) not in self._seen:
                    return self.descend(child, path + step, problem, depth + 1)
        return path, error


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Give the parts that pickling a value would pickle, each with how to write the way to it."""
    if isinstance(value, dict):
        for key, item in list(value.items())[:_MAX_SIBLINGS]:
            yield f"[{_short(key)}]", item
            yield f" key {_short(key)}", key
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value[:_MAX_SIBLINGS]):
            yield f"[{index}]", item
    elif isinstance(value, (set, frozenset)):
        for item in list(value)[:_MAX_SIBLINGS]:
            yield f" item {_short(item)}", item
    elif isinstance(value, types.FunctionType):
        yield from captured(value)
    elif isinstance(value, types.MethodType):
        yield " of", value.__self__
        yield "", value.__func__
    elif isinstance(value, type):
        yield from _of_class(value)
    else:
        yield from _of_instance(value)


def _of_class(cls: type) -> Iterator[tuple[str, Any]]:
    for name, item in list(vars(cls).items()):
        if isinstance(item, (staticmethod, classmethod)):
            yield f".{name}", item.__func__
        elif not isinstance(item, (types.GetSetDescriptorType, types.MemberDescriptorType)):
            yield f".{name}", item


def captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give the values that a function takes along: closure, globals, defaults."""
    for index, cell in enumerate(function.__closure__ or ()):
        contents = _contents(cell)
        if contents:
            yield f" -> {function.__code__.co_freevars[index]}", contents[0]
    for name in facts(function.__code__).globals:
        if name in function.__globals__:
            yield f" -> {name}", function.__globals__[name]
    for index, item in enumerate(function.__defaults__ or ()):
        yield f" default {index + 1}", item
    for name, item in (function.__kwdefaults__ or {}).items():
        yield f" default of {name}", item
    for name, item in vars(function).items():
        yield f".{name}", item


def _contents(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not bound yet
        return []


def _of_instance(value: Any) -> Iterator[tuple[str, Any]]:
    if _refuses(value):
        return
    wrapped = getattr(value, "__wrapped__", None)
    if isinstance(wrapped, types.FunctionType):
        yield "", wrapped
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for name, item in list(attributes.items())[:_MAX_SIBLINGS]:
            yield f".{name}", item
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)


def _refuses(value: Any) -> bool:
    """Whether it is its class's own word that it cannot be pickled, whatever its parts are."""
    if not any("__reduce__" in vars(cls) for cls in type(value).__mro__ if cls is not object):
        return False
    try:
        value.__reduce__()
    except Exception:  # noqa: BLE001 - runs the user's code
        return True
    return False


def _short(key: Any) -> str:
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 - a user's __repr__ may do anything
        return f"<{type(key).__name__}>"
    return text if len(text) <= 40 else f"{text[:37]}..."  # noqa: PLR2004 - fits a line


def _reason(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a user's __str__ may do anything
        text = ""
    if text.lower().startswith(("cannot", "can't", "could not")):
        return text
    return f"{type(error).__name__}: {text}"
