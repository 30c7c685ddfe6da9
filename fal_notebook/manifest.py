"""List the files of a local folder that `sync_dir` sends, and hash them.

Runs in the notebook. Nothing is written here, and no link is followed.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from typing import TYPE_CHECKING

from fal_agent.mirror.manifests import PIECE_SIZE, FileEntry, Manifest
from fal_notebook.gitignore import IgnoreRules

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from fal_agent.framing import Buffer
    from fal_notebook.digests import Digests

__all__ = ["Listing", "digest", "list_folder", "read_piece"]


class Listing:
    """What is in a folder.

    Attributes:
        manifest: of what is sent.
        notes: reason -> paths that it concerns, for a person.
    """

    def __init__(self) -> None:
        self.manifest = Manifest()
        self.notes: dict[str, list[str]] = {}

    def note(self, reason: str, relative: str) -> None:
        """Say something about a path."""
        self.notes.setdefault(reason, []).append(relative)

    def leave(self, reason: str, relative: str) -> None:
        """Leave out a path that should go along; what is on the host stays."""
        self.note(reason, relative)
        self.manifest.keep.append(relative)


def list_folder(
    root: str,
    digests: Digests,
    *,
    unstable: Collection[str] = (),
    tell: Callable[[int], None] = lambda _size: None,
) -> Listing:
    """List a folder.

    Args:
        root: the folder.
        digests: what is known of its files.
        unstable: relative paths of files that never stay still, and are left out.
        tell: called with the number of bytes read, now and then; what it raises ends the listing.
    """
    walk = _Walk(root, digests, unstable, tell)
    walk.folder("", IgnoreRules())
    return walk.listing


def read_piece(root: str, relative: str, index: int) -> bytes:
    """Read a piece of a file.

    Raises:
        OSError: it cannot be read.
    """
    with _opened(os.path.join(root, relative)) as descriptor:  # noqa: PTH118
        return _read_at(descriptor, index * PIECE_SIZE, PIECE_SIZE)


class _ChangedError(Exception):
    """A file changed while it was read."""


class _Walk:
    def __init__(
        self, root: str, digests: Digests, unstable: Collection[str], tell: Callable[[int], None]
    ) -> None:
        self.listing = Listing()
        self._root, self._real_root = root, os.path.realpath(root)
        self._digests, self._unstable, self._tell = digests, unstable, tell

    def folder(self, relative: str, rules: IgnoreRules) -> None:
        """List what is in a folder."""
        path = os.path.join(self._root, relative) if relative else self._root  # noqa: PTH118
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self._unreadable(relative, error)
            return
        try:
            rules = rules.entering(relative, path)
        except OSError as error:
            # Without the rules, what they keep back would be sent.
            self._unreadable(relative, error)
            return
        for entry in entries:
            inner = f"{relative}/{entry.name}" if relative else entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if rules.ignores(inner, is_folder=is_folder):
                continue
            if is_folder:
                self.folder(inner, rules)
            elif entry.is_symlink():
                self._link(inner, entry.path)
            elif entry.is_file(follow_symlinks=False):
                self._file(inner, entry.path)
            else:
                self.listing.note("no regular files (sockets, pipes, devices), and are skipped", inner)

    def _unreadable(self, relative: str, error: OSError) -> None:
        if not relative:
            raise error
        self.listing.leave(f"cannot be read ({error.strerror}), and are skipped", relative)

    def _link(self, relative: str, path: str) -> None:
        try:
            target = os.readlink(path)  # noqa: PTH115 - as it is written
        except OSError as error:
            self._unreadable(relative, error)
            return
        real = os.path.realpath(path)
        if os.path.commonpath([real, self._real_root]) != self._real_root:
            self.listing.note("links that lead out of the folder, and are skipped", relative)
            return
        end = posixpath.normpath(posixpath.join(posixpath.dirname(relative), target))
        if target.startswith("/") or end == ".." or end.startswith("../"):
            # It comes back in, by a way that the host does not have.
            target = os.path.relpath(real, os.path.realpath(os.path.dirname(path)))  # noqa: PTH120
        self.listing.manifest.links[relative] = target

    def _file(self, relative: str, path: str) -> None:
        if relative in self._unstable:
            self.listing.leave("change while they are read, and are skipped", relative)
            return
        try:
            entry = self._entry(path)
        except OSError as error:
            self._unreadable(relative, error)
        except _ChangedError:
            self.listing.leave("change while they are read, and are skipped", relative)
        else:
            self.listing.manifest.files[relative] = entry

    def _entry(self, path: str) -> FileEntry:
        for _attempt in range(2):
            with _opened(path) as descriptor:
                before = os.fstat(descriptor)
                pieces = self._digests.get(path, before)
                if pieces is None:
                    pieces = self._hashed(descriptor)
                    after = os.fstat(descriptor)
                    if _look(before) != _look(after) or len(pieces) != -(-after.st_size // PIECE_SIZE):
                        continue
                    self._digests.put(path, before, pieces)
                return FileEntry(stat.S_IMODE(before.st_mode) & 0o777, before.st_size, pieces)
        raise _ChangedError

    def _hashed(self, descriptor: int) -> tuple[str, ...]:
        pieces: list[str] = []
        while data := _read_at(descriptor, len(pieces) * PIECE_SIZE, PIECE_SIZE):
            pieces.append(digest(data))
            self._tell(len(data))
        return tuple(pieces)


def digest(data: Buffer) -> str:
    """The name of a piece: its BLAKE3 hash."""
    from blake3 import blake3

    state = blake3(max_threads=blake3.AUTO) if len(data) > 1 << 20 else blake3()
    return state.update(data).hexdigest()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Read up to `size` bytes, fewer only at the end of the file."""
    size = max(0, min(size, os.fstat(descriptor).st_size - offset))
    data = os.pread(descriptor, size, offset)
    if len(data) == size:
        return data
    parts = [data]
    while data:
        data = os.pread(descriptor, size - sum(map(len, parts)), offset + sum(map(len, parts)))
        parts.append(data)
    return b"".join(parts)


def _look(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
