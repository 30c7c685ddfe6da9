"""The names that people import from `fal.toolkit.image`.

Runs in workers; needs pydantic.
"""

from fal_agent.runtime.toolkit.image import Image, upload_image

__all__ = ["Image", "upload_image"]
