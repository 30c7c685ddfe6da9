"""What `fal.toolkit` offers, what importing it costs, and where its folders are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fal_notebook as fal
from fal_agent.runtime import toolkit

if TYPE_CHECKING:
    from types import ModuleType

NAMES = [
    *("Audio", "CompressedFile", "DownloadError", "FAL_MODEL_WEIGHTS_DIR", "FAL_PERSISTENT_DIR"),
    *(
        "FAL_REPOSITORY_DIR",
        "File",
        "FileTooLargeError",
        "Image",
        "Video",
        "clone_repository",
        "download_file",
    ),
    *("download_model_weights", "get_gpu_type", "load_inductor_cache", "sync_inductor_cache"),
    *("synchronized_inductor_cache", "upload_image"),
    *("ImageSize", "ImageSizeInput", "ImageSizePreset", "get_image_size", "FalBaseModel", "Field", "Hidden"),
]

MODULES = ("audio", "compilation", "file", "image", "pydantic", "utils", "video")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_the_same_in_both_packages(name: str) -> None:
    assert getattr(fal.toolkit, name) == getattr(toolkit, name)
    assert name in fal.toolkit.__all__
    assert name in dir(fal.toolkit)


def test_nothing_else_is_offered() -> None:
    assert sorted(toolkit.__all__) == sorted(NAMES)
    assert sorted(fal.toolkit.__all__) == sorted([*NAMES, *MODULES])


@pytest.mark.parametrize("module", [toolkit, fal.toolkit])
def test_an_unknown_name_is_an_attribute_error(module: ModuleType) -> None:
    with pytest.raises(AttributeError, match="no attribute 'KVStore'"):
        _ = module.KVStore


def test_the_submodules_are_those_that_people_import(data: Path) -> None:
    from fal_notebook.toolkit.file import CompressedFile, File
    from fal_notebook.toolkit.image import Image, ImageSize, get_image_size, upload_image
    from fal_notebook.toolkit.utils import (
        FAL_PERSISTENT_DIR,
        clone_repository,
        download_file,
        download_model_weights,
    )

    found = [
        CompressedFile,
        File,
        Image,
        ImageSize,
        get_image_size,
        upload_image,
        clone_repository,
        download_file,
        download_model_weights,
    ]

    assert found == [getattr(toolkit, item.__name__) for item in found]
    assert fal.toolkit.image.Image is Image
    assert data == FAL_PERSISTENT_DIR


def test_importing_it_needs_neither_pydantic_nor_pillow() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'PIL', 'numpy']))\n"
        "from fal_notebook import toolkit\n"
        "print([getattr(toolkit, name) for name in ('FAL_PERSISTENT_DIR', 'download_file', 'get_gpu_type')])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- folders


def test_the_folders_are_below_the_data_root(data: Path) -> None:
    assert data == fal.toolkit.FAL_PERSISTENT_DIR
    assert data / ".fal" / "model_weights" == fal.toolkit.FAL_MODEL_WEIGHTS_DIR
    assert data / ".fal" / "repos" == fal.toolkit.FAL_REPOSITORY_DIR
    assert not data.exists()


def test_the_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are worked out at each use, not when something is imported."""
    monkeypatch.delenv("FAL_PERSISTENT_DIR")
    monkeypatch.setenv("FAL_NOTEBOOK_HOME", str(tmp_path / "home"))
    assert tmp_path / "home" / "data" == fal.toolkit.FAL_PERSISTENT_DIR

    monkeypatch.delenv("FAL_NOTEBOOK_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path / ".fal_notebook" / "data" / ".fal" / "repos" == fal.toolkit.FAL_REPOSITORY_DIR

    monkeypatch.setenv("FAL_PERSISTENT_DIR", "~/elsewhere")
    assert tmp_path / "elsewhere" == toolkit.FAL_PERSISTENT_DIR
    assert isinstance(toolkit.FAL_PERSISTENT_DIR, Path)
