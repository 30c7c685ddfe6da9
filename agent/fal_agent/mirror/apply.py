"""Put gathered files in place, and take away what the manifest dropped.

Runs where `fal_agent.mirror.folder` does, which holds a lock meanwhile. Nothing is written or removed
through a symbolic link, and nothing that remote code made is removed.
"""

from __future__ import annotations

import os
import posixpath
import stat
import uuid
from typing import TYPE_CHECKING, Optional

from fal_agent.errors import ResourceError
from fal_agent.mirror.record import Put, Record, link_target, signature

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fal_agent.mirror.manifests import FileEntry, Manifest

__all__ = ["Change"]

_ABSENT = object()


class Change:
    """The way from what a folder holds to what it shall hold.

    Args:
        folder: the folder; made when the change is applied.
        manifest: what it shall hold.
        record: what was put there before; becomes what is there now.
        intact: those of its files that are as they were put there.

    Attributes:
        changed, removed: numbers of paths, after `apply`.
        changed_there: paths that the manifest dropped but remote code changed; they stay.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, record: Record, intact: Mapping[str, FileEntry]
    ) -> None:
        self._folder, self._manifest, self._record, self._intact = folder, manifest, record, intact
        self.changed = self.removed = 0
        self.changed_there: list[str] = []
        ours = dict.fromkeys((*record.files, *record.links))
        kept = tuple(f"{path}/" for path in manifest.keep)
        new = manifest.files.keys() | manifest.links.keys()
        self._gone = {path: None for path in ours if path not in new and not f"{path}/".startswith(kept)}
        self._folders = _folders_of(new)

    def check(self) -> None:
        """Look, before anything is touched, whether what remote code made is in the way.

        Raises:
            ResourceError: it is.
        """
        for path in self._folders:
            mode = _mode(self._folder / path)
            if mode is None or stat.S_ISDIR(mode):
                continue
            if path not in self._gone or self._stays(path):
                raise self._in_the_way(path, "a folder is to be")
        for path in (*self._manifest.files, *self._manifest.links):
            mode = _mode(self._folder / path)
            if mode is not None and stat.S_ISDIR(mode) and self._is_plain(path):
                for inner in _files_below(self._folder, path):
                    if inner not in self._gone or self._stays(inner):
                        raise self._in_the_way(inner, f"the file {path!r} is to be")

    def apply(self, ready: Mapping[str, Path], name: str, record_path: Path) -> None:
        """Make the change.

        Args:
            ready: path -> the file to be renamed into place.
            name: of the manifest, noted when all is done.
            record_path: where the record is kept.
        """
        record, manifest = self._record, self._manifest
        links = {
            path: target
            for path, target in manifest.links.items()
            if link_target(self._folder / path) != target
        }
        # Should this end half-way, everything in here is known to be ours.
        record.manifest = ""
        record.files.update(dict.fromkeys(ready))
        record.links.update(manifest.links)
        record.save(record_path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make_way()
        for path in sorted(self._folders):
            (self._folder / path).mkdir(exist_ok=True)
        for path, source in ready.items():
            os.replace(source, self._folder / path)  # noqa: PTH105 - the same words as for links
            (self._folder / path).chmod(manifest.files[path].mode)
        for path, target in links.items():
            beside = record_path.parent / "staged" / f"ready-{uuid.uuid4().hex}"
            beside.symlink_to(target)
            os.replace(beside, self._folder / path)  # noqa: PTH105
        modes = self._change_modes(ready)
        for path in list(self._gone):
            self._remove(path)
        self.changed = len(ready) + len(links) + modes
        self._note(name)
        record.save(record_path)

    def _change_modes(self, ready: Mapping[str, Path]) -> int:
        count = 0
        for path, entry in self._manifest.files.items():
            if path not in ready and self._intact[path].mode != entry.mode:
                (self._folder / path).chmod(entry.mode)
                count += 1
        return count

    def _make_way(self) -> None:
        """Remove what was put where a folder is to be, and what is in a folder where a file is to be."""
        new = self._manifest.files.keys() | self._manifest.links.keys()
        for path in list(self._gone):
            if path in self._folders or not new.isdisjoint(_folders_of([path])):
                self._remove(path)
        for path in new:
            place = self._folder / path
            mode = _mode(place)
            if mode is not None and stat.S_ISDIR(mode):
                for folder, _, _ in os.walk(place, topdown=False):
                    os.rmdir(folder)  # noqa: PTH106 - empty folders, as `check` has found

    def _remove(self, path: str) -> None:
        """Take away something that was put there, unless remote code has changed it."""
        stays, is_there = self._stays(path), _mode(self._folder / path) is not None
        del self._gone[path]
        self._record.links.pop(path, None)
        self._record.files.pop(path, None)
        if stays:
            self.changed_there.append(path)
        if stays or not is_there:
            return
        (self._folder / path).unlink()
        self.removed += 1
        above = posixpath.dirname(path)
        while above and above not in self._folders:
            try:
                (self._folder / above).rmdir()
            except OSError:  # something is in it
                return
            above = posixpath.dirname(above)

    def _stays(self, path: str) -> bool:
        """Whether something that is there now is not, or not any more, what was put there."""
        mode = _mode(self._folder / path)
        if mode is None:
            return False
        if not self._is_plain(path):
            return True
        if stat.S_ISLNK(mode):
            return link_target(self._folder / path) != self._record.links.get(path)
        uncertain = self._record.files.get(path, _ABSENT) is None
        return not stat.S_ISREG(mode) or not (path in self._intact or uncertain)

    def _note(self, name: str) -> None:
        """Record how everything looks now."""
        record, manifest = self._record, self._manifest
        record.manifest = name
        record.links = {path: target for path, target in record.links.items() if path not in manifest.files}
        for path, entry in manifest.files.items():
            seen = signature((self._folder / path).lstat())
            record.files[path] = Put(entry, seen) if seen is not None else None
        for path in manifest.links:
            record.files.pop(path, None)

    def _is_plain(self, path: str) -> bool:
        """Whether no folder on the way to a path is a symbolic link."""
        return not any((self._folder / above).is_symlink() for above in _folders_of([path]))

    def _in_the_way(self, path: str, what: str) -> ResourceError:
        return ResourceError(
            f"{str(self._folder / path)!r} was made on the host and is in the way where {what}; "
            "move it, or rename yours. Nothing in the folder was changed"
        )


def _folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder above some paths, the outermost left out."""
    folders: set[str] = set()
    for path in paths:
        above = posixpath.dirname(path)
        while above and above not in folders:
            folders.add(above)
            above = posixpath.dirname(above)
    return folders


def _files_below(folder: Path, path: str) -> Iterable[str]:
    """Everything but folders below a path, as paths relative to `folder`."""
    stack = [path]
    while stack:
        above = stack.pop()
        with os.scandir(folder / above) as entries:
            for entry in entries:
                inner = f"{above}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    stack.append(inner)
                else:
                    yield inner


def _mode(path: Path) -> Optional[int]:
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
