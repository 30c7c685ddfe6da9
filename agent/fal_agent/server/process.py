"""Start and end one worker process, and speak with it.

Runs in the agent. A worker leads a process group and a session of its own, so that its children end
with it; the reaper ends them all should the agent be killed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Optional, cast

from fal_agent.errors import EnvironmentBuildError, ProtocolError
from fal_agent.framing import Buffer, FrameDecoder
from fal_agent.server.environments.uv import Uv
from fal_agent.server.reaper import Reaper, end_worker
from fal_agent.wire import Message, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["WorkerProcess", "describe_exit", "oom_kills", "worker_variables"]

_log = logging.getLogger(__name__)
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in which peaks of memory are given
_OOM_SCORE = 500  # of 1000: where memory runs out a worker is to die, not the agent that would tell of it
_LAST_WORDS = 0.5  # seconds that a dead worker's connection may still bring messages
_DROPPED = (
    "CONDA_PREFIX",
    # Environments are the agent's own, and uv leaves them uncompiled: each worker would compile all anew.
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "VIRTUAL_ENV",
    "__PYVENV_LAUNCHER__",
)


class WorkerProcess(asyncio.Protocol):
    """A process that runs `fal_agent.worker`.

    Must be started on the agent's main thread: Linux ends a worker together with the thread that
    started it.

    Attributes:
        worker_id: marks its descendants, through their environment.
        pid: of the process, also its process group.
        exit_status: once it is known; negative for a signal.
    """

    def __init__(
        self,
        worker_id: str,
        *,
        on_message: Callable[[Message, list[bytes]], None],
        on_exit: Callable[[Optional[int]], None],
        log_path: Path,
        reaper: Reaper,
    ) -> None:
        self.worker_id, self.log_path = worker_id, log_path
        self.pid = 0
        self.exit_status: Optional[int] = None
        self._on_message, self._on_exit = on_message, on_exit
        self._reaper = reaper
        self._decoder = FrameDecoder()
        self._transport: Optional[asyncio.Transport] = None
        self._loop = asyncio.get_running_loop()
        self._connection_gone = asyncio.Event()
        self.peak_bytes = 0  # of memory that the process held, once it has ended
        self._early: list[bytes] = []  # frames sent before the connection is ready

    def start(self, command: Sequence[str], variables: dict[str, str], folder: str) -> None:
        """Start the process.

        Raises:
            OSError: the interpreter cannot be started.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        try:
            with self.log_path.open("ab") as log:
                process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    env=variables,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = process.pid
        _prefer_for_oom(process.pid)
        self._reaper.watch(process.pid, self.worker_id)
        ours.setblocking(False)
        self._connecting = self._loop.create_task(self._connect(ours))
        threading.Thread(target=self._wait, args=(process,), name=f"wait-{process.pid}", daemon=True).start()

    def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message; one to a dead worker goes nowhere, its end is reported by `on_exit`."""
        data = encode(message, buffers)
        if self._transport is None:
            self._early.append(data)
        else:
            self._transport.write(data)

    def end(self, grace: float) -> None:
        """Make the process and its children end, by force after `grace` seconds; returns at once."""
        threading.Thread(
            target=end_worker, args=(self.pid, self.worker_id, grace), name=f"end-{self.pid}", daemon=True
        ).start()

    def last_words(self, size: int = 2048) -> str:
        """What the process wrote to its log, the end of it."""
        try:
            return self.log_path.read_bytes()[-size:].decode("utf-8", "replace").strip()
        except OSError:
            return ""

    # ------------------------------------------------------------ what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what waited for the connection."""
        self._transport = cast("asyncio.Transport", transport)
        for data in self._early:
            self._transport.write(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        """Hand on messages; a worker that sends nonsense is ended."""
        try:
            for frame in self._decoder.feed(data):
                self._on_message(decode(frame), frame.buffers)
        except ProtocolError as error:
            _log.warning("worker %s sent nonsense: %s", self.pid, error)
            self.end(0.0)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """The process closed its end, most likely by dying."""
        if exc is not None:
            _log.info("connection to worker %s lost: %s", self.pid, exc)
        self._connection_gone.set()

    # ------------------------------------------------------------ the end

    async def _connect(self, ours: socket.socket) -> None:
        await self._loop.create_connection(lambda: self, sock=ours)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        _, waited, usage = os.wait4(process.pid, 0)
        self.peak_bytes = usage.ru_maxrss * _MAXRSS_UNIT
        status = process.returncode = os.waitstatus_to_exitcode(waited)
        try:
            self._loop.call_soon_threadsafe(self._schedule_exit, status)
        except RuntimeError:  # the agent is ending: its loop is closed
            return

    def _schedule_exit(self, status: int) -> None:
        self._exiting = self._loop.create_task(self._exited(status))

    async def _exited(self, status: int) -> None:
        self.exit_status = status
        try:
            await asyncio.wait_for(self._connection_gone.wait(), _LAST_WORDS)
        except asyncio.TimeoutError:  # a child of the worker still holds the connection
            _log.info("worker %s left its connection open", self.pid)
        if self._transport is not None:
            self._transport.abort()
        await self._loop.run_in_executor(None, end_worker, self.pid, self.worker_id, 0.0)
        self._reaper.forget(self.pid)
        self._on_exit(status)


def worker_variables(
    worker_id: str, *, code: Path, root: Path, python: Path, devices: Optional[Sequence[int]]
) -> dict[str, str]:
    """Environment variables of a worker.

    Args:
        worker_id: marks the worker's descendants.
        code: folder with the sources of fal_agent and fal_notebook.
        root: the agent's folder.
        python: the environment's interpreter; its folder leads PATH.
        devices: GPUs that were lent; None leaves the host's setting alone.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    variables.update(
        PYTHONPATH=str(code),
        PYTHONUNBUFFERED="1",
        PATH=os.pathsep.join([str(python.parent), variables.get("PATH", os.defpath)]),
        VIRTUAL_ENV=str(python.parent.parent),
        FAL_NOTEBOOK_HOME=str(root),
        FAL_NOTEBOOK_WORKER=worker_id,
        FAL_PERSISTENT_DIR=str(root / "data"),
    )
    with suppress(EnvironmentBuildError):  # there is none yet: cells that install something say so
        variables["UV"] = _find_uv(root)
    if devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(device) for device in devices)
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers are those of nvidia-smi
    return variables


@functools.cache
def _find_uv(root: Path) -> str:
    """Where uv is, for cells that install something."""
    return str(Uv.find(root).program)


def _prefer_for_oom(pid: int) -> None:
    """Let Linux rather kill this process, and what it starts, when memory runs out."""
    with suppress(OSError):  # it has ended, or this is no Linux
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")


def describe_exit(status: Optional[int]) -> str:
    """Say how a process ended."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def oom_kills() -> int:
    """How many processes Linux has killed for want of memory since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
