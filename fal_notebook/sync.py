"""Find and read the files of the notebook's machine that a function wants beside it.

Runs in the notebook. Only regular files below the context folder are ever collected, each once; what
leaves that folder is refused, so that no link can carry a file away that the user did not name.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent.errors import AppFileUploadException, FileTooLargeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fal_agent.framing import Buffer

__all__ = ["FILE_LIMIT", "AppFile", "collect_app_files", "read_app_files"]

FILE_LIMIT = 1 << 30  # bytes of one file

_CHUNK = 1 << 20
_SETTLED = 2_000_000_000  # ns without a change after which a time stamp is taken as unique
_REMEMBERED = 100_000  # files whose digests are kept

_SMALL = 4 << 20  # bytes of a file up to which its content is held in memory
_MEMORY = 64 << 20  # bytes of such contents that are kept for the next call
_DISK = 4 << 30  # bytes of copies of larger files that are kept for the next call

_digests: dict[tuple[str, int, int, int, int], str] = {}
_contents: OrderedDict[str, Buffer] = OrderedDict()  # by digest, the latest used last
_lock = threading.Lock()


@dataclass(frozen=True)
class AppFile:
    """A file that goes along with a function.

    Attributes:
        relative_path: where it appears on the host, from the working folder; POSIX.
        path: where it is here.
        mode: its permission bits.
        digest: BLAKE3 of its content, 64 hex digits.
        size: bytes.
    """

    relative_path: str
    path: Path
    mode: int
    digest: str
    size: int


def collect_app_files(
    app_files: Sequence[str | os.PathLike[str]],
    *,
    ignore: Sequence[str] = (),
    context_dir: str | os.PathLike[str] | None = None,
) -> list[AppFile]:
    """Find the files that `app_files` names, and their digests.

    Files that are missing or cannot be read, and links to folders, are skipped with a warning;
    dangling and cyclic links inside of folders without one.

    Args:
        app_files: files and folders, relative to the context folder.
        ignore: regular expressions, searched in each relative POSIX path; a folder's ends with "/",
            and nothing below a folder that matches is looked at.
        context_dir: the context folder; default: the working folder.

    Returns:
        The files in order of their relative paths.

    Raises:
        FileTooLargeError: a file is larger than 1 GiB.
        AppFileUploadException: a path or link leads out of the context folder, two different files
            would be one on the host, or the context folder is not there.
    """
    context = Path.cwd() if context_dir is None else Path(context_dir).expanduser().absolute()
    if not context.is_dir():
        raise AppFileUploadException(
            f"app_files: the context folder {context} is not a folder; set app_files_context_dir", "."
        )
    collector = _Collector(context, [re.compile(pattern) for pattern in ignore])
    for name in app_files:
        collector.add(os.fspath(name))
    files = (_app_file(relative, path) for relative, path in sorted(collector.found.items()))
    return [file for file in files if file is not None]


class _Collector:
    """Walks what is named; holds for each relative path the file it stands for."""

    def __init__(self, context: Path, ignored: list[re.Pattern[str]]) -> None:
        self.context = context
        self.found: dict[str, Path] = {}
        self._real_context = os.path.realpath(context)
        self._ignored = ignored

    def add(self, name: str) -> None:
        """Add a file, or what is in a folder."""
        path = self.context / name  # opened as it is written: "a/../b" may pass through a link
        relative = self._relative(name)
        status = _status(path)
        is_folder = status is not None and stat.S_ISDIR(status.st_mode)
        if self._is_ignored(relative, is_folder):
            return
        self._check_inside(path, relative)
        if status is None:
            _mention(f"app_files: {name!r} is not in {self.context}, or cannot be read; it is skipped")
        elif is_folder and path.is_symlink():
            _mention(
                f"app_files: {name!r} is a link to a folder, which is not followed; name the folder itself"
            )
        elif is_folder:
            for inner, file in self._walk(path, "" if relative == "." else f"{relative}/"):
                self._add_file(inner, file)
        else:
            self._add_file(relative, path)

    def _relative(self, name: str) -> str:
        relative = os.path.relpath(self.context / name, self.context)
        if _is_outside(relative) and Path(name).is_absolute():  # written with the context's real path
            relative = os.path.relpath(name, self._real_context)
        if _is_outside(relative):
            raise self._leaves(name, os.path.realpath(self.context / name))
        return Path(relative).as_posix()

    def _is_ignored(self, relative: str, is_folder: bool) -> bool:
        if relative == ".":
            return False
        subject = f"{relative}/" if is_folder else relative
        return any(pattern.search(subject) for pattern in self._ignored)

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        """Yield the files in a folder with their relative paths."""
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            _mention(f"app_files: {folder} cannot be read and is skipped: {error.strerror}")
            return
        for entry in entries:
            relative = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if self._is_ignored(relative, is_folder):
                continue
            if is_folder:
                yield from self._walk(Path(entry.path), f"{relative}/")
            elif self._is_wanted(entry, relative):
                yield relative, Path(entry.path)

    def _is_wanted(self, entry: os.DirEntry[str], relative: str) -> bool:
        """Whether an entry is no link, or one to a file; dangling and cyclic ones lead nowhere."""
        if not entry.is_symlink():
            return True
        path = Path(entry.path)
        status = _status(path)
        if status is None or stat.S_ISDIR(status.st_mode):
            return False
        self._check_inside(path, relative)
        return True

    def _add_file(self, relative: str, path: Path) -> None:
        status = _status(path)
        if status is None:  # gone since it was listed
            return
        if not stat.S_ISREG(status.st_mode):
            _mention(f"app_files: {path} is not a regular file; it is skipped")
            return
        if status.st_size > FILE_LIMIT:
            raise FileTooLargeError(
                f"app_files: {path} has {status.st_size} bytes and a file may have {FILE_LIMIT}; "
                f"add {_pattern(relative)!r} to app_files_ignore, or bring the file to the host another way"
            )
        known = self.found.setdefault(relative, path)
        if known is not path and not known.samefile(path):
            raise AppFileUploadException(
                f"app_files: {known} and {path} would both be {relative!r} on the host; name one of them",
                relative,
            )

    def _check_inside(self, path: Path, relative: str) -> None:
        real = os.path.realpath(path)
        if os.path.commonpath([real, self._real_context]) != self._real_context:
            raise self._leaves(relative, real)

    def _leaves(self, relative: str, real: str) -> AppFileUploadException:
        return AppFileUploadException(
            f"app_files: {relative!r} leads to {real}, out of the context folder {self.context}; add "
            f"{_pattern(relative)!r} to app_files_ignore, or set app_files_context_dir to a folder of both",
            relative,
        )


def _is_outside(relative: str) -> bool:
    return relative == os.pardir or relative.startswith(os.pardir + os.sep)


def _pattern(relative: str) -> str:
    return f"^{re.escape(relative)}$"


def _mention(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


# ---------------------------------------------------------------- contents


def read_app_files(files: Sequence[AppFile]) -> tuple[list[list[Any]], dict[str, Buffer]]:
    """Read collected files, for a call that takes them along.

    The content is a copy, in memory or in an unnamed temporary file, so that whatever happens to the
    files while they are sent, each blob is what its name says.

    Returns:
        For `Call.files` a list [relative path, blob, mode] of each file, and the blobs by name.

    Raises:
        AppFileUploadException: a file is gone or cannot be read, or there is no room for its copy.
    """
    listed: list[list[Any]] = []
    blobs: dict[str, Buffer] = {}
    for file in files:
        digest, content = _content(file)
        blob = f"b3-{digest}"
        listed.append([file.relative_path, blob, file.mode])
        blobs[blob] = content
    return listed, blobs


def _content(file: AppFile) -> tuple[str, Buffer]:
    with _lock:
        known = _contents.get(file.digest)
        if known is not None:
            _contents.move_to_end(file.digest)
            return file.digest, known
    try:
        digest, content = _copied(file.path)
    except OSError as error:
        raise AppFileUploadException(
            f"app_files: {file.path} cannot be read: {error.strerror or error}; larger files are copied to "
            f"{tempfile.gettempdir()} first (TMPDIR names another folder)",
            file.relative_path,
        ) from error
    with _lock:
        _contents[digest] = content
        _evict()
    return digest, content


def _copied(path: Path) -> tuple[str, Buffer]:
    """Digest and content of a file, which may have changed since it was collected."""
    from blake3 import blake3

    with path.open("rb") as source:
        head = source.read(_SMALL + 1)
        state = blake3(head)
        if len(head) <= _SMALL:
            return state.hexdigest(), head
        with tempfile.TemporaryFile() as copy:
            copy.write(head)
            while chunk := source.read(_CHUNK):
                state.update(chunk)
                copy.write(chunk)
            copy.flush()
            return state.hexdigest(), memoryview(mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ))


def _evict() -> None:
    """Let go of the contents used longest ago, beyond what may be kept; the caller holds the lock."""
    room = {True: _MEMORY, False: _DISK}
    for digest, content in reversed(list(_contents.items())):
        is_small = isinstance(content, bytes)
        room[is_small] -= len(content)
        if room[is_small] < 0:
            del _contents[digest]


# ---------------------------------------------------------------- digests


def _app_file(relative: str, path: Path) -> AppFile | None:
    try:
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        digest, size = _digests.get(key), status.st_size
        if digest is None:
            digest, size = _digest(path)
            _remember(key, digest)
    except OSError as error:
        _mention(f"app_files: {path} cannot be read and is skipped: {error.strerror}")
        return None
    return AppFile(relative, path, stat.S_IMODE(status.st_mode), digest, size)


def _digest(path: Path) -> tuple[str, int]:
    """Digest and size; not mapped into memory, where a file that is cut meanwhile would kill the process."""
    from blake3 import blake3

    state, size = blake3(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            size += len(chunk)
    return state.hexdigest(), size


def _remember(key: tuple[str, int, int, int, int], digest: str) -> None:
    _path, modified, changed, _size, _inode = key
    # Two changes within one tick of the file system's clock look the same.
    if time.time_ns() - max(modified, changed) < _SETTLED:
        return
    while len(_digests) >= _REMEMBERED:
        _digests.pop(next(iter(_digests)))
    _digests[key] = digest
