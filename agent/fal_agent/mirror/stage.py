"""Gather the contents that a folder lacks, in a folder of their own on the same disk.

Runs where `fal_agent.mirror.folder` does, which holds a lock meanwhile. What is gathered stays until it is
used, so a transfer that broke goes on where it was; what nobody asked for in a week is removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.mirror.manifests import PIECE_SIZE, FileEntry, Manifest, piece_blob

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Stage"]

_STALE_SECONDS = 7 * 86400.0
_COPIED_AT_ONCE = 8 << 20  # bytes

Content = tuple[str, ...]  # the pieces of a file
Source = tuple[Path, int]  # a file, and where in it a piece begins


class Stage:
    """The waiting room of one manifest.

    Args:
        root: its folder; several manifests share it.
        manifest: what the target shall hold.
        intact: the files of the target whose content is known.
        target: the folder that these are in.
    """

    def __init__(self, root: Path, manifest: Manifest, intact: Mapping[str, FileEntry], target: Path) -> None:
        self._root, self._target = root, target
        root.mkdir(mode=0o700, exist_ok=True)
        self._forget_old()
        self._wanted: dict[Content, tuple[FileEntry, list[str]]] = {}
        for path, entry in manifest.files.items():
            known = intact.get(path)
            if known is None or known.pieces != entry.pieces:
                self._wanted.setdefault(entry.pieces, (entry, []))[1].append(path)
        self._whole: dict[Content, str] = {}  # content -> a file there that has it; best one that goes away
        self._held: dict[str, Source] = {}
        for path, entry in intact.items():
            if entry.mode & 0o400:
                self._hold(path, entry, goes_away=_goes_away(manifest, path, entry))
        self._goes_away = {path for path in self._whole.values() if _goes_away(manifest, path, intact[path])}
        self._uses = Counter(
            piece for content in self._wanted if content not in self._whole for piece in content
        )

    def _hold(self, path: str, entry: FileEntry, *, goes_away: bool) -> None:
        if goes_away or entry.pieces not in self._whole:
            self._whole[entry.pieces] = path
        for index, piece in enumerate(entry.pieces):
            self._held.setdefault(piece, (self._target / path, index * PIECE_SIZE))

    # ------------------------------------------------------------ gathering

    def gather(self, take: Callable[[str], Optional[Path]]) -> dict[str, int]:
        """Take in what has arrived, and put the pieces of large files together.

        Returns:
            The pieces that are missing, with their bytes, in the order of the manifest.
        """
        missing: dict[str, int] = {}
        for content, (entry, _paths) in self._wanted.items():
            if content in self._whole:
                continue
            done = self._assembled(content, entry) if len(content) > 1 else 0
            assembling = len(content) > 1
            for index in range(done, len(content)):
                piece, length = content[index], entry.piece_length(index)
                source = self._find(piece, length, take)
                if source is None:
                    missing[piece] = length
                    assembling = False
                elif assembling:
                    self._append(content, source, length, piece)
        return missing

    def copied_bytes(self) -> int:
        """Bytes that are still to be copied on this disk."""
        total = 0
        for content, (entry, paths) in self._wanted.items():
            if content in self._whole:
                moved = self._whole[content] in self._goes_away
                total += entry.size * (len(paths) - moved)
            else:
                total += entry.size * (len(paths) - 1)
                if len(content) > 1:
                    total += entry.size - self._assembled(content, entry) * PIECE_SIZE
        return max(0, total)

    def _find(self, piece: str, length: int, take: Callable[[str], Optional[Path]]) -> Optional[Source]:
        staged = self._root / piece
        if _size(staged) == length:
            return staged, 0
        if piece in self._held:
            return self._held[piece]
        arrived = take(piece_blob(piece))
        if arrived is None or _size(arrived) != length:
            return None
        _move(arrived, staged)
        return staged, 0

    def _part(self, content: Content) -> Path:
        return self._root / f"{hashlib.sha256(''.join(content).encode()).hexdigest()}.part"

    def _assembled(self, content: Content, entry: FileEntry) -> int:
        """How many pieces of a large file are put together."""
        size = _size(self._part(content)) or 0
        return len(content) if size == entry.size else size // PIECE_SIZE

    def _append(self, content: Content, source: Source, length: int, piece: str) -> None:
        path, offset = source
        part = self._part(content)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            end = os.fstat(descriptor).st_size // PIECE_SIZE * PIECE_SIZE  # half a piece is none
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            _copy(path, offset, length, descriptor)
        finally:
            os.close(descriptor)
        self._uses[piece] -= 1
        if path.parent == self._root and self._uses[piece] <= 0:
            path.unlink()

    # ------------------------------------------------------------ using

    def prepare(self) -> dict[str, Path]:
        """Give a file for each path that is to be put in place, ready to be renamed."""
        ready: dict[str, Path] = {}
        for content, (entry, paths) in self._wanted.items():
            source, last = self._complete(content)
            for path in paths if last is None else paths[:-1]:
                ready[path] = self._copied(source, entry.size)
            if last is not None:
                ready[paths[-1]] = last
        return ready

    def _complete(self, content: Content) -> tuple[Optional[Path], Optional[Path]]:
        """Where a content is, and, if that need not stay as it is, what may be renamed."""
        if not content:
            return None, None
        if content not in self._whole:
            path = self._part(content) if len(content) > 1 else self._root / content[0]
            return path, path
        name = self._whole[content]
        source = self._target / name
        if name not in self._goes_away:
            return source, None
        link = self._fresh()
        try:
            os.link(source, link, follow_symlinks=False)
        except OSError:  # this file system has no hard links
            return source, None
        return source, link

    def _copied(self, source: Optional[Path], size: int) -> Path:
        path = self._fresh()
        with path.open("xb") as file:
            if source is not None:
                _copy(source, 0, size, file.fileno())
        return path

    def _fresh(self) -> Path:
        return self._root / f"ready-{uuid.uuid4().hex}"

    def finish(self) -> None:
        """Let go of what this manifest asked for and does not need any more."""
        for content in self._wanted:
            for piece in content:
                (self._root / piece).unlink(missing_ok=True)
        self._remove("ready-*")

    def clear(self) -> None:
        """Forget everything that was gathered."""
        self._remove("*")

    def _forget_old(self) -> None:
        """Remove what is stale, and, after the machine started anew, all that may not be on the disk."""
        self._remove("ready-*")
        marker, boot = self._root / ".boot", _boot_id()
        if not marker.exists() or marker.read_bytes() != boot:
            self.clear()
            marker.write_bytes(boot)
        oldest = time.time() - _STALE_SECONDS
        with os.scandir(self._root) as entries:
            for entry in entries:
                if entry.name != ".boot" and entry.stat(follow_symlinks=False).st_mtime < oldest:
                    Path(entry.path).unlink()

    def _remove(self, pattern: str) -> None:
        for path in self._root.glob(pattern):
            path.unlink()


def _goes_away(manifest: Manifest, path: str, entry: FileEntry) -> bool:
    """Whether what a file holds will not be there any more."""
    new = manifest.files.get(path)
    if new is None:
        return not any(path == kept or path.startswith(kept + "/") for kept in manifest.keep)
    return new.pieces != entry.pieces


def _size(path: Path) -> Optional[int]:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return None


def _move(source: Path, target: Path) -> None:
    """Rename a file, or copy it from another file system."""
    source.chmod(0o600)
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f"ready-{uuid.uuid4().hex}")
        shutil.copyfile(source, beside)
        beside.replace(target)
        source.unlink()


def _copy(source: Path, offset: int, length: int, descriptor: int) -> None:
    """Append a part of a file to another; without reading it where the file system can share it."""
    with source.open("rb") as file:
        left = length
        with contextlib.suppress(OSError, AttributeError):  # not on this file system, or not in this Python
            while left:
                copied = os.copy_file_range(file.fileno(), descriptor, left, offset + length - left)
                if not copied:
                    break
                left -= copied
        file.seek(offset + length - left)
        while left:
            data = file.read(min(left, _COPIED_AT_ONCE))
            if not data:
                raise OSError(f"{source} was cut while it was read")
            left -= len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]


def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:  # not Linux
        return b"?"
