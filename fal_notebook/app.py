"""The names that people import from `fal.app`.

Runs in the notebook and in workers; the names are defined elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_agent.errors import AppClientError
from fal_agent.runtime.app import App
from fal_agent.runtime.requests import RequestContext

if TYPE_CHECKING:
    from fal_notebook.app_client import AppClient

__all__ = ["App", "AppClient", "AppClientError", "RequestContext"]


def __getattr__(name: str) -> Any:
    if name != "AppClient":  # which workers do not need
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fal_notebook.app_client import AppClient

    return AppClient


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
