"""The host's store of files that apps give away by URL.

Runs wherever user code runs, and in the server of an app. A file lies at `<sha256>/<name>`, named by its
content, and appears whole or not at all; names that come from outside are checked before they touch the
disk. The host's agent removes what nobody has fetched for long (`fal_agent.server.filestore`).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import mimetypes
import os
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Optional
from urllib.parse import quote, unquote, urlsplit

from fal_agent.runtime.toolkit.directories import files_folder, made

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator

__all__ = [
    "DATA_URI_LIMIT",
    "DIGEST",
    "FILES_URL",
    "INCOMING",
    "Kept",
    "changing_store",
    "content_type_of",
    "copied",
    "data_uri",
    "find_kept",
    "keep",
    "kept_at",
    "safe_name",
    "url_for",
    "written_whole",
]

FILES_URL: ContextVar[Optional[str]] = ContextVar("FILES_URL", default=None)  # before $FAL_FILES_URL
DATA_URI_LIMIT = 8 << 20  # bytes; beyond that a URL that holds the data is of no use to anybody

DIGEST = re.compile(r"[0-9a-f]{64}")  # names of the store's folders
INCOMING = ".incoming-"  # what names of files begin with that are not whole yet

_CHUNK = 1 << 20
_USE_NOTED = 600.0  # seconds after a noted use of a file in which another is not noted
_NAME_LIMIT = 200  # bytes; file systems allow 255
_UNWANTED = re.compile(r"[\x00-\x1f\x7f/\\]+")
_OURS = re.compile(r".*/\.fal/files/([0-9a-f]{64})/([^/]+)")


@dataclass(frozen=True)
class Kept:
    """A file in the store."""

    path: Path
    digest: str  # SHA-256, 64 hex digits
    name: str
    size: int  # bytes


def keep(source: BinaryIO, name: str) -> Kept:
    """Put what can be read from `source` into the store.

    Args:
        source: read to its end, in pieces.
        name: what the file is called for those who fetch it; made safe.

    Raises:
        OSError: there is no room, or the store cannot be written.
    """
    name = safe_name(name)
    store = made(files_folder())
    digest, size = hashlib.sha256(), 0
    beside = store / f"{INCOMING}{uuid.uuid4().hex}"
    try:
        with _created(beside) as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                size += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        with changing_store(store):
            path = made(store / digest.hexdigest()) / name
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return Kept(path, digest.hexdigest(), name, size)


@contextlib.contextmanager
def changing_store(store: Path) -> Iterator[None]:
    """Hold the lock under which files of the store come and go; never for long."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(store.with_name(f"{store.name}.lock"), flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find_kept(digest: str, name: str) -> Optional[Path]:
    """Give the path of a file in the store, or None if there is none by that digest and name.

    Links are not followed, and names that could lead elsewhere are in no store.
    """
    if not DIGEST.fullmatch(digest) or not name or name != safe_name(name):
        return None
    folder = files_folder() / digest
    path = folder / name
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        return None
    _note_use(path)
    return path


def _note_use(path: Path) -> None:
    """Set a file's time to now: those that nobody fetches go first."""
    with contextlib.suppress(OSError):  # it has just gone, or is another user's
        if time.time() - path.stat().st_mtime > _USE_NOTED:
            os.utime(path)


def kept_at(url: str) -> Optional[Path]:
    """Give the path of the file that a URL of the store stands for, or None.

    The digest in it says what the content is, so it does not matter by which address it was reached.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        match = _OURS.fullmatch(parts.path)
        return find_kept(match[1], unquote(match[2])) if match else None
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        path = Path(unquote(parts.path))
        found = find_kept(path.parent.name, path.name)
        return found if found == path else None
    return None


def url_for(source: BinaryIO, size: int, name: str, content_type: str) -> str:
    """Keep a file and give a URL for it.

    That is `<base>/<sha256>/<name>` where the app's server has said its base, in `FILES_URL` for the
    request or in the environment variable FAL_FILES_URL for the process. Without a server, up to
    8 MiB are a data: URI, which holds the data and keeps nothing; more is a file: URL, of use on this host.

    Raises:
        OSError: there is no room, or the store cannot be written.
    """
    base = FILES_URL.get() or os.environ.get("FAL_FILES_URL")
    if not base and size <= DATA_URI_LIMIT:
        return data_uri(source.read(), content_type)
    kept = keep(source, name)
    return f"{base.rstrip('/')}/{kept.digest}/{quote(kept.name)}" if base else kept.path.as_uri()


def data_uri(data: bytes, content_type: str) -> str:
    """Give a URL that holds the data."""
    return f"data:{content_type};base64,{base64.b64encode(data).decode('ascii')}"


def safe_name(name: str) -> str:
    """Give a name that is one file's in one folder: no separators, not hidden, at most 200 bytes."""
    plain = _UNWANTED.sub("_", name.encode("utf-8", "replace").decode()).strip().lstrip(".")
    if len(plain.encode()) > _NAME_LIMIT:
        stem, dot, extension = plain.rpartition(".")
        extension = dot + extension if stem and len(extension.encode()) < _NAME_LIMIT // 4 else ""
        room = _NAME_LIMIT - len(extension.encode())
        plain = plain.encode()[:room].decode("utf-8", "ignore").rstrip() + extension
    return plain or "file"


def content_type_of(name: str) -> str:
    """Guess what is in a file by its name."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def written_whole(path: Path, fill: Callable[[BinaryIO], None], *, overwrite: bool = True) -> None:
    """Write a file beside its place and put it there when `fill` has ended well.

    Raises:
        FileExistsError: it exists and is not to be overwritten.
        OSError: there is no room, or the folder cannot be written.
    """
    beside = path.with_name(f".{safe_name(path.name)[:100]}-{uuid.uuid4().hex[:8]}")
    try:
        with _created(beside) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            beside.replace(path)
        else:
            os.link(beside, path)  # unlike a rename, it fails if somebody else was quicker
    finally:
        beside.unlink(missing_ok=True)


def copied(source: BinaryIO, target: BinaryIO, *, limit: int, too_large: Callable[[], Exception]) -> int:
    """Copy in pieces and give the size in bytes; raises what `too_large` makes beyond the limit."""
    size = 0
    while chunk := source.read(_CHUNK):
        size += len(chunk)
        if size > limit:
            raise too_large()
        target.write(chunk)
    return size


def _created(path: Path) -> io.BufferedWriter:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb")
