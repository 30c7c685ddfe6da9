"""Files with all that a run printed, for runs that print more than a cell shows.

Runs in the notebook. They lie in `logs` below the cache folder ($FAL_NOTEBOOK_CACHE, else the platform's
own place), or in $FAL_NOTEBOOK_LOGS, for the user alone. When one is begun, those older than 30 days
go, and of the others the oldest beyond 2 GB; a single one may take as much.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fal_notebook.digests import cache_folder

if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = ["KEPT_BYTES", "KEPT_DAYS", "LogFile", "log_folder"]

KEPT_BYTES = 2 << 30
KEPT_DAYS = 30
_PRUNE_EVERY = 64 << 20  # bytes written between two looks at what there is


def log_folder() -> Path:
    """Where the files lie."""
    chosen = os.environ.get("FAL_NOTEBOOK_LOGS")
    return Path(chosen).expanduser() if chosen else cache_folder() / "logs"


class LogFile:
    """One run's file; what cannot be written is said once, in `problem`, and the run goes on.

    Args:
        label: what the run is of, for the file's name.

    Attributes:
        path: of the file.
        problem: why the file is not complete; empty if it is.
    """

    def __init__(self, label: str) -> None:
        word = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:40] or "cell"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{word}-{os.urandom(3).hex()}.log"
        self.path = log_folder() / name
        self.problem = ""
        self._size = self._looked_at = 0
        self._file: BinaryIO | None = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _prune(self.path.parent, KEPT_BYTES)
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            self._file = os.fdopen(fd, "wb", buffering=1 << 20)
        except OSError as error:
            self.problem = str(error)

    def write(self, data: bytes) -> None:
        """Add to it."""
        if self._file is None:
            return
        try:
            if self._size + len(data) > KEPT_BYTES:
                raise OSError(f"it has reached {KEPT_BYTES >> 30} GB")
            self._file.write(data)
            self._size += len(data)
            if self._size - self._looked_at >= _PRUNE_EVERY:
                self._looked_at = self._size
                _prune(self.path.parent, KEPT_BYTES - self._size, keep=self.path)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Let others read what was written until now."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """It is complete."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self.problem = str(error)

    def discard(self) -> None:
        """It is not needed."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self.close()
        self.problem = str(error)


def _prune(folder: Path, budget: int, keep: Path | None = None) -> None:
    """Remove what is too old, then the oldest until the rest takes at most `budget` bytes."""
    found = []
    for path in folder.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):  # another kernel removed it
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total, oldest = 0, time.time() - KEPT_DAYS * 86400
    for changed, size, path in sorted(found, reverse=True):
        if path == keep:
            continue
        total += size
        if changed < oldest or total > budget:
            path.unlink(missing_ok=True)
