"""The names that people import from `fal.app`.

Runs in the notebook and in workers; the names are defined elsewhere.
"""

from __future__ import annotations

from fal_agent.runtime.app import App
from fal_agent.runtime.requests import RequestContext

__all__ = ["App", "RequestContext"]
