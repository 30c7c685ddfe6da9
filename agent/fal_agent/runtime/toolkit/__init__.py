"""`fal.toolkit`: files, images, downloads, repositories and caches for code that runs on a host.

Runs wherever user code runs. Importing it costs the standard library alone: whatever needs pydantic or
Pillow is imported when its name is first used. The folders are worked out each time they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fal_agent.errors import DownloadError, FileTooLargeError
    from fal_agent.runtime.toolkit.downloads import download_file, download_model_weights
    from fal_agent.runtime.toolkit.file import Audio, CompressedFile, File, Video
    from fal_agent.runtime.toolkit.gpu import get_gpu_type
    from fal_agent.runtime.toolkit.image import Image, upload_image
    from fal_agent.runtime.toolkit.image_size import (
        ImageSize,
        ImageSizeInput,
        ImageSizePreset,
        get_image_size,
    )
    from fal_agent.runtime.toolkit.inductor import (
        load_inductor_cache,
        sync_inductor_cache,
        synchronized_inductor_cache,
    )
    from fal_agent.runtime.toolkit.model import FalBaseModel, Field, Hidden
    from fal_agent.runtime.toolkit.repositories import clone_repository

    FAL_PERSISTENT_DIR: Path
    FAL_MODEL_WEIGHTS_DIR: Path
    FAL_REPOSITORY_DIR: Path

__all__ = [
    "FAL_MODEL_WEIGHTS_DIR",
    "FAL_PERSISTENT_DIR",
    "FAL_REPOSITORY_DIR",
    "Audio",
    "CompressedFile",
    "DownloadError",
    "FalBaseModel",
    "Field",
    "File",
    "FileTooLargeError",
    "Hidden",
    "Image",
    "ImageSize",
    "ImageSizeInput",
    "ImageSizePreset",
    "Video",
    "clone_repository",
    "download_file",
    "download_model_weights",
    "get_gpu_type",
    "get_image_size",
    "load_inductor_cache",
    "sync_inductor_cache",
    "synchronized_inductor_cache",
    "upload_image",
]

_HOME = {
    "Audio": "fal_agent.runtime.toolkit.file",
    "CompressedFile": "fal_agent.runtime.toolkit.file",
    "DownloadError": "fal_agent.errors",
    "FalBaseModel": "fal_agent.runtime.toolkit.model",
    "Field": "fal_agent.runtime.toolkit.model",
    "File": "fal_agent.runtime.toolkit.file",
    "FileTooLargeError": "fal_agent.errors",
    "Hidden": "fal_agent.runtime.toolkit.model",
    "Image": "fal_agent.runtime.toolkit.image",
    "ImageSize": "fal_agent.runtime.toolkit.image_size",
    "ImageSizeInput": "fal_agent.runtime.toolkit.image_size",
    "ImageSizePreset": "fal_agent.runtime.toolkit.image_size",
    "Video": "fal_agent.runtime.toolkit.file",
    "clone_repository": "fal_agent.runtime.toolkit.repositories",
    "download_file": "fal_agent.runtime.toolkit.downloads",
    "download_model_weights": "fal_agent.runtime.toolkit.downloads",
    "get_gpu_type": "fal_agent.runtime.toolkit.gpu",
    "get_image_size": "fal_agent.runtime.toolkit.image_size",
    "load_inductor_cache": "fal_agent.runtime.toolkit.inductor",
    "sync_inductor_cache": "fal_agent.runtime.toolkit.inductor",
    "synchronized_inductor_cache": "fal_agent.runtime.toolkit.inductor",
    "upload_image": "fal_agent.runtime.toolkit.image",
}
_FOLDERS = ("FAL_MODEL_WEIGHTS_DIR", "FAL_PERSISTENT_DIR", "FAL_REPOSITORY_DIR")


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:  # not kept: they follow the environment
        return getattr(importlib.import_module("fal_agent.runtime.toolkit.directories"), name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
