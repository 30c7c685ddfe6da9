"""The names that people import from `fal.toolkit.image`.

Runs in workers; needs pydantic.
"""

from fal_agent.runtime.toolkit.image import Image, upload_image
from fal_agent.runtime.toolkit.image_size import ImageSize, ImageSizeInput, ImageSizePreset, get_image_size

__all__ = ["Image", "ImageSize", "ImageSizeInput", "ImageSizePreset", "get_image_size", "upload_image"]
