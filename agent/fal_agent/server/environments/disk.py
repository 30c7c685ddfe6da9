"""How much room there is, what a folder takes, and how to remove it.

Runs in the agent.
"""

from __future__ import annotations

import os
import shutil
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["existing", "files_of", "remove_folder", "rooms", "size_text", "write_whole"]


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def rooms(folders: Iterable[Path]) -> str:
    """Say how much room the file systems of these folders have, each file system once."""
    texts: dict[int, str] = {}
    for folder in map(existing, folders):
        device = folder.stat().st_dev
        if device not in texts:
            about = os.statvfs(folder)
            texts[device] = (
                f"{folder} is on the file system {_mount_point(folder)}, which has "
                f"{size_text(about.f_bavail * about.f_frsize)} free and room for {about.f_favail} files"
            )
    return "; ".join(texts.values())


def _mount_point(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.is_mount():
        folder = folder.parent
    return folder


def size_text(size: int) -> str:
    """A number of bytes for people: "250 MB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


def files_of(folder: Path) -> Iterator[tuple[tuple[int, int], int]]:
    """Give each file and folder below `folder`: what tells it from others, and the bytes it takes.

    What vanishes meanwhile is left out.
    """
    stack = [str(folder)]
    while stack:
        try:
            entries = list(os.scandir(stack.pop()))
        except FileNotFoundError:
            continue
        for entry in entries:
            try:
                about = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield (about.st_dev, about.st_ino), about.st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is gone at once for whoever looks.

    Raises:
        OSError: something in it cannot be removed.
    """
    beside = folder.with_name(f".removing-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(beside)
    except FileNotFoundError:
        return
    shutil.rmtree(beside)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole, also after a power failure, or not at all.

    Raises:
        OSError: there is no room, for instance.
    """
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
