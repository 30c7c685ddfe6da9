"""The names that people import from `fal.api`.

Runs in the notebook. Each is defined elsewhere; those that need more than the standard library's
imports are found on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fal_agent.errors import (
    FalMissingDependencyError,
    FalSerializationError,
    FalServerlessError,
    FalServerlessException,
    UserFunctionException,
)
from fal_notebook.options import FAL_KEEP_ALIVE, FunctionOptions, Options

if TYPE_CHECKING:
    from fal_agent.runtime.cached import cached
    from fal_agent.runtime.routes import RouteSignature
    from fal_notebook.functions import Function as IsolatedFunction
    from fal_notebook.functions import function
    from fal_notebook.hosts.local import LocalHost

__all__ = [
    "FAL_KEEP_ALIVE",
    "FalMissingDependencyError",
    "FalSerializationError",
    "FalServerlessError",
    "FalServerlessException",
    "FunctionOptions",
    "IsolatedFunction",
    "LocalHost",
    "Options",
    "RouteSignature",
    "UserFunctionException",
    "cached",
    "function",
]

_ELSEWHERE = {
    "IsolatedFunction": ("fal_notebook.functions", "Function"),
    "LocalHost": ("fal_notebook.hosts.local", "LocalHost"),
    "RouteSignature": ("fal_agent.runtime.routes", "RouteSignature"),
    "cached": ("fal_agent.runtime.cached", "cached"),
    "function": ("fal_notebook.functions", "function"),
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ELSEWHERE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
