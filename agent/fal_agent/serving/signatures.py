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

__all__ = ["as_function", "resolved_parameters", "return_annotation"]


def as_function(method: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function for a bound method of any kind; one that `fal.cached` made hides its signature."""
    if inspect.isroutine(method):
        return method
    wrapped = inspect.unwrap(method)
    takes_self = inspect.isfunction(wrapped) and getattr(method, "__self__", None) is not None

    def call(**given: Any) -> Any:
        return method(**given)

    parameters = list(resolved_parameters(wrapped).values())[1 if takes_self else 0 :]
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined] # what FastAPI reads
        parameters, return_annotation=return_annotation(wrapped)
    )
    call.__name__ = getattr(method, "__name__", type(method).__name__)
    call.__doc__ = getattr(method, "__doc__", None)
    return call


def resolved_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Give a function's parameters by name; an annotation that cannot be resolved stays a string."""
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    return {
        name: parameter.replace(annotation=_resolved(parameter.annotation, namespace))
        for name, parameter in inspect.signature(function).parameters.items()
    }


def return_annotation(function: Callable[..., Any]) -> Any:
    """Give what a function says it returns; `inspect.Signature.empty` if it does not say.

    An annotation that cannot be resolved stays a string.
    """
    function = inspect.unwrap(function)
    return _resolved(inspect.signature(function).return_annotation, getattr(function, "__globals__", {}))


def _resolved(annotation: Any, namespace: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, namespace, include_extras=True)["it"]
    except (NameError, SyntaxError, TypeError, AttributeError):
        return annotation  # FastAPI has the last word on it
