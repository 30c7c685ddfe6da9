"""The parameters of a handler, with annotations that are strings resolved as far as they can be.

Runs in the process that serves an app, and where one is sent from. FastAPI resolves annotations in the
module of the function that it is given; a function that stands for a handler must therefore have them
resolved already.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fal_agent.runtime.routes import marked_methods

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["as_function", "resolved_annotations", "resolved_parameters", "return_annotation"]


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


@contextmanager
def resolved_annotations(served: Any) -> Iterator[None]:
    """Have what the annotations of what is served name in place of their texts, within.

    A function that travels takes along the globals that its code names; annotations that are strings, as
    after `from __future__ import annotations`, name globals that the code does not.

    Args:
        served: a function, or a class: then its routes are meant. So is what either depends on
            (`fastapi.Depends`), and so on.
    """
    routes = marked_methods(served) if isinstance(served, type) else ()
    todo = [method.function for method in routes] or [served]
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    seen = set()
    while todo:
        function = inspect.unwrap(todo.pop())
        names = getattr(function, "__annotations__", None)
        if not isinstance(names, dict) or id(function) in seen:
            continue
        seen.add(id(function))
        if any(isinstance(value, str) for value in names.values()):
            before.append((names, dict(names)))
            namespace = getattr(function, "__globals__", {})
            names.update({name: _resolved(value, namespace) for name, value in names.items()})
        todo += _dependencies(function)
    try:
        yield
    finally:
        for names, texts in before:
            names.update(texts)


def _dependencies(function: Any) -> list[Any]:
    """Give the functions that FastAPI calls for the parameters of one."""
    params = sys.modules.get("fastapi.params")
    if params is None or not inspect.isfunction(function):
        return []  # nobody has said `Depends` in this process
    return [
        _code_of(item.dependency or getattr(annotation, "__origin__", annotation))
        for parameter in inspect.signature(function).parameters.values()
        for annotation in (parameter.annotation,)
        for item in (parameter.default, *getattr(annotation, "__metadata__", ()))
        if isinstance(item, params.Depends)
    ]


def _code_of(dependency: Any) -> Any:
    """Give the function that runs when a dependency is called."""
    if isinstance(dependency, type):
        return vars(dependency).get("__init__", dependency)
    if inspect.isroutine(dependency):
        return dependency
    return vars(type(dependency)).get("__call__", dependency)


def _resolved(annotation: Any, namespace: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, namespace, include_extras=True)["it"]
    except (NameError, SyntaxError, TypeError, AttributeError):
        return annotation  # FastAPI has the last word on it
