"""Sizes of pictures by name and in pixels."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from fal_notebook.toolkit import ImageSize, ImageSizeInput, get_image_size


class Input(BaseModel):
    size: ImageSizeInput = "landscape_4_3"


@pytest.mark.parametrize(
    ("asked", "width", "height"),
    [
        ("square_hd", 1024, 1024),
        ("square", 512, 512),
        ("portrait_4_3", 768, 1024),
        ("portrait_16_9", 576, 1024),
        ("landscape_4_3", 1024, 768),
        ("landscape_16_9", 1024, 576),
        ({"width": 640, "height": 480}, 640, 480),
        ({"width": 640}, 640, 512),
    ],
)
def test_a_size_is_a_name_or_pixels(asked: object, width: int, height: int) -> None:
    found = get_image_size(Input.model_validate({"size": asked}).size)

    assert (found.width, found.height) == (width, height)


@pytest.mark.parametrize("asked", ["huge", {"width": 0}, {"height": 20000}, 512])
def test_what_is_no_size_is_refused_by_the_model(asked: object) -> None:
    with pytest.raises(ValidationError):
        Input.model_validate({"size": asked})


@pytest.mark.parametrize("asked", ["huge", 512, None])
def test_what_is_no_size_is_refused_by_the_function(asked: object) -> None:
    with pytest.raises(ValueError, match="use an ImageSize or one of square_hd"):
        get_image_size(asked)


def test_a_size_stays_itself() -> None:
    size = ImageSize(width=3, height=4)

    assert get_image_size(size) is size
