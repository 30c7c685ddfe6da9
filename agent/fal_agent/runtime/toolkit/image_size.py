"""Sizes of pictures as people ask for them: by a name such as "landscape_4_3", or in pixels.

Runs wherever user code runs; needs pydantic.
"""

from __future__ import annotations

from typing import Any, Literal, Union

from pydantic import BaseModel, Field

__all__ = ["ImageSize", "ImageSizeInput", "ImageSizePreset", "get_image_size"]

_LARGEST = 14142  # pixels; a square of it has 200 megapixels


class ImageSize(BaseModel):
    """The size of a picture, in pixels."""

    width: int = Field(default=512, gt=0, le=_LARGEST, description="The width of the picture in pixels.")
    height: int = Field(default=512, gt=0, le=_LARGEST, description="The height of the picture in pixels.")


ImageSizePreset = Literal[
    "square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"
]
ImageSizeInput = Union[ImageSize, ImageSizePreset]  # the type of a field of an app's input

_PRESETS = {  # width, height
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}


def get_image_size(source: Any) -> ImageSize:
    """Give a size in pixels, whichever way it was asked for.

    Args:
        source: the name of a preset, or an `ImageSize`.

    Raises:
        ValueError: there is no preset of that name, or it is neither.
    """
    if isinstance(source, ImageSize):
        return source
    if not isinstance(source, str) or source not in _PRESETS:
        raise ValueError(
            f"{source!r} is no size of a picture; use an ImageSize or one of {', '.join(_PRESETS)}"
        )
    width, height = _PRESETS[source]
    return ImageSize(width=width, height=height)
