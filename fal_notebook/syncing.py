"""`sync_dir`: bring a local folder to a host's data folder, and only what changed in it.

Runs in the notebook. The work is done in a thread of its own, so that Ctrl-C ends it between two
parts of a file and never cuts a message in two; what has arrived stays for the next try.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError, ResourceError
from fal_agent.mirror.manifests import Manifest, is_inside, piece_blob
from fal_notebook.digests import Digests
from fal_notebook.hosts.base import KeepsData
from fal_notebook.hosts.registry import get_host
from fal_notebook.manifest import Listing, digest, list_folder, read_piece

if TYPE_CHECKING:
    from pathlib import Path

    from fal_notebook.hosts.base import Host

__all__ = ["sync_dir"]

_STEP_TIMEOUT = 6 * 3600.0  # seconds; a step may copy large files on the host's disk
_BUSY_SECONDS = 0.2  # between two looks whether another sync_dir has ended
_DRAW_SECONDS = 0.1
_TRIES = 3  # for one piece that does not arrive
_NAMED = 20  # paths in a warning


def sync_dir(
    local_dir: str | Path,
    remote_dir: str,
    force_upload: bool = False,
    *,
    host: str | Host | None = None,
) -> str:
    """Make a folder below /data on a host hold what a local folder holds.

    Files that `.gitignore` files in the folder leave out stay here, and so does `.git`. Contents that
    the host has do not travel, be it under another name. Files that an earlier `sync_dir` of the same
    folder put there and that are gone here are removed there; what remote code made stays. A broken
    transfer goes on where it was. Nothing is written to the local folder.

    Args:
        local_dir: the folder; "~" is your home.
        remote_dir: "/data" or below it.
        force_upload: send every file, also those that the host has.
        host: where to; default: the current host.

    Returns:
        The folder's path for code that runs on that host.

    Raises:
        ValueError: `remote_dir` is not in /data, or leads out of it over there.
        FileNotFoundError, NotADirectoryError: `local_dir` is no folder.
        ResourceError: the host's disk has no room, or what remote code made is in the way.
        HostError: the host cannot be reached, or the connection broke.
        FalServerlessError: the host has no data folder, or refuses.
    """
    directory = _directory(remote_dir)
    local = os.path.realpath(os.path.expanduser(local_dir))  # noqa: PTH111 - names need not be text
    if not os.path.exists(local):  # noqa: PTH110
        raise FileNotFoundError(f"sync_dir: {os.fspath(local_dir)!r} does not exist ({local})")
    if not os.path.isdir(local):  # noqa: PTH112
        raise NotADirectoryError(f"sync_dir: {os.fspath(local_dir)!r} is not a folder; name the one it is in")
    target = get_host(host)
    if not isinstance(target, KeepsData):
        raise FalServerlessError(f"{target.name!r} has no data folder, so nothing can be synced to it")
    connect = getattr(target, "connect", None)
    if connect is not None:
        connect()  # here and not in the thread: it may ask for a password
    return _Sync(local, directory, target, force=force_upload).run()


def _directory(remote_dir: str) -> str:
    """The path below the data root, "" for the root itself.

    Raises:
        ValueError: it is not in there.
    """
    parts = [part for part in str(remote_dir).split("/") if part not in ("", ".")]
    directory = "/".join(parts[1:])
    if (
        not str(remote_dir).startswith("/")
        or parts[:1] != ["data"]
        or (directory and not is_inside(directory))
    ):
        raise ValueError(f"sync_dir: the remote folder must be /data or below it, not {remote_dir!r}")
    return directory


class _Stopped(BaseException):
    """The main thread does not wait any more."""


class _ChangedError(Exception):
    """A file is not what it was when it was listed."""

    def __init__(self, relative: str) -> None:
        super().__init__(relative)
        self.relative = relative


class _Sync:
    """One call of `sync_dir`."""

    def __init__(self, local: str, directory: str, host: KeepsData, *, force: bool) -> None:
        self._local, self._directory, self._host, self._force = local, directory, host, force
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._read = self._sent = self._due = 0  # bytes
        self._result: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._listing = Listing()

    def run(self) -> str:
        """Do it, and show how far it is."""
        line = _Line()
        line.say("Syncing...")
        thread = threading.Thread(target=self._work, name="fal-sync", daemon=True)
        try:
            thread.start()  # an interrupt may come in here already
            while not self._ended.wait(_DRAW_SECONDS):
                line.draw(self._progress())
        finally:
            self._stop.set()
            line.clear()
        for reason, paths in self._listing.notes.items():
            _warn(f"sync_dir: in {self._local} these {reason}: {_names(paths)}")
        if self._error is not None:
            raise self._error
        there = self._result.get("changed_there")
        if there:
            names = _names(there, self._result["unnamed"])
            _warn(f"sync_dir: gone here but changed on {self._host.name!r}, where they stay: {names}")
        place = f"/data/{self._directory}".rstrip("/")
        if self._result["state"] == "same":
            line.say(f"{self._local} is already uploaded and matches {place} on {self._host.name!r}")
        else:
            line.say(
                f"Done: {place} on {self._host.name!r}, {_size(self._sent)} sent, files written: "
                f"{self._result['changed']}, removed: {self._result['removed']}"
            )
        return str(self._result["path"])

    def _progress(self) -> str:
        if self._due:
            return f"Syncing... {_size(self._sent)} of {_size(self._due)} sent"
        return f"Syncing... {_size(self._read)} read"

    # ------------------------------------------------------------ in the thread

    def _work(self) -> None:
        try:
            self._result = self._follow_changes()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            self._error = error
        finally:
            self._ended.set()

    def _follow_changes(self) -> dict[str, Any]:
        """List and send; list again if a file changed before it was sent, and leave out what never rests."""
        changes: Counter[str] = Counter()
        while True:
            unstable = [relative for relative, count in changes.items() if count > 1]
            with Digests() as digests:
                self._listing = list_folder(self._local, digests, unstable=unstable, tell=self._was_read)
            try:
                return self._send(self._listing.manifest)
            except _ChangedError as error:
                changes[error.relative] += 1

    def _send(self, manifest: Manifest) -> dict[str, Any]:
        content = manifest.to_bytes()
        name = f"sync-manifest-{digest(content)}"
        places = {
            piece: (relative, index)
            for relative, entry in manifest.files.items()
            for index, piece in enumerate(entry.pieces)
        }
        tries: Counter[str] = Counter()
        while True:
            answer = self._step(name)
            state = answer["state"]
            if state in ("done", "same"):
                return answer
            if state == "manifest":
                self._upload(name, content, tries)
                continue
            self._force = False  # the host has let go of what it had; from here on it is gathered anew
            self._due = self._sent + answer["bytes"]
            for piece in answer["pieces"]:
                relative, index = places[piece]
                self._upload(piece_blob(piece), self._piece(relative, index, piece), tries)

    def _step(self, name: str) -> dict[str, Any]:
        while True:
            self._check()
            answer: dict[str, Any] = self._host.ask(
                "sync", timeout=_STEP_TIMEOUT, directory=self._directory, manifest=name, force=self._force
            )
            if answer["state"] == "refused":
                kind = ValueError if answer["kind"] == "value" else ResourceError
                raise kind(f"{self._host.name!r}: {answer['message']}")
            if answer["state"] != "busy":
                return answer
            self._stop.wait(_BUSY_SECONDS)

    def _piece(self, relative: str, index: int, piece: str) -> bytes:
        try:
            data = read_piece(self._local, relative, index)
        except OSError:
            raise _ChangedError(relative) from None
        if digest(data) != piece:
            raise _ChangedError(relative)
        return data

    def _upload(self, name: str, data: bytes, tries: Counter[str]) -> None:
        self._check()
        tries[name] += 1
        if tries[name] > _TRIES:
            raise FalServerlessError(
                f"{self._host.name!r} lost what was sent to it {_TRIES} times over; try again when nobody "
                "else syncs the same folder"
            )
        try:
            self._host.upload(name, data, self._stop)
        except FalServerlessError:
            raise
        except OSError as error:
            raise ResourceError(
                f"{len(data):,} bytes cannot be kept on {self._host.name!r}: {error}; free some space there. "
                "What has arrived stays: a second try sends the rest"
            ) from error
        if not name.startswith("sync-manifest-"):
            self._sent += len(data)

    def _was_read(self, size: int) -> None:
        self._read += size
        self._check()

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped


class _Line:
    """One line that says how far it is, where lines can be written anew."""

    def __init__(self) -> None:
        self._length = 0
        self._is_live = _is_live()

    def say(self, text: str) -> None:
        """Write a line that stays."""
        print(text, flush=True)  # noqa: T201

    def draw(self, text: str) -> None:
        """Write the line anew."""
        if self._is_live:
            print(f"\r{text.ljust(self._length)}", end="", flush=True)  # noqa: T201
            self._length = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self._length:
            print(f"\r{' ' * self._length}\r", end="", flush=True)  # noqa: T201
            self._length = 0


def _is_live() -> bool:
    from fal_notebook.display import in_kernel

    with contextlib.suppress(AttributeError, ValueError):  # replaced by something odd, or closed
        return in_kernel() or sys.stdout.isatty()
    return False


def _names(paths: list[str], unnamed: int = 0) -> str:
    unnamed += len(paths[_NAMED:])
    shown = ", ".join(map(repr, paths[:_NAMED]))
    return f"{shown} and {unnamed} more" if unnamed else shown


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:.4g} TB"
