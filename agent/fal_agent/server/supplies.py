"""Have a notebook bring the packages and the Python that this host cannot download.

Runs in the agent. A build that meets no package index says what it lacks (`wire.Want`) to a notebook that
waits for it, and goes on when that has answered the question "supply". Wheels gather in `wheels/` below the
root, where uv finds them in place of an index; interpreters in `pythons/`.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import shutil
import tarfile
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import CallCancelledError, EnvironmentBuildError
from fal_agent.folders import appearing_whole
from fal_agent.wire import Want

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from fal_agent.server.blobs import BlobStore
    from fal_agent.server.environments.unreachable import Lacking
    from fal_agent.server.prepared import Preparation
    from fal_agent.server.rpc import Connection

__all__ = ["Supplies"]

_log = logging.getLogger(__name__)
BUDGET_BYTES = 20 << 30
_PATIENCE = 900.0  # seconds without a word from a connected notebook
_LOOK_EVERY = 0.5  # seconds between two looks whether the notebook is still there
_WHEEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+!-]{0,250}\.whl")
_PYTHON = re.compile(r"cpython-[A-Za-z0-9_.+-]{1,100}")
_SYSTEMS_OWN = ("lib/libstdc++", "lib/libgcc_s")
_COPY = 1 << 20  # bytes copied at once


class Supplies:
    """What notebooks are asked to bring.

    Args:
        root: the agent's folder.
        blobs: where what they bring arrives.
        budget_bytes: that wheels may take on the disk.
    """

    def __init__(self, root: Path, blobs: BlobStore, budget_bytes: int = BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self._wheels, self._pythons, self._blobs = root / "wheels", root / "pythons", blobs
        self._requests: dict[str, _Request] = {}

    def asker(
        self, preparation: Preparation, loop: asyncio.AbstractEventLoop
    ) -> Callable[[Lacking, EnvironmentBuildError], None]:
        """Give what a build calls, in its thread, with what it lacks and the error that says so.

        It returns when a notebook has brought all of it, and raises the error if there is none that can.
        """

        def ask(lacking: Lacking, error: EnvironmentBuildError) -> None:
            request = _Request(preparation, lacking, self._have())
            self._requests[request.request_id] = request
            try:
                loop.call_soon_threadsafe(request.send)
                request.wait(loop, error)
            finally:
                del self._requests[request.request_id]

        return ask

    # ------------------------------------------------------------ what notebooks say

    def missing(self, blobs: list[str]) -> list[str]:
        """Which of these blobs are not here."""
        return [name for name in blobs if not self._blobs.has(name)]

    def note(self, request: str, text: str) -> None:
        """A notebook says how far it has come."""
        known = self._requests.get(request)
        if known is not None:
            known.heard(text)

    def take(self, request: str, files: list[list[Any]], error: str) -> None:
        """Put what a notebook has brought in its place; runs in a thread.

        Args:
            request: which of ours it answers.
            files: [name, SHA-256, names of the blobs that make it up] each.
            error: why it brings nothing; empty if it does.

        Raises:
            OSError: something cannot be written.
            EnvironmentBuildError: what came is not what was announced.
        """
        known = self._requests.get(request)
        if known is None:
            return
        if not error:
            for name, digest, parts in files:
                self._put(str(name), str(digest), [str(part) for part in parts])
            self._bound({str(name) for name, _, _ in files})
        known.answered(error)

    def _have(self) -> list[str]:
        try:
            return sorted(path.name for path in self._wheels.iterdir() if _WHEEL.fullmatch(path.name))
        except FileNotFoundError:
            return []

    def _bound(self, kept: set[str]) -> None:
        """Remove the oldest wheels beyond the budget; environments that are there need them no more."""
        found = [(path.stat(), path) for path in self._wheels.glob("*.whl")]
        total = sum(facts.st_size for facts, _ in found)
        for facts, path in sorted(found, key=lambda item: item[0].st_mtime):
            if total <= self.budget_bytes:
                return
            if path.name not in kept:
                path.unlink(missing_ok=True)
                total -= facts.st_size

    def _put(self, name: str, digest: str, parts: list[str]) -> None:
        is_python = name.endswith(".tar.gz") and _PYTHON.fullmatch(name[:-7]) is not None
        if not is_python and not _WHEEL.fullmatch(name):
            raise EnvironmentBuildError(f"{name!r:.80} is the name of no wheel and no Python", "")
        folder = self._pythons if is_python else self._wheels
        folder.mkdir(mode=0o700, exist_ok=True)
        beside = folder / f".{uuid.uuid4().hex}"
        try:
            self._gather(beside, name, digest, parts)
            if is_python:
                _unpack(beside, folder / name[:-7])
            else:
                beside.replace(folder / name)
        finally:
            beside.unlink(missing_ok=True)

    def _gather(self, target: Path, name: str, digest: str, parts: list[str]) -> None:
        hasher = hashlib.sha256()
        with target.open("xb") as file:
            for part in parts:
                path = self._blobs.path(part)
                if path is None:
                    raise EnvironmentBuildError(f"a part of {name} has not arrived", "")
                with path.open("rb") as source:
                    while data := source.read(_COPY):
                        hasher.update(data)
                        file.write(data)
        if hasher.hexdigest() != digest:
            raise EnvironmentBuildError(f"{name} arrived damaged: its SHA-256 is another one", "")


class _Request:
    """One thing that a build lacks, until a notebook has answered."""

    def __init__(self, preparation: Preparation, lacking: Lacking, have: list[str]) -> None:
        self.request_id = uuid.uuid4().hex
        self._preparation, self._lacking, self._have = preparation, lacking, have
        self._answered = threading.Event()
        self._error = ""
        self._heard = time.monotonic()
        self._asked: Optional[Connection] = None

    def send(self) -> None:
        """Ask a notebook, unless the one that was asked is still there; on the event loop."""
        if self._asked is not None and self._asked.is_open:
            return
        run = next((run for run in self._preparation.runs if self._can_bring(run.connection)), None)
        if run is None or run.connection is None:
            return
        self._asked, self._heard = run.connection, time.monotonic()
        libc, version = platform.libc_ver()
        run.connection.send(
            Want(
                run_id=run.run_id,
                request_id=self.request_id,
                python=self._lacking.python,
                layers=self._lacking.layers,
                wants_python=self._lacking.wants_python,
                machine=platform.machine(),
                libc=f"{libc} {version}" if libc else "musl",
                have=self._have,
            )
        )

    def wait(self, loop: asyncio.AbstractEventLoop, error: EnvironmentBuildError) -> None:
        """Wait for the answer; in the thread of the build.

        Raises:
            EnvironmentBuildError: `error`, with why no notebook can help.
            CallCancelledError: nobody waits for the build any more.
        """
        while not self._answered.wait(_LOOK_EVERY):
            if self._preparation.cancelled.is_set():
                raise CallCancelledError("cancelled while the notebook brought what the host lacks")
            if self._asked is None and not self._has_hope():
                raise error
            if self._asked is not None and time.monotonic() - self._heard > _PATIENCE:
                self._error = f"it said nothing for {_PATIENCE:g} s"
                break
            loop.call_soon_threadsafe(self.send)
        if self._error:
            raise EnvironmentBuildError(
                f"{error}\nThe notebook could not bring it either: {self._error}", error.log
            )

    def heard(self, text: str) -> None:
        """The notebook is at it."""
        self._heard = time.monotonic()
        self._preparation.stage("build", text)

    def answered(self, error: str) -> None:
        """The notebook has done what it can."""
        self._error = error
        self._answered.set()

    def _has_hope(self) -> bool:
        """Whether a notebook that can bring things is there, or may come back."""
        connections = [run.connection for run in self._preparation.runs]
        return any(one is None or self._can_bring(one) for one in connections)

    @staticmethod
    def _can_bring(connection: Optional[Connection]) -> bool:
        """Whether a notebook is connected, and on another machine: here it would find no index either."""
        return connection is not None and connection.is_open and not connection.shares_files


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack an interpreter that our own notebook packed."""
    if folder.is_dir():
        return
    with appearing_whole(folder) as beside, tarfile.open(archive, "r:gz") as packed:
        root = beside.resolve()
        for member in packed:
            target = (root / member.name).resolve()
            if member.name.startswith(_SYSTEMS_OWN):
                continue  # a host that lacks only a version of Python has these
            is_link = member.issym() and "/" not in member.linkname
            if root not in target.parents or not (member.isfile() or is_link):
                raise EnvironmentBuildError(f"{member.name!r:.80} has no place in a Python", "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_link:
                target.symlink_to(member.linkname)
                continue
            source = packed.extractfile(member)
            assert source is not None
            with target.open("xb") as file:
                shutil.copyfileobj(source, file, _COPY)
            target.chmod(0o700 if member.mode & 0o100 else 0o600)
