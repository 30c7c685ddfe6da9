"""Remember what files hold, so that an unchanged one is not read again.

Runs in the notebook. The memory lies in the user's cache folder and may be lost or removed at any
time: files are then read again.
"""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Digests", "cache_folder"]

_SETTLED = 2_000_000_000  # ns without a change after which a time stamp is taken as unique
_KEPT_SECONDS = 90 * 86400  # after its last use that an entry is kept
_KEPT_FILES = 2_000_000
_TABLE = "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, state TEXT, pieces BLOB, used INTEGER)"


def cache_folder() -> Path:
    """Folder of what may be lost: $FAL_NOTEBOOK_CACHE, else the platform's own place."""
    chosen = os.environ.get("FAL_NOTEBOOK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("fal_notebook"))


class Digests:
    """The memory; to be used as a context manager, by one thread.

    A file is known by its path, device, inode, size, and the times of its last change and of the last
    change of its status.

    Args:
        path: of the database; by default in the cache folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or cache_folder() / "digests-1.sqlite3"
        self._database: sqlite3.Connection | None = None
        self._new: list[tuple[bytes, str, bytes, int]] = []

    def __enter__(self) -> Digests:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._database = self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # locked, or no place for it
                    raise
                self._path.unlink(missing_ok=True)  # it is damaged
                self._database = self._open()
        except (OSError, sqlite3.Error) as error:
            self._complain(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._database is None:
            return
        try:
            self._write()
        except sqlite3.Error as problem:
            self._complain(problem)
        finally:
            self._database.close()

    def get(self, path: str, status: os.stat_result) -> tuple[str, ...] | None:
        """The pieces of a file that looks like this; None if that is not known."""
        if self._database is None:
            return None
        name, state = os.fsencode(path), _state(status)
        try:
            row = self._database.execute("SELECT state, pieces FROM files WHERE path = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            self._complain(error)
            self._database.close()
            self._database = None
            return None
        if row is None or row[0] != state:
            return None
        self._new.append((name, state, row[1], int(time.time())))
        return tuple(row[1][start : start + 32].hex() for start in range(0, len(row[1]), 32))

    def put(self, path: str, status: os.stat_result, pieces: tuple[str, ...]) -> None:
        """Remember a file that has not been touched for a moment; two changes in one tick look the same."""
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED:
            return
        self._new.append(
            (os.fsencode(path), _state(status), b"".join(map(bytes.fromhex, pieces)), int(time.time()))
        )

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute(_TABLE)
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _write(self) -> None:
        database = self._database
        if database is None or not self._new:
            return
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", self._new)
        database.execute("DELETE FROM files WHERE used < ?", (int(time.time()) - _KEPT_SECONDS,))
        database.execute(
            "DELETE FROM files WHERE path IN (SELECT path FROM files ORDER BY used DESC LIMIT -1 OFFSET ?)",
            (_KEPT_FILES,),
        )
        database.execute("COMMIT")

    def _complain(self, error: Exception) -> None:
        warnings.warn(
            f"{self._path} cannot be used ({error}), so all files are read; remove it, or set "
            "FAL_NOTEBOOK_CACHE to a folder of yours",
            UserWarning,
            stacklevel=3,
        )


def _state(status: os.stat_result) -> str:
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join(map(str, parts))
