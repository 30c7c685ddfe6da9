"""Keep named bytes on the disk of a host: large arguments and results.

Runs in the agent; several agents may share the folder. A blob appears under its name when all of it
is there, and never changes after that. Parts are gathered in a folder of the process that writes
them, so that what a dead one left behind can be told.

Blobs are not forced to the disk one by one, which would cost more than sending them: a blob that
`prune` has forced there is read-only, and after the machine started anew all others are dropped. The
notebook sends them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import platform
import re
import shutil
import stat
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from fal_agent.errors import ProtocolError, ResourceError
from fal_agent.server.proc import boot_id, identity, is_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from fal_agent.framing import Buffer

__all__ = ["BlobStore"]

BUDGET_BYTES = 20 << 30
SPARE_BYTES = 200 << 20  # of the disk that blobs leave free
FRESH_SECONDS = 600.0  # after its last use in which a blob is not pruned: somebody may be about to open it
STALE_SECONDS = 3600.0  # after which what no message ever named is removed

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_WRITERS = ".writers"  # a folder in here for each agent: "incoming" and "outbox"
_SYNCED, _UNSYNCED = 0o400, 0o600


@dataclass
class _Incoming:
    """A blob that is being received."""

    path: Path
    size: int
    written: int = 0


class BlobStore:
    """The blobs of a host; may be used from any thread.

    Args:
        root: the folder of the blobs, made if need be.
        budget_bytes: that all blobs may take before `prune` removes those used longest ago.
        agent: identity of the process that writes; this one by default.
    """

    def __init__(self, root: Path, budget_bytes: int = BUDGET_BYTES, *, agent: Optional[str] = None) -> None:
        self.root, self.budget_bytes = root, budget_bytes
        self._lock = threading.Lock()
        self._incoming: dict[tuple[str, str], _Incoming] = {}  # by writer and name
        self._left: dict[str, _Incoming] = {}  # by name: what a writer that went away did not finish
        self._refused: dict[tuple[str, str], str] = {}  # why: their other parts are passed over
        self._outboxes: dict[str, Path] = {}
        self._own = root / _WRITERS / (agent or identity())
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (root / _WRITERS, self._own, self._own / "incoming", self._own / "outbox"):
            folder.mkdir(mode=0o700, exist_ok=True)  # parents made on the way would ignore the mode
        self._forget_unsynced()

    # ------------------------------------------------------------ receiving

    def write(self, name: str, offset: int, size: int, data: Buffer, writer: str = "") -> bool:
        """Take a part of a blob. Parts of one blob come in order; those of others may come between.

        Parts of a blob that is there already are passed over.

        Args:
            name: letters, digits, "-" and "_", 128 at most.
            offset: where the part begins, in bytes.
            size: of the whole blob, in bytes.
            data: the part's bytes.
            writer: who sends, as "CLIENT/CONNECTION", so that two who send the same blob do not meet.

        Returns:
            True when the blob is whole.

        Raises:
            ProtocolError: a part out of order, or no possible name.
            ResourceError: the disk has no room for the blob, or fails. Raised once: the other parts are
                passed over, until the blob begins anew.
        """
        path = self._file(name)
        end = offset + len(data)
        with self._lock:
            if (writer, name) in self._refused and offset > 0:
                return False
            incoming = self._incoming.get((writer, name))
            if incoming is not None and offset == 0 and incoming.written:
                self._drop(writer, name)  # its sender gave up half-way and begins anew
                incoming = None
            if incoming is None:
                if _size(path) == size and 0 <= offset <= end <= size:
                    if offset == 0:
                        _touch(path)
                    return end == size
                incoming = self._begin(name, offset, size, writer)
            if offset != incoming.written or size != incoming.size or end > size or (end == offset and size):
                self._drop(writer, name)
                raise ProtocolError(
                    f"blob {name}: a part at {offset} to {end} of {size} bytes came where one at "
                    f"{incoming.written} of {incoming.size} bytes was due"
                )
            try:
                _write_at(incoming.path, offset, data)
                incoming.written = end
                if end < size:
                    return False
                incoming.path.replace(path)
            except OSError as error:
                self._drop(writer, name)
                raise self._refusal(writer, name, size, str(error)) from error
            del self._incoming[writer, name]
            return True

    def arrived(self, name: str, size: int, writer: str = "") -> int:
        """Say how much of a blob is here, so that its sender goes on from there.

        What was begun by a writer that has gone, or by an earlier connection of this one, is this writer's
        from now on.

        Args:
            name: as in `write`; of the same content whoever sends it.
            size: of the whole blob, in bytes.
            writer: who will send the rest: "CLIENT/CONNECTION".

        Returns:
            Bytes, from the front; all of them if the blob is whole.

        Raises:
            ProtocolError: no possible name.
        """
        path = self._file(name)
        with self._lock:
            if _size(path) == size and _touch(path):
                return size
            if (writer, name) not in self._incoming:
                self._leave(name, lambda owner: _client_of(owner) == _client_of(writer))
                if name not in self._left or self._left[name].size != size:
                    return 0
                self._incoming[writer, name] = self._left.pop(name)
                self._refused.pop((writer, name), None)
            return self._incoming[writer, name].written

    def take_refusals(self, names: Collection[str]) -> list[str]:
        """Give the reasons why blobs that came last were not kept; each reason once."""
        wanted = set(names)
        with self._lock:
            found = {key: why for key, why in self._refused.items() if why and key[1] in wanted}
            self._refused.update(dict.fromkeys(found, ""))
            return list(found.values())

    def abandon(self, writer: str) -> None:
        """A writer has gone: what it did not finish stays for a while, for whoever goes on with it."""
        with self._lock:
            for name in [name for owner, name in self._incoming if owner == writer]:
                self._leave(name, lambda owner: owner == writer)
            self._refused = {key: why for key, why in self._refused.items() if key[0] != writer}

    def _begin(self, name: str, offset: int, size: int, writer: str) -> _Incoming:
        if offset != 0 or size < 0:
            raise ProtocolError(f"blob {name}: a part at {offset} of {size} bytes came before any other")
        self._refused.pop((writer, name), None)
        due = sum(other.size - other.written for other in self._incoming.values())
        free = shutil.disk_usage(self.root).free - SPARE_BYTES - due
        if size > free and self._left:
            self._drop_left()
            free = shutil.disk_usage(self.root).free - SPARE_BYTES - due
        if size > free:
            raise self._refusal(writer, name, size, f"there is room for {max(0, free):,} bytes")
        path = self._own / "incoming" / uuid.uuid4().hex
        try:
            path.touch(_UNSYNCED, exist_ok=False)
        except OSError as error:
            raise self._refusal(writer, name, size, str(error)) from error
        self._incoming[writer, name] = incoming = _Incoming(path, size)
        return incoming

    def _refusal(self, writer: str, name: str, size: int, reason: str) -> ResourceError:
        text = (
            f"{size:,} bytes of data cannot be kept in {self.root}: {reason}; "
            "free some space there, or send less"
        )
        self._refused[writer, name] = text
        return ResourceError(text)

    def _leave(self, name: str, is_leaver: Callable[[str], bool]) -> None:
        """Put what some writers have begun of a blob aside, the longest piece of it."""
        for key in [key for key in self._incoming if key[1] == name and is_leaver(key[0])]:
            piece, other = self._incoming.pop(key), self._left.get(name)
            if other is not None and other.written > piece.written:
                piece, other = other, piece
            self._left[name] = piece
            if other is not None:
                other.path.unlink()

    def _drop_left(self, before: float = math.inf) -> None:
        """Forget what was left, if nothing of it came after a time."""
        for name, piece in list(self._left.items()):
            if piece.path.stat().st_mtime < before:
                del self._left[name]
                piece.path.unlink()

    def _drop(self, writer: str, name: str) -> None:
        incoming = self._incoming.pop((writer, name), None)
        if incoming is not None:
            incoming.path.unlink()

    # ------------------------------------------------------------ results

    def outbox(self, owner: str) -> Path:
        """The folder where a worker puts large results, to be taken with `adopt`.

        Raises:
            ProtocolError: `owner` is no possible name.
        """
        folder = self._outboxes.get(owner)
        if folder is None:
            folder = self._own / "outbox" / _checked(owner)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._outboxes[owner] = folder
        return folder

    def clear_outbox(self, owner: str) -> None:
        """Remove a worker's outbox and what is left in it."""
        folder = self._outboxes.pop(owner, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # prune removes what remains

    def adopt(self, path: Path) -> str:
        """Make a blob of a file that lies in an outbox, by renaming it; gives the blob's name.

        Raises:
            ProtocolError: there is no such file, or it lies elsewhere, or it is no ordinary file.
        """
        if path.parent.parent != self._own / "outbox" or not _NAME.fullmatch(path.parent.name):
            raise ProtocolError(f"{path} is not in an outbox of this agent")
        if _size(path) is None:
            raise ProtocolError(f"{path} is not a file that can become a blob")
        name = f"r-{uuid.uuid4().hex}"
        path.chmod(_UNSYNCED)
        path.rename(self.root / name)
        return name

    # ------------------------------------------------------------ reading

    def path(self, name: str) -> Optional[Path]:
        """The file of a blob, which now counts as used; None if it is not here."""
        path = self._file(name)
        return path if _size(path) is not None and _touch(path) else None

    def has(self, name: str) -> bool:
        """Whether a blob is here."""
        return self.size(name) is not None

    def size(self, name: str) -> Optional[int]:
        """Bytes of a blob; None if it is not here."""
        return _size(self._file(name))

    def parts_with_size(self, name: str, part_size: int, start: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """Pieces of a blob from `start` on: offset, bytes of the whole blob, and at most `part_size` bytes.

        There is one empty piece where nothing is left. A blob that is removed meanwhile is read to its end.

        Raises:
            ResourceError: the blob is not here (any more).
        """
        path = self._file(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ResourceError(
                f"blob {name} is not on this host any more ({error}); run the call again"
            ) from error
        _touch(path)
        return _read_parts(fd, part_size, max(0, start))

    # ------------------------------------------------------------ care

    def remove(self, names: Collection[str]) -> None:
        """Remove blobs; those that are not here are passed over."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._file(name).unlink()

    def prune(self, in_use: Collection[str] = ()) -> list[str]:
        """Force new blobs to the disk, then remove those used longest ago, beyond the budget.

        Also removes what dead agents and finished workers left behind. Takes time: call it from a
        thread.

        Args:
            in_use: names that stay, whatever their age.

        Returns:
            Names of the blobs that were removed.
        """
        self._remove_leftovers()
        found = sorted(self._blobs(), key=lambda item: item[1].st_mtime)
        total = sum(status.st_size for _, status in found)
        removed = []
        oldest_fresh = time.time() - FRESH_SECONDS
        for name, status in found:
            if total > self.budget_bytes and name not in in_use and status.st_mtime < oldest_fresh:
                self.remove([name])
                removed.append(name)
                total -= status.st_size
            elif stat.S_IMODE(status.st_mode) != _SYNCED:
                _sync(self.root / name)
        return removed

    def _blobs(self) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self.root) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):  # another agent prunes too
                        yield entry.name, entry.stat(follow_symlinks=False)

    def _remove_leftovers(self) -> None:
        long_ago = time.time() - STALE_SECONDS
        with self._lock:
            self._drop_left(long_ago)
        for folder in (self.root / _WRITERS).iterdir():
            if not is_alive(folder.name):
                shutil.rmtree(folder, ignore_errors=True)  # another agent may be at it as well
        left = list((self._own / "outbox").glob("*/*"))
        left += [path for path in self.root.iterdir() if path.is_file() and not _NAME.fullmatch(path.name)]
        for path in left:
            with contextlib.suppress(FileNotFoundError):  # adopted meanwhile
                if path.lstat().st_mtime < long_ago and not path.name.startswith(".boot"):
                    path.unlink()

    def _forget_unsynced(self) -> None:
        """After the machine started anew, drop the blobs that may not have reached the disk."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.root / f".boot-{platform.node()}", flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            this_boot = boot_id().encode()
            if os.pread(fd, 64, 0) == this_boot:
                return
            for name, status in self._blobs():
                if stat.S_IMODE(status.st_mode) != _SYNCED:
                    self.remove([name])
            os.ftruncate(fd, 0)
            os.pwrite(fd, this_boot, 0)
        finally:
            os.close(fd)

    def _file(self, name: str) -> Path:
        return self.root / _checked(name)


def _client_of(writer: str) -> str:
    return writer.rpartition("/")[0]


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ProtocolError(
            f"{name[:200]!r} cannot be a blob's name: letters, digits, '-' and '_', 1 to 128 of them"
        )
    return name


def _size(path: Path) -> Optional[int]:
    """Bytes of an ordinary file; None if there is none, or something else in its place."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _touch(path: Path) -> bool:
    """Note that a blob is used; whether it is there."""
    try:
        os.utime(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _write_at(path: Path, offset: int, data: Buffer) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            offset, view = offset + written, view[written:]
    finally:
        os.close(fd)


def _read_parts(fd: int, part_size: int, offset: int) -> Iterator[tuple[int, int, bytes]]:
    try:
        size = os.fstat(fd).st_size
        while True:
            data = os.pread(fd, part_size, offset)
            yield offset, size, data
            offset += len(data)
            if offset >= size or not data:
                return
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    """Force a blob to the disk, and note that by making it read-only."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # removed meanwhile
        return
    try:
        os.fsync(fd)
        os.fchmod(fd, _SYNCED)
    finally:
        os.close(fd)
