"""One check per sort of value that an option may have.

Runs in the notebook. Each check takes the name of an option and the value given for it, and returns
the value in its plain form (copied, so that later changes by the caller have no effect) or raises a
ValueError that names the option and the value.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fal_agent.runtime.routes import HealthCheckConfig

__all__ = [
    "Check",
    "anything",
    "flag",
    "function",
    "health_check",
    "host",
    "listed",
    "machine_type",
    "mapping",
    "one_of",
    "path",
    "paths",
    "patterns",
    "python_version",
    "requirements",
    "seconds",
    "some_of",
    "strings",
    "text",
    "whole",
]

Check = Callable[[str, Any], Any]

_PYTHON_VERSION = re.compile(r"[0-9]+\.[0-9]+(\.[0-9]+)?")


def listed(names: Sequence[str]) -> str:
    """Give names, quoted, for a message."""
    return ", ".join(repr(name) for name in names)


def anything(_: str, value: Any) -> Any:
    """Accept every value."""
    return value


def flag(name: str, value: Any) -> bool:
    """Accept True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}.")
    return value


def text(name: str, value: Any) -> str:
    """Accept a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a string with something in it, not {value!r}.")
    return value


def one_of(choices: Sequence[str]) -> Check:
    """Accept one of some strings."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {listed(choices)}, not {value!r}.")
        return value

    return check


def some_of(choices: Sequence[str]) -> Check:
    """Accept a list of some strings."""

    def check(name: str, value: Any) -> list[str]:
        for item in strings(name, value):
            if item not in choices:
                raise ValueError(f"{name} may hold {listed(choices)}, not {item!r}.")
        return list(value)

    return check


def strings(name: str, value: Any) -> list[str]:
    """Accept a list of strings."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of strings, not {value!r}.")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise ValueError(f"{name} must be a list of strings; item {index} is {item!r}.")
    return list(value)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Accept a dictionary."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dictionary, not {value!r}.")
    return dict(value)


def function(name: str, value: Any) -> Any:
    """Accept what can be called."""
    if not callable(value):
        raise ValueError(f"{name} must be a function without arguments, not {value!r}.")
    return value


def health_check(name: str, value: Any) -> HealthCheckConfig:
    """Accept a health check: a `HealthCheckConfig`, or a dictionary of its fields, `path` among them."""
    if isinstance(value, HealthCheckConfig):
        return value
    try:
        config = HealthCheckConfig(**value)
    except TypeError:
        fields = listed([field.name for field in dataclasses.fields(HealthCheckConfig)])
        raise ValueError(f"{name} must be a dictionary with some of {fields}, not {value!r}.") from None
    if not isinstance(config.path, str) or not config.path.startswith("/"):
        raise ValueError(f"{name} must have a path that begins with a slash, not {config.path!r}.")
    return config


def whole(least: int, most: int | None = None) -> Check:
    """Accept whole numbers, NumPy's too, within bounds."""
    bounds = f"at least {least}" if most is None else f"from {least} to {most}"

    def check(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} must be a whole number, not {value!r}.") from None
        if isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, not {value!r}.")
        if number < least or (most is not None and number > most):
            raise ValueError(f"{name} must be {bounds}, not {value!r}.")
        return number

    return check


def seconds(*, positive: bool) -> Check:
    """Accept a finite number of seconds, 0 only if not `positive`."""
    bounds = "more than 0" if positive else "0 or more"

    def check(name: str, value: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number of seconds, not {value!r}.")
        if value < 0 or (positive and value == 0):
            raise ValueError(f"{name} must be {bounds} seconds, not {value!r}.")
        return float(value)

    return check


def host(name: str, value: Any) -> Any:
    """Accept a host or the name of one."""
    if isinstance(value, str):
        return text(name, value)
    if not callable(getattr(value, "submit", None)):
        raise ValueError(f"{name} must be a host or the name of one, not {value!r}.")
    return value


def requirements(name: str, value: Any) -> list[str] | list[list[str]]:
    """Accept requirement lines, or lists of them that are installed in steps."""
    if isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(isinstance(step, list) and all(isinstance(item, str) for item in step) for step in value):
            return [list(step) for step in value]
    raise ValueError(f"{name} must be a list of strings or a list of lists of strings.")


def python_version(name: str, value: Any) -> str:
    """Accept "X.Y" and "X.Y.Z"; a float would make 3.1 of 3.10."""
    if not isinstance(value, str) or not _PYTHON_VERSION.fullmatch(value):
        raise ValueError(f'{name} must be a string such as "3.11", not {value!r}.')
    return value


def machine_type(name: str, value: Any) -> str | list[str]:
    """Accept the name of a machine type, or several to be tried in order."""
    types = [value] if isinstance(value, str) else value
    if not isinstance(types, list) or not types or not all(isinstance(t, str) and t.strip() for t in types):
        raise ValueError(f"{name} must be a machine type or a list of them, not {value!r}.")
    return value if isinstance(value, str) else list(value)


def path(name: str, value: Any) -> str:
    """Accept a path as a string or a `Path`."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"{name} must be a path, not {value!r}.")
    return str(value)


def paths(name: str, value: Any) -> list[str]:
    """Accept a list of paths."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of paths, not {value!r}.")
    return [path(f"item {index} of {name}", item) for index, item in enumerate(value)]


def patterns(name: str, value: Any) -> list[str]:
    """Accept a list of regular expressions."""
    return [_pattern(name, item) for item in strings(name, value)]


def _pattern(name: str, value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}: {value!r} is not a regular expression: {error}.") from None
    return value
