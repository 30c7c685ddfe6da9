"""`fal.toolkit.Image`, and `upload_image` for whatever holds a picture.

Runs wherever user code runs; needs pydantic. Pillow and numpy are imported on first use.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from pydantic import Field

from fal_agent.runtime.toolkit.file import DEFAULT_REPOSITORY, File

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from typing_extensions import Self

__all__ = ["Image", "upload_image"]

_FORMATS = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp", "gif": "gif"}
_SAVED_WITH: dict[str, dict[str, Any]] = {"png": {"compress_level": 1}, "jpeg": {"quality": 95}}
_HAS_NO_ALPHA = ("jpeg",)
_DIMENSIONS = (2, 3)  # of an array: rows and columns, and perhaps channels
_CHANNELS = (1, 3, 4)


class Image(File):
    """A picture by its URL."""

    width: Optional[int] = Field(default=None, description="The width of the image in pixels.")
    height: Optional[int] = Field(default=None, description="The height of the image in pixels.")

    @classmethod
    def from_bytes(  # type: ignore[override] # pictures are told by their format
        cls,
        data: bytes,
        format: str,  # noqa: A002 - the fal SDK's name
        size: Any = None,
        file_name: Optional[str] = None,
        repository: str = DEFAULT_REPOSITORY,
        **more: Any,
    ) -> Self:
        """Make an image of an encoded picture, with a URL by which others get it.

        Args:
            data: the picture as a file holds it.
            format: "png", "jpeg", "webp" or "gif".
            size: (width, height) in pixels, or an object with these attributes; None: unknown.
            file_name: its name; default: one that is not guessed.
            repository: as `File.from_bytes`.
            more: other fields of the class.

        Raises:
            ValueError: the format or repository is unknown.
            OSError: there is no room, or the store cannot be written.
        """
        kind = _known_format(format)
        width, height = (getattr(size, "width", None), getattr(size, "height", None))
        if isinstance(size, (tuple, list)):
            width, height = size
        fields = {"width": width, "height": height, **more}
        return super().from_bytes(data, f"image/{kind}", file_name, repository, **fields)

    @classmethod
    def from_pil(
        cls,
        pil_image: PILImage,
        format: Optional[str] = None,  # noqa: A002 - the fal SDK's name
        file_name: Optional[str] = None,
        repository: str = DEFAULT_REPOSITORY,
        **more: Any,
    ) -> Self:
        """Make an image of one of Pillow's, with a URL by which others get it.

        Args:
            pil_image: the picture.
            format: "png" (compressed quickly rather than well), "jpeg" (quality 95, transparency is
                lost), "webp" or "gif". Default: the format that it was read from, else "png".
            file_name: its name; default: one that is not guessed.
            repository: as `File.from_bytes`.
            more: other fields of the class.

        Raises:
            ValueError: the format or repository is unknown.
            OSError: Pillow cannot write the picture so, or there is no room.
        """
        kind = (
            _FORMATS.get((pil_image.format or "png").lower(), "png")
            if format is None
            else _known_format(format)
        )
        if kind in _HAS_NO_ALPHA and pil_image.mode not in ("RGB", "L", "CMYK"):
            pil_image = pil_image.convert("RGB")
        buffer = io.BytesIO()
        pil_image.save(buffer, kind, **_SAVED_WITH.get(kind, {}))
        return cls.from_bytes(buffer.getvalue(), kind, pil_image.size, file_name, repository, **more)

    def to_pil(self, mode: str = "RGB") -> PILImage:
        """Fetch the picture and give it as one of Pillow's.

        Args:
            mode: of Pillow: "RGB", "RGBA", "L".

        Raises:
            DownloadError, FileTooLargeError, ValueError: as `as_bytes`.
            PIL.UnidentifiedImageError: it is no picture.
        """
        pil = _pil()
        with pil.open(io.BytesIO(self.as_bytes())) as picture:
            converted: PILImage = picture.convert(mode)
        return converted


def upload_image(image: Any, format: Optional[str] = None, **more: Any) -> str:  # noqa: A002 - as from_pil
    """Give a picture a URL by which others get it.

    Args:
        image: one of Pillow's; the bytes or the path of an encoded picture, which is given away as it is;
            or an array (numpy, or what numpy can read) of rows x columns [x 1, 3 or 4 channels]: uint8,
            bool, or floats from 0 to 1.
        format: to encode in, for what is not encoded; default as `Image.from_pil`.
        more: as `Image.from_pil`.

    Returns:
        The URL; see `File.from_bytes`.

    Raises:
        TypeError: it is nothing of that.
        ValueError: the array has another shape or type, or the format is unknown.
        FileNotFoundError: there is no such file.
        PIL.UnidentifiedImageError: the bytes are no picture.
    """
    if isinstance(image, Image):
        return image.url
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        return _encoded(path.read_bytes(), {"file_name": path.name, **more})
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _encoded(bytes(image), more)
    if not _is_of_pillow(image):
        image = _from_array(image)
    return Image.from_pil(image, format, **more).url


def _encoded(data: bytes, more: dict[str, Any]) -> str:
    with _pil().open(io.BytesIO(data)) as picture:
        kind, size = str(picture.format or "").lower(), picture.size
    if kind in _FORMATS:
        return Image.from_bytes(data, kind, size, **more).url
    return File.from_bytes(data, _pil().MIME.get(kind.upper()), **more).url


def _is_of_pillow(image: Any) -> bool:
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _from_array(array: Any) -> PILImage:
    if not hasattr(array, "__array__") and not hasattr(array, "__array_interface__"):
        raise TypeError(f"{type(array).__name__} is no picture: give a PIL image, bytes, a path or an array")
    import numpy as np

    values = np.asarray(array)
    if values.ndim not in _DIMENSIONS or (values.ndim > _DIMENSIONS[0] and values.shape[2] not in _CHANNELS):
        raise ValueError(
            f"an array of shape {values.shape} is no picture; it must be (h, w) or (h, w, 1, 3 or 4)"
        )
    if values.ndim > _DIMENSIONS[0] and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
            raise ValueError("an array of floats must be from 0 to 1; for 0 to 255 use array.astype('uint8')")
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ValueError(f"an array of {values.dtype} is no picture; use array.astype('uint8')")
    made: PILImage = _pil().fromarray(np.ascontiguousarray(values))
    return made


def _known_format(name: str) -> str:
    kind = _FORMATS.get(str(name).lower())
    if kind is None:
        raise ValueError(f"unknown format {name!r}; the formats are png, jpeg, webp and gif")
    return kind


def _pil() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("images need Pillow; add 'pillow' to the requirements") from error
    return PIL.Image
