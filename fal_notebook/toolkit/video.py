"""The name that people import from `fal.toolkit.video`.

Runs in workers; needs pydantic.
"""

from fal_agent.runtime.toolkit.file import Video

__all__ = ["Video"]
