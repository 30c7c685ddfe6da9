"""The names that people import from `fal.toolkit.utils`.

Runs in workers; standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_agent.errors import DownloadError
from fal_agent.runtime import toolkit
from fal_agent.runtime.toolkit.downloads import download_file, download_model_weights
from fal_agent.runtime.toolkit.repositories import clone_repository

if TYPE_CHECKING:
    from pathlib import Path

    FAL_PERSISTENT_DIR: Path
    FAL_MODEL_WEIGHTS_DIR: Path
    FAL_REPOSITORY_DIR: Path

_FOLDERS = ("FAL_MODEL_WEIGHTS_DIR", "FAL_PERSISTENT_DIR", "FAL_REPOSITORY_DIR")

__all__ = [
    "FAL_MODEL_WEIGHTS_DIR",
    "FAL_PERSISTENT_DIR",
    "FAL_REPOSITORY_DIR",
    "DownloadError",
    "clone_repository",
    "download_file",
    "download_model_weights",
]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:  # not kept: they follow the environment
        return getattr(toolkit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
