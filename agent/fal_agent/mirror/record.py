"""What `sync_dir` put into a folder, so that it can be told from what remote code made or changed.

Runs where `fal_agent.mirror.folder` does.
"""

from __future__ import annotations

import json
import os
import stat
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Optional

from fal_agent.mirror.manifests import FileEntry

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Put", "Record", "signature"]

# (bytes, time of the last change in ns, inode): a rename, a link and a change of mode leave it as it is
Signature = tuple[int, int, int]


@dataclass(frozen=True)
class Put:
    """A file that was put there: what it holds, and how it looked then."""

    entry: FileEntry
    signature: Signature


@dataclass
class Record:
    """What was put into one folder.

    Attributes:
        manifest: name of the manifest that the folder follows; "" while that is not certain.
        files: path -> file; None if it is ours but its content is not certain.
        links: path -> target.
    """

    manifest: str = ""
    files: dict[str, Optional[Put]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record; an empty one if there is none."""
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return cls()
        files: dict[str, Optional[Put]] = {}
        for name, put in content["files"]:
            files[name] = None if put is None else Put(_entry(*put[0]), (put[1][0], put[1][1], put[1][2]))
        return cls(content["manifest"], files, dict(content["links"]))

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all, also after a power failure."""
        files = [
            [name, None if put is None else [_plain(put.entry), put.signature]]
            for name, put in self.files.items()
        ]
        content = {"manifest": self.manifest, "files": files, "links": list(self.links.items())}
        beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            with beside.open("x", encoding="ascii") as file:
                json.dump(content, file, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def distrust(self) -> None:
        """Forget what the files hold, not that they are ours."""
        self.manifest = ""
        self.files = dict.fromkeys(self.files)

    def intact_files(self, folder: Path) -> dict[str, FileEntry]:
        """The files that are as they were put there, with the modes that they have now."""
        intact = {}
        for path, put in self.files.items():
            status = _status(folder / path) if put is not None else None
            if put is not None and status is not None and signature(status) == put.signature:
                mode = stat.S_IMODE(status.st_mode)
                intact[path] = FileEntry(mode, put.entry.size, put.entry.pieces)
        return intact

    def is_intact(self, folder: Path) -> bool:
        """Whether everything is as it was put there."""
        intact = self.intact_files(folder)
        files = all(put is not None and intact.get(path) == put.entry for path, put in self.files.items())
        return files and all(link_target(folder / path) == target for path, target in self.links.items())


def signature(status: os.stat_result) -> Optional[Signature]:
    """What changes when a file's content does; None if it is no file."""
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def link_target(path: Path) -> Optional[str]:
    """Where a symbolic link leads; None if there is none."""
    try:
        return os.readlink(path)  # noqa: PTH115 - as it is written: "./a" is not "a"
    except OSError:  # nothing there, or no link
        return None


def _status(path: Path) -> Optional[os.stat_result]:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _plain(entry: FileEntry) -> list[object]:
    return [entry.mode, entry.size, entry.pieces]


def _entry(mode: int, size: int, pieces: list[str]) -> FileEntry:
    return FileEntry(mode, size, tuple(pieces))
