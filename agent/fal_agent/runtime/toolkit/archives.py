"""Unpack an archive that came from outside.

Runs wherever user code runs; standard library only. Nothing is ever written outside of the folder, links
are left out, and what unpacks to more than is allowed is refused.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Optional

from fal_agent.errors import FileTooLargeError
from fal_agent.runtime.toolkit.files import copied, written_whole

try:
    from lzma import LZMAError
except ImportError:  # a Python that was built without it reads no xz either
    LZMAError = zlib.error  # type: ignore[misc, assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["UNPACKED_LIMIT", "unpack"]

UNPACKED_LIMIT = 4 << 30  # bytes of all files
_MEMBERS_LIMIT = 100_000
_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError),
    *(EOFError, RuntimeError, NotImplementedError, UnicodeError, struct.error),
)
_IN_THE_WAY = (FileExistsError, NotADirectoryError, IsADirectoryError)


def unpack(archive: Path, folder: Path, *, limit: int = UNPACKED_LIMIT) -> list[Path]:
    """Unpack the regular files of a zip or tar archive.

    Args:
        archive: .zip, or .tar, alone or with gzip, bzip2 or xz.
        folder: an empty folder.
        limit: bytes that all files may have.

    Returns:
        The files, in the archive's order.

    Raises:
        ValueError: it is no such archive, is damaged, or a file in it would lie outside of the folder.
        FileTooLargeError: it unpacks to more than `limit` bytes or 100,000 files.
    """
    found: list[Path] = []
    room = limit
    try:
        for name, source in _members(archive):
            if len(found) >= _MEMBERS_LIMIT:
                raise FileTooLargeError(f"{archive.name} holds more than {_MEMBERS_LIMIT} files")
            path = folder / _inside(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            room -= _write(source, path, room, archive.name, limit)
            found.append(path)
    except _BROKEN as error:
        raise ValueError(f"{archive.name} is damaged or encrypted: {error}") from error
    except _IN_THE_WAY as error:
        raise ValueError(f"{archive.name} holds a file and a folder of one name: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # bzip2 and gzip have no error of their own kind for data that is not theirs
        raise ValueError(f"{archive.name} is damaged: {error}") from error
    return list(dict.fromkeys(found))


def _members(archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if not entry.filename:  # which `is_dir` of older Pythons cannot bear
                    raise ValueError(f"{archive.name} is damaged: a file in it has no name")
                kind = entry.external_attr >> 28  # of Unix; 0 where it was packed by something else
                if not entry.is_dir() and kind in (0, 8):
                    with opened.open(entry) as source:
                        yield entry.filename, source  # type: ignore[misc] # which can be read, and no more is wanted
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as packed:
            for member in packed:
                extracted = packed.extractfile(member) if member.isreg() else None
                if extracted is not None:
                    with extracted:
                        yield member.name, extracted  # type: ignore[misc]
    else:
        raise ValueError(f"{archive.name} is neither a zip nor a tar archive")


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"the archive would write outside of its folder: {name!r}")
    return path


def _write(source: BinaryIO, path: Path, room: int, name: str, limit: int) -> int:
    size: Optional[int] = None

    def fill(file: BinaryIO) -> None:
        nonlocal size
        error = FileTooLargeError(f"{name} unpacks to more than {limit} bytes")
        size = copied(source, file, limit=room, too_large=lambda: error)

    written_whole(path, fill)
    return size or 0
