"""`fal.toolkit`: files, images, downloads, repositories and caches for code that runs on a host.

Runs in workers, and in the notebook with functions that run there. Everything is defined in
`fal_agent.runtime.toolkit` and imported on first use; the names are in its `__all__`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_agent.runtime import toolkit as _toolkit

if TYPE_CHECKING:
    from pathlib import Path

    from fal_agent.runtime.toolkit import (
        Audio,
        CompressedFile,
        DownloadError,
        FalBaseModel,
        Field,
        File,
        FileTooLargeError,
        Hidden,
        Image,
        ImageSize,
        ImageSizeInput,
        ImageSizePreset,
        Video,
        clone_repository,
        download_file,
        download_model_weights,
        get_gpu_type,
        get_image_size,
        load_inductor_cache,
        sync_inductor_cache,
        synchronized_inductor_cache,
        upload_image,
    )
    from fal_notebook.toolkit import audio, compilation, file, image, pydantic, utils, video

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
    "audio",
    "clone_repository",
    "compilation",
    "download_file",
    "download_model_weights",
    "file",
    "get_gpu_type",
    "get_image_size",
    "image",
    "load_inductor_cache",
    "pydantic",
    "sync_inductor_cache",
    "synchronized_inductor_cache",
    "upload_image",
    "utils",
    "video",
]

_MODULES = ("audio", "compilation", "file", "image", "pydantic", "utils", "video")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_toolkit, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
