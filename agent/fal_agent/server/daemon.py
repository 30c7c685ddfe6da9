"""Start the agent once per user and source digest, listen on its socket, and end it when idle.

Runs on the host. The agent holds a lock for as long as it lives, so that of several that are started
at once one serves and the others leave it to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import FalServerlessError
from fal_agent.paths import run_folder, socket_path, state_folder
from fal_agent.server.blobs import BlobStore
from fal_agent.server.datafolder import DataFolder
from fal_agent.server.devices import Devices
from fal_agent.server.environments.cache import EnvironmentCache
from fal_agent.server.environments.uv import Uv
from fal_agent.server.filestore import FileLimits, prune_files
from fal_agent.server.functions import FunctionStore
from fal_agent.server.gpus import GpuLender
from fal_agent.server.journal import Journal
from fal_agent.server.machine import Match, machine_facts, match
from fal_agent.server.pool import Pool
from fal_agent.server.questions import Questions
from fal_agent.server.reaper import Reaper
from fal_agent.server.rpc import Connection
from fal_agent.server.service import Service
from fal_agent.server.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_agent.server.prepared import WorkerKey
    from fal_agent.server.runs import Run
    from fal_agent.wire import Resources

__all__ = ["AgentSettings", "serve", "start"]

_log = logging.getLogger(__name__)
_HOUSEKEEPING = 60.0  # seconds between looks at what may be removed
_LOG_LIMIT = 4 << 20
_RETRIES = 1  # of uv; more would take 20 s on a host without internet, where a notebook brings what is needed


@dataclass(frozen=True)
class AgentSettings:
    """What the user has chosen for an agent; for one that runs already it is too late.

    Attributes:
        idle: seconds after which an unused agent ends.
        labels: of this machine, for `regions` and machine types.
        files: bounds of the store of files that apps give away.
    """

    idle: float = 600.0
    labels: list[str] = field(default_factory=list)
    files: FileLimits = field(default_factory=FileLimits)


def start(root: Path, digest: str, settings: AgentSettings, *, timeout: float = 30.0) -> dict[str, Any]:
    """Make sure that the agent listens, and say where.

    Args:
        root: the folder of everything it keeps.
        digest: of the sources that this very process runs.
        settings: what the user has chosen.
        timeout: seconds to wait for it.

    Returns:
        "socket": path.

    Raises:
        FalServerlessError: it did not come up; the message holds the end of its log.
    """
    path, run, state = socket_path(root, digest), run_folder(root, digest), state_folder(root)
    for folder in (root, *(() if state == root else (state.parent, state)), run.parent, run, path.parent):
        _make_private(folder)
    deadline = time.monotonic() + timeout
    process: Optional[subprocess.Popen[bytes]] = None
    while not _listens(path):
        if process is None or process.poll() is not None:
            process = _spawn(root, digest, run, settings)
        if time.monotonic() > deadline:
            raise FalServerlessError(
                f"the agent did not come up within {timeout:g} s; its log ends:\n{_tail(run)}"
            )
        time.sleep(0.01)
    return {"socket": str(path)}


def _spawn(root: Path, digest: str, run: Path, settings: AgentSettings) -> subprocess.Popen[bytes]:
    log_path = run / "agent.log"
    if log_path.exists() and log_path.stat().st_size > _LOG_LIMIT:
        log_path.replace(run / "agent.log.1")
    command = [
        sys.executable,
        "-m",
        "fal_agent",
        "serve",
        "--root",
        str(root),
        "--digest",
        digest,
        "--idle",
        str(settings.idle),
        "--files-gb",
        str(settings.files.budget_bytes / 1e9),
        "--files-days",
        str(settings.files.age_seconds / 86400),
    ]
    for label in settings.labels:
        command += ["--label", label]
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
        )


def serve(root: Path, digest: str, settings: AgentSettings) -> int:
    """Be the agent until idle or told to end; at once if there is one already. Gives the exit status."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    os.umask(0o077)
    run = run_folder(root, digest)
    with _lock(run / "agent.lock") as locked:
        if not locked:
            return 0
        path = socket_path(root, digest)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # of an agent that was killed; we hold the lock, so nobody listens there
        _provide_temporary_folder(run / "tmp")
        (run / "python").write_text(sys.executable)  # for a client that only wants to know where we are
        try:
            asyncio.run(_Agent(root, digest, settings).run(path))
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return 0


class _Agent:
    """The agent's parts put together."""

    def __init__(self, root: Path, digest: str, settings: AgentSettings) -> None:
        self._root, self._digest, self._settings = root, digest, settings
        self._run_folder, state = run_folder(root, digest), state_folder(root)
        self._locks = state / "locks"  # of this machine's GPUs
        self._journal = Journal(state / "journal-1.sqlite3", on_error=_log.warning)
        self._blobs = BlobStore(root / "blobs")
        self._functions = FunctionStore()
        self._environments = EnvironmentCache(root, lambda: Uv.find(root, retries=_RETRIES))
        self._reaper = Reaper(on_error=_log.warning)
        self._facts = machine_facts(root)
        self._idle_since = time.monotonic()

    async def run(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ended.set)
        self._reaper.start()
        self._journal.mark_lost()
        (self._root / "data").mkdir(mode=0o700, exist_ok=True)
        self._pool = self._make_pool()
        self._service = self._make_service()
        listener = _listener(path)
        server = await loop.create_unix_server(
            lambda: Connection(self._service.handle, self._service.lost, self._blobs.parts_with_size),
            sock=listener,
        )
        gc.freeze()  # what is there now stays: collections need not look at it again
        _log.info("agent %s serves at %s with Python %s", os.getpid(), path, platform.python_version())
        try:
            await self._keep_house()
        finally:
            server.close()
            for connection in list(self._service.connections):
                connection.close()
            await self._end_workers()
            self._journal.close()
            self._reaper.close()
        _log.info("agent %s ends", os.getpid())

    def _make_pool(self) -> Pool:
        def make_worker(key: WorkerKey) -> Worker:
            return Worker(
                key,
                functions=self._functions,
                blobs=self._blobs,
                on_ready=lambda worker: self._pool.worker_ready(worker),  # noqa: PLW0108
                on_release=self._release,
                on_gone=lambda worker: self._pool.worker_gone(worker),  # noqa: PLW0108
                on_lane=lambda worker, message: self._service.lanes.on_message(worker, message),  # noqa: PLW0108
                on_lane_lost=lambda worker: self._service.lanes.worker_died(worker),  # noqa: PLW0108
            )

        logs = self._run_folder / "workers"
        logs.mkdir(mode=0o700, exist_ok=True)
        return Pool(
            root=self._root,
            code=Path(__file__).resolve().parents[2],
            log_folder=logs,
            slots=max(2, self._facts.cores),
            devices=Devices(GpuLender(locks=self._locks)),
            reaper=self._reaper,
            make_worker=make_worker,
            is_connected=lambda client: self._service.is_connected(client),  # noqa: PLW0108 - made later
        )

    def _release(self, worker: Worker, run: Run) -> None:
        self._pool.release(worker, run)
        if not self._pool.has_waiting(worker):
            self._service.lanes.consider(worker, run)

    def _match(self, resources: Resources) -> Match:
        return match(resources, self._facts, self._settings.labels)

    def _make_service(self) -> Service:
        questions = Questions(
            environments=self._environments,
            journal=self._journal,
            pool=self._pool,
            apps=lambda: self._service.apps,
            supplies=lambda: self._service.supplies,
            catch_up=lambda: self._service.lanes.take_all(),  # noqa: PLW0108 - made later
            data=DataFolder(self._root / "data", self._blobs),
            blobs=self._blobs,
            match=self._match,
            is_watching=lambda client: self._service.is_watching(client),  # noqa: PLW0108 - made later
            shut_down=self._ended.set,
        )
        return Service(
            root=self._root,
            python=platform.python_version(),
            pid=os.getpid(),
            journal=self._journal,
            blobs=self._blobs,
            functions=self._functions,
            environments=self._environments,
            pool=self._pool,
            questions=questions,
            socket_folder=socket_path(self._root, self._digest).parent,
            match=self._match,
        )

    async def _keep_house(self) -> None:
        """End idle workers, and this agent when nobody has used it for long enough."""
        loop = asyncio.get_running_loop()
        cleaned = time.monotonic()
        while not self._ended.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 0.25)
            now = time.monotonic()
            self._service.lanes.tend()
            self._service.apps.tend()
            self._pool.tend()
            if self._service.connections or self._service.active_runs() or self._pool.workers:
                self._idle_since = now
            elif now - self._idle_since > self._settings.idle:
                return
            if now - cleaned > _HOUSEKEEPING:
                cleaned = now
                await loop.run_in_executor(None, self._clean)

    def _clean(self) -> None:
        """Remove what is not kept any longer; what cannot be removed now is tried again the next time."""
        with self._told_if_refused():
            self._blobs.remove(self._journal.retain().blobs)
            in_use = {name for run in self._service.active_runs() for name in run.blobs}
            self._blobs.prune(in_use | self._journal.blobs())
        with self._told_if_refused():
            prune_files(self._root / "data" / ".fal" / "files", self._settings.files)

    @contextlib.contextmanager
    def _told_if_refused(self) -> Iterator[None]:
        """Log that the disk refuses, as a full one does, or one that somebody else cleans: runs go on."""
        try:
            yield
        except OSError as error:
            _log.warning("could not clean %s: %s", self._root, error)

    async def _end_workers(self) -> None:
        self._pool.end_all()
        deadline = time.monotonic() + 5.0
        while self._pool.workers and time.monotonic() < deadline:  # noqa: ASYNC110 - the loop is about to end
            await asyncio.sleep(0.05)


def _listener(path: Path) -> socket.socket:
    """A listening socket that only this user can reach (the umask is 077)."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(64)
    listener.setblocking(False)
    return listener


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def _provide_temporary_folder(folder: Path) -> None:
    """Where the machine has no folder for temporary files that can be written, have one of our own."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)  # what an agent before left
        folder.mkdir(mode=0o700)
        os.environ["TMPDIR"] = str(folder)  # for this process, and for uv and the workers it starts


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can enter; refuse one that somebody else owns."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise FalServerlessError(
            f"{folder} belongs to another user; set FAL_NOTEBOOK_HOME to a folder of yours"
        )
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def _tail(run: Path) -> str:
    try:
        return (run / "agent.log").read_bytes()[-2048:].decode("utf-8", "replace")
    except OSError:
        return "(there is no log)"
