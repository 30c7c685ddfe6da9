"""Keep the store of the files that apps give away by URL within bounds of size and age.

Runs in the agent, in threads. What was made or fetched within the hour stays in any case. A file is removed
under the store's lock, which whoever puts one there holds too; so none is removed that has just been made
anew.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fal_agent.runtime.toolkit.files import DIGEST, INCOMING, changing_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FileLimits", "prune_files"]

FRESH_SECONDS = 3600.0  # after its last use in which a file is not removed, whatever the limits say
STALE_SECONDS = 86400.0  # after which a file that was being made is nobody's


@dataclass(frozen=True)
class FileLimits:
    """How much the store may hold, and for how long.

    Attributes:
        budget_bytes: that all files together may take before those used longest ago go.
        age_seconds: since a file was made or fetched last, after which it goes.
    """

    budget_bytes: float = 20e9
    age_seconds: float = 30 * 86400.0


@dataclass(frozen=True)
class _Stored:
    path: Path
    used_at: float  # seconds since the Unix epoch
    size: int  # bytes


def prune_files(store: Path, limits: FileLimits) -> list[Path]:
    """Remove what is too old, and what was used longest ago beyond the budget. Takes time.

    Only what the store itself has put there is touched; links are neither followed nor removed.

    Returns:
        The files that were removed.
    """
    now = time.time()
    _remove_leftovers(store, now - STALE_SECONDS)
    found = sorted(_files(store), key=lambda file: file.used_at)
    total = sum(file.size for file in found)
    removed = []
    for file in found:
        is_old = file.used_at < now - limits.age_seconds
        is_fresh = file.used_at > now - FRESH_SECONDS
        if not is_fresh and (is_old or total > limits.budget_bytes) and _remove(store, file):
            removed.append(file.path)
            total -= file.size
    return removed


def _files(store: Path) -> Iterator[_Stored]:
    with contextlib.suppress(FileNotFoundError):  # there is no store yet
        for folder in store.iterdir():
            if DIGEST.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                yield from _files_in(folder)


def _files_in(folder: Path) -> Iterator[_Stored]:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another agent prunes too
            if path.is_file() and not path.is_symlink():
                status = path.stat()
                yield _Stored(path, status.st_mtime, status.st_size)


def _remove(store: Path, file: _Stored) -> bool:
    """Remove a file unless it was used meanwhile, and its folder if that was the last one."""
    with changing_store(store):
        try:
            if file.path.stat().st_mtime != file.used_at:
                return False
            file.path.unlink()
        except FileNotFoundError:
            return False
        with contextlib.suppress(OSError):  # it holds the same content by another name
            file.path.parent.rmdir()
    return True


def _remove_leftovers(store: Path, before: float) -> None:
    """Remove what processes that were killed had begun to write."""
    for path in store.glob(f"{INCOMING}*"):
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_mtime < before:
                path.unlink()
