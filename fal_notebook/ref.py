"""`fal.ref`: how helper code reaches the app that is answering the current request.

Runs wherever an app is served.
"""

from __future__ import annotations

from fal_agent.runtime.requests import get_current_app

__all__ = ["get_current_app"]
