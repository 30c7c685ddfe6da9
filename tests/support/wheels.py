"""Packages of our own, so that environments are built without any network: wheels, and folders to build."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["make_project", "make_wheel", "package_settings"]

_PROJECT = """
[project]
name = "{name}"
{version}
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
_BACKEND = """
import os, pathlib, shutil, time

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    {body}
    (wheel,) = pathlib.Path(__file__).parent.glob("*.whl")
    shutil.copy(wheel, wheel_directory)
    return wheel.name
"""


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    requires: tuple[str, ...] = (),
    size: int = 0,
    command: str = "",
) -> Path:
    """Write the wheel of a module that knows its version, with `size` bytes of ballast and a script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {line}" for line in requires]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\ndef main(): print({name!r}, VERSION)\n")
        if size:
            wheel.writestr(f"{name}.bin", b"\xa5" * size)
        if command:
            wheel.writestr(f"{about}/entry_points.txt", f"[console_scripts]\n{command} = {name}:main\n")
        wheel.writestr(f"{about}/METADATA", "\n".join([*metadata, ""]))
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(
            f"{about}/RECORD", "".join(f"{path},,\n" for path in [*wheel.namelist(), f"{about}/RECORD"])
        )
    return path


def make_project(folder: Path, name: str, body: str, *, dynamic: bool = False) -> str:
    """Write a folder of sources whose build runs `body`, one line of Python; give its requirement line.

    A dynamic project must be built to know its version, so it is built while resolving already.
    """
    make_wheel(folder, name)
    version = 'dynamic = ["version"]' if dynamic else 'version = "1.0"'
    (folder / "pyproject.toml").write_text(_PROJECT.format(name=name, version=version))
    (folder / "backend.py").write_text(_BACKEND.format(body=body))
    return f"{name} @ file://{folder}"


def package_settings(path: Path, wheels: Path) -> Path:
    """Write settings for uv that let it see nothing but the wheels of a folder."""
    wheels.mkdir(parents=True, exist_ok=True)
    links = f'no-index = true\nfind-links = ["{wheels}"]\n'
    path.write_text(f"{links}[pip]\n{links}")
    return path
