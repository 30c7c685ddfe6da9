"""Our own source as an archive, to be put on hosts.

Runs in the notebook. The digest names the source, not the archive's bytes, so that notebooks whose
Pythons compress differently share one agent: it is equal exactly if every file is.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from fal_agent.errors import FalServerlessError

__all__ = ["Archive", "source_archive"]

PACKAGES = ("fal_agent", "fal_notebook")

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold
_MODE = 0o100644 << 16  # regular file, in the upper half of a zip's external attributes
_UNIX = 3


@dataclass(frozen=True)
class Archive:
    """The source of one version.

    Attributes:
        digest: 64 hex digits: SHA-256 over names, sizes and contents of the files.
        files: contents by POSIX path ("fal_agent/wire.py"), sorted.
    """

    digest: str
    files: dict[str, bytes]

    @functools.cached_property
    def data(self) -> bytes:
        """A zip of the files; the same bytes for the same files on one Python."""
        import io
        import zipfile

        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name, content in self.files.items():
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.external_attr, entry.create_system = _MODE, _UNIX
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)
        return buffer.getvalue()


@functools.cache
def source_archive() -> Archive:
    """Give the source of the packages that this process runs, as it was at the first call.

    Returns:
        Every ``.py`` file and ``py.typed`` of `fal_agent` and `fal_notebook`.

    Raises:
        FalServerlessError: a package is not in a folder, or a file cannot be read.
    """
    files: dict[str, bytes] = {}
    for package in PACKAGES:
        files.update(_package(package))
    ordered = dict(sorted(files.items()))
    return Archive(_digest(ordered), ordered)


def _package(package: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        for folder in import_module(package).__path__:
            found.update(_sources(Path(folder), package))
    except OSError as error:
        raise FalServerlessError(
            f"the source of {package} cannot be read, so it cannot be put on a host: {error}; "
            "install fal-notebook into a folder, not into a zip"
        ) from error
    return found


def _sources(folder: Path, package: str) -> dict[str, bytes]:
    """Contents of the package's source files by path from the package's parent."""
    found: dict[str, bytes] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{package}/{entry.name}"
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if entry.is_dir():
                found.update(_sources(Path(entry.path), name))
            elif entry.name.endswith(".py") or entry.name == "py.typed":
                found[name] = Path(entry.path).read_bytes()
    return found


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{len(name)}:{name}{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
