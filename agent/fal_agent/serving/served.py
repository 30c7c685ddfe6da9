"""A function as something that can be served: one route, at `/`, whose body is the function.

Runs in the process that serves it: a runner, or whichever process calls `run_local()`.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.runtime.app import BaseServable
from fal_agent.runtime.routes import RouteSignature
from fal_agent.serving.signatures import resolved_parameters, return_annotation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["ServedFunction", "servable"]


class ServedFunction(BaseServable):
    """Serves a function.

    Args:
        function: what answers each request, given the request's parameters.
        setup_function: runs once, before the first request; its value becomes the first argument.

    Attributes:
        app_name: the function's name.
    """

    def __init__(
        self, function: Callable[..., Any], setup_function: Optional[Callable[[], Any]] = None
    ) -> None:
        self.app_name = getattr(function, "__name__", type(function).__name__)
        self._function, self._setup_function = function, setup_function
        self._first: tuple[Any, ...] = ()

    def setup(self) -> Any:
        """Run the setup function."""
        if self._setup_function is None:
            return None
        value = self._setup_function()
        if inspect.isawaitable(value):
            return self._keep(value)
        self._first = (value,)
        return None

    async def _keep(self, value: Awaitable[Any]) -> None:
        self._first = (await value,)

    def collect_routes(self) -> dict[RouteSignature, Callable[..., Any]]:
        """Give the one route: the function, without the parameter that the setup function's value fills."""
        return {RouteSignature("/"): self._handler()}

    def _handler(self) -> Callable[..., Any]:
        if self._setup_function is None and inspect.isfunction(self._function):
            return self._function
        function = self._function

        def call(*args: Any, **given: Any) -> Any:
            return function(*self._first, *args, **given)

        async def call_async(*args: Any, **given: Any) -> Any:
            return await function(*self._first, *args, **given)

        handler: Any = call_async if inspect.iscoroutinefunction(inspect.unwrap(function)) else call
        handler = functools.update_wrapper(handler, function)
        del handler.__wrapped__  # its signature is another one
        taken = 0 if self._setup_function is None else 1
        parameters = list(resolved_parameters(function).values())[taken:]
        handler.__signature__ = inspect.Signature(parameters, return_annotation=return_annotation(function))
        return handler  # type: ignore[no-any-return]


def servable(target: Any, setup_function: Optional[Callable[[], Any]] = None) -> BaseServable:
    """Give what a server serves for what was sent: the class of an app, or a function and its setup."""
    if isinstance(target, type) and issubclass(target, BaseServable):
        return target(_allow_init=True)  # type: ignore[call-arg] # as `App` takes it
    return ServedFunction(target, setup_function)
