"""The parameters of a handler, with annotations that are strings resolved as far as they can be.

Runs in the process that serves an app. FastAPI resolves annotations in the module of the function that
it is given; a function that stands for a handler must therefore have them resolved already.
"""

from __future__ import annotations

import inspect
import types
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["resolved_parameters"]


def resolved_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Give a function's parameters by name; an annotation that cannot be resolved stays a string."""
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    return {
        name: parameter.replace(annotation=_resolved(parameter.annotation, namespace))
        for name, parameter in inspect.signature(function).parameters.items()
    }


def _resolved(annotation: Any, namespace: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, namespace, include_extras=True)["it"]
    except (NameError, SyntaxError, TypeError, AttributeError):
        return annotation  # FastAPI has the last word on it
