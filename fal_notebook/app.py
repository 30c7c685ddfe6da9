"""The names that people import from `fal.app`.

Runs in the notebook and in workers; the names are defined elsewhere.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fal_agent.errors import AppClientError
from fal_agent.runtime.requests import RequestContext

if TYPE_CHECKING:
    from fal_agent.runtime.app import App
    from fal_agent.runtime.realtime import realtime
    from fal_agent.runtime.routes import endpoint
    from fal_notebook.app_client import AppClient
    from fal_notebook.spawned import AppSpawnInfo
    from fal_notebook.wrapping import wrap_app

__all__ = [
    "App",
    "AppClient",
    "AppClientError",
    "AppSpawnInfo",
    "RequestContext",
    "endpoint",
    "realtime",
    "wrap_app",
]

_ELSEWHERE = {
    "App": "fal_notebook",  # where it learns how to be spawned
    "AppClient": "fal_notebook.app_client",
    "AppSpawnInfo": "fal_notebook.spawned",
    "endpoint": "fal_agent.runtime.routes",
    "realtime": "fal_agent.runtime.realtime",
    "wrap_app": "fal_notebook.wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:  # those that workers do not need
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
