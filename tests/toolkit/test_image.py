"""Images: from and to Pillow, arrays, bytes and paths."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
from pydantic import BaseModel

from fal_notebook import toolkit
from fal_notebook.toolkit import File, Image, upload_image

if TYPE_CHECKING:
    from pathlib import Path

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = PIL.Image.fromarray(NOISE)


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(url: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(File(url=url).as_bytes()))


# ---------------------------------------------------------------- from Pillow


def test_a_picture_is_a_png_that_is_compressed_quickly() -> None:
    image = Image.from_pil(PICTURE)

    assert image.as_bytes() == encoded("png", compress_level=1)
    assert (image.width, image.height, image.content_type) == (30, 20, "image/png")
    assert image.file_size == len(image.as_bytes())
    assert (image.file_name or "").endswith(".png")


@pytest.mark.parametrize("name", ["jpeg", "jpg", "JPEG"])
def test_a_jpeg_has_quality_95(name: str) -> None:
    image = Image.from_pil(PICTURE, format=name)

    assert image.as_bytes() == encoded("jpeg", quality=95)
    assert image.content_type == "image/jpeg"


def test_a_picture_keeps_the_format_it_was_read_from() -> None:
    read = {kind: PIL.Image.open(io.BytesIO(encoded(kind))) for kind in ("jpeg", "webp", "bmp")}

    kinds = {kind: Image.from_pil(picture).content_type for kind, picture in read.items()}

    assert kinds == {"jpeg": "image/jpeg", "webp": "image/webp", "bmp": "image/png"}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1"])
def test_any_mode_becomes_a_jpeg(mode: str) -> None:
    assert opened(Image.from_pil(PICTURE.convert(mode), "jpeg").url).size == (30, 20)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown format 'tiff'"):
        Image.from_pil(PICTURE, "tiff")


def test_the_picture_comes_back() -> None:
    image = Image.from_pil(PICTURE)

    assert np.array_equal(np.asarray(image.to_pil()), NOISE)
    assert image.to_pil().mode == "RGB"
    assert image.to_pil(mode="L").mode == "L"


def test_what_is_no_picture_cannot_become_one() -> None:
    with pytest.raises(PIL.UnidentifiedImageError):
        Image(url="data:image/png;base64,aGk=").to_pil()


# ---------------------------------------------------------------- from bytes


@pytest.mark.parametrize("size", [(30, 20), PICTURE])
def test_bytes_have_a_format_and_perhaps_a_size(size: Any) -> None:
    image = Image.from_bytes(encoded("webp"), "webp", size=size, file_name="a.webp")

    assert (image.width, image.height, image.content_type, image.file_name) == (
        30,
        20,
        "image/webp",
        "a.webp",
    )
    assert Image.from_bytes(encoded("png"), "png").width is None


def test_a_plain_string_is_an_images_url(web: Any) -> None:
    class Request(BaseModel):
        image: Image

    url = web.gives("/a.png", encoded("png"))

    assert Request.model_validate({"image": url}).image.to_pil().size == (30, 20)


def test_in_an_app_an_image_is_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_FILES_URL", "http://127.0.0.1:1/.fal/files")

    image = Image.from_pil(PICTURE, file_name="a.png")

    assert image.url.startswith("http://127.0.0.1:1/.fal/files/")
    assert image.to_pil().size == (30, 20)
    assert Image.from_pil(PICTURE, repository="in_memory").url.startswith("data:image/png;base64,")


# ---------------------------------------------------------------- upload_image


@pytest.mark.parametrize(
    "image",
    [
        *(PICTURE, encoded("png"), bytearray(encoded("png")), memoryview(encoded("png")), NOISE),
        *((NOISE / 255).astype(np.float32), np.asfortranarray(NOISE), Image.from_pil(PICTURE)),
    ],
    ids=lambda image: type(image).__name__,
)
def test_whatever_holds_a_picture_gets_a_url(image: Any) -> None:
    url = toolkit.upload_image(image)

    assert isinstance(url, str)
    assert np.array_equal(np.asarray(opened(url)), NOISE)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_is_given_away_as_it_is(
    tmp_path: Path, as_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAL_FILES_URL", "http://127.0.0.1:1/.fal/files")
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded("jpeg", quality=10))

    url = upload_image(str(path) if as_text else path)

    assert File(url=url).as_bytes() == path.read_bytes()
    assert url.endswith("/picture.jpg")


@pytest.mark.parametrize(
    ("kind", "content_type"), [("jpeg", "image/jpeg"), ("gif", "image/gif"), ("bmp", "image/bmp")]
)
def test_encoded_bytes_stay_what_they_are(kind: str, content_type: str) -> None:
    url = upload_image(encoded(kind))

    assert url.startswith(f"data:{content_type};")
    assert File(url=url).as_bytes() == encoded(kind)


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (NOISE[:, :, 0], "L"),
        (NOISE[:, :, :1], "L"),
        (np.zeros((4, 4, 4), np.uint8), "RGBA"),
        (np.eye(4, dtype=bool), "L"),
        (np.ones((4, 4)), "L"),
    ],
)
def test_arrays_of_several_shapes_are_pictures(array: Any, mode: str) -> None:
    assert opened(upload_image(array)).mode == mode


def test_floats_and_flags_reach_from_black_to_white() -> None:
    for array in (np.eye(2), np.eye(2, dtype=bool)):
        assert np.asarray(opened(upload_image(array))).tolist() == [[255, 0], [0, 255]]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, np.uint8),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((2, 2), int),
    ],
)
def test_an_array_of_another_kind_is_refused(array: Any) -> None:
    with pytest.raises(ValueError, match="is no picture"):
        upload_image(array)


@pytest.mark.parametrize("value", [-0.1, 1.5, 200.0, np.nan, np.inf])
def test_floats_beyond_one_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        upload_image(np.full((2, 2), value))


def test_what_holds_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dict is no picture"):
        upload_image({})
    with pytest.raises(PIL.UnidentifiedImageError):
        upload_image(b"not a picture")
    with pytest.raises(FileNotFoundError):
        upload_image(tmp_path / "none.png")


def test_the_format_can_be_chosen() -> None:
    assert upload_image(NOISE, "jpeg").startswith("data:image/jpeg;")
