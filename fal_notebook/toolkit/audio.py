"""The name that people import from `fal.toolkit.audio`.

Runs in workers; needs pydantic.
"""

from fal_agent.runtime.toolkit.file import Audio

__all__ = ["Audio"]
