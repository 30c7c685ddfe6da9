"""The quickest event loop and reader of HTTP that the environment has.

Runs in the process that serves an app, or the gateway of one. An app's environment on a host always has
uvloop and httptools; a notebook that serves an app itself may not.
"""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["http_protocol", "run"]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end as `asyncio.run` does, on uvloop's event loop if that is installed.

    Where `nest_asyncio` is installed it is asyncio's own, since uvloop's cannot be entered again.
    """
    if _has("uvloop") and not _has("nest_asyncio"):
        import uvloop

        uvloop.run(coroutine)
    else:
        asyncio.run(coroutine)


def http_protocol() -> Any:
    """Give what uvicorn is to read HTTP with; without httptools that is its own choice, h11."""
    if not _has("httptools"):
        return "auto"
    from fal_agent.serving.corked import CorkedProtocol

    return CorkedProtocol


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
