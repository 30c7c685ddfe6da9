"""End the agent's workers with everything they started, even when the agent is killed.

The agent starts one small process, `python -m fal_agent.server.reaper`, and tells it through a pipe
which workers there are:

    +PGID STARTED WORKER_ID      a worker leads this process group; its start time in clock ticks
    -PGID                        it is gone

The agent is the pipe's only writer, so the pipe ends when the agent does, however it dies. Then the
reaper kills every group, and every process that carries a worker's mark (the variable
`FAL_NOTEBOOK_WORKER`) wherever it moved to. Nothing is killed by its number alone: a group counts as
the worker's if its leader has the worker's start time or mark, or else one of its members the mark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.server.proc import Process, environment_of, process, processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["MARK", "Reaper", "end_worker", "marked_workers"]

MARK = "FAL_NOTEBOOK_WORKER"
FORCE_SECONDS = 5.0  # for which SIGKILL is tried; a process in the kernel may take longer to go

_RESTARTS = 5  # in a row, of a reaper that does not stay
_STAYED_SECONDS = 10.0


class Reaper:
    """The agent's end of the pipe; starts the reaper again if that is killed. May be used from any thread.

    Args:
        on_error: told what is wrong when the reaper cannot be kept running.
    """

    def __init__(self, on_error: Optional[Callable[[str], None]] = None) -> None:
        self._on_error = on_error
        self._lock = threading.Lock()
        self._watched: dict[int, str] = {}  # group -> line that announces it
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._closing = False

    @property
    def pid(self) -> Optional[int]:
        """The reaper's process number; None when it does not run."""
        with self._lock:
            return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the reaper.

        Raises:
            OSError: no process can be started.
        """
        with self._lock:
            self._spawn()
        threading.Thread(target=self._keep_running, name="reaper", daemon=True).start()

    def watch(self, pgid: int, worker_id: str) -> None:
        """Have a worker ended with the agent: the leader of process group `pgid`, started with the mark."""
        leader = process(pgid)
        line = f"+{pgid} {leader.started if leader is not None else 0} {worker_id}\n"
        with self._lock:
            self._watched[pgid] = line
            self._tell(line)

    def forget(self, pgid: int) -> None:
        """A worker and all it started are gone."""
        with self._lock:
            if self._watched.pop(pgid, None) is not None:
                self._tell(f"-{pgid}\n")

    def close(self) -> None:
        """End the reaper, which ends the workers that are still watched."""
        with self._lock:
            self._closing = True
            running = self._process
            if running is not None and running.stdin is not None:
                with contextlib.suppress(OSError):  # it is gone already
                    running.stdin.close()
        if running is not None:
            try:
                running.wait(timeout=2 * FORCE_SECONDS)
            except subprocess.TimeoutExpired:  # a worker does not die: leave it to the reaper
                return

    def _spawn(self) -> None:
        package = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-m", "fal_agent.server.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONPATH": str(package), "PATH": os.defpath},
            start_new_session=True,
            bufsize=0,
        )
        self._tell("".join(self._watched.values()))

    def _tell(self, text: str) -> None:
        if self._process is None or self._process.stdin is None or self._closing or not text:
            return
        with contextlib.suppress(BrokenPipeError):  # it was killed; the next one is told everything anew
            self._process.stdin.write(text.encode())

    def _keep_running(self) -> None:
        started = time.monotonic()
        failures = 0
        while self._process is not None:
            status = self._process.wait()
            with self._lock:
                if self._closing:
                    return
                if self._process.stdin is not None:
                    self._process.stdin.close()
                self._process = None
                failures = 0 if time.monotonic() - started > _STAYED_SECONDS else failures + 1
                if failures <= _RESTARTS:
                    started = time.monotonic()
                    with contextlib.suppress(OSError):  # reported below
                        self._spawn()
        if self._on_error is not None:
            self._on_error(
                f"the process that ends workers if the agent is killed does not stay (exit status {status}); "
                "should the agent be killed, its workers may go on"
            )


def end_worker(pgid: int, worker_id: str, grace: float, *, started: Optional[int] = None) -> bool:
    """End a worker and everything it started: SIGTERM, and SIGKILL after `grace` seconds.

    Waits until they are gone; call it from a thread. Zombies count as gone.

    Args:
        pgid: the worker's process group.
        worker_id: its mark.
        grace: seconds between the signals; 0 to use force at once.
        started: start time of the group's leader, in clock ticks, if that is known.

    Returns:
        False if something still runs `FORCE_SECONDS` after the first SIGKILL.
    """
    known: set[Process] = set()
    if grace > 0 and _find(pgid, worker_id, started, known):
        _signal_group(pgid, signal.SIGTERM)
        _wait_until(lambda: not _group(pgid, worker_id, started, processes()), grace)
    return _wait_until(lambda: not _kill(pgid, worker_id, started, known), FORCE_SECONDS)


def marked_workers() -> dict[str, list[int]]:
    """Every process of this user that carries a mark: worker id -> process numbers."""
    found: dict[str, list[int]] = {}
    for item in processes():
        worker_id = _mark(item.pid)
        if worker_id is not None:
            found.setdefault(worker_id, []).append(item.pid)
    return found


def _kill(pgid: int, worker_id: str, started: Optional[int], known: set[Process]) -> bool:
    """Kill what there is of a worker; whether there was anything."""
    group = _find(pgid, worker_id, started, known)
    if group:
        _signal_group(pgid, signal.SIGKILL)
    for item in known:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or another user's by now
            os.kill(item.pid, signal.SIGKILL)
    return bool(group or known)


def _find(pgid: int, worker_id: str, started: Optional[int], known: set[Process]) -> list[Process]:
    """Living members of the worker's group; those outside of it are kept in `known` for as long as they live.

    Who lost the mark is found through its parent, so only while that lives: hence the set.
    """
    everyone = set(processes())
    group = _group(pgid, worker_id, started, everyone)
    known &= everyone
    known |= {item for item in everyone if item.group != pgid and _mark(item.pid) == worker_id}
    known |= _descendants([*group, *known], everyone)
    return group


def _group(pgid: int, worker_id: str, started: Optional[int], everyone: Iterable[Process]) -> list[Process]:
    """Living members of the worker's group; none if the number belongs to somebody else by now."""
    members = [item for item in everyone if item.group == pgid]
    leader = next((item for item in members if item.pid == pgid), None)
    if leader is not None and started:
        return members if leader.started == started else []
    if leader is not None and leader.parent == os.getpid() and _mark(pgid) is None:
        return members  # a child of ours that wrote over its variables
    return members if any(_mark(item.pid) == worker_id for item in members) else []


def _descendants(ancestors: Iterable[Process], everyone: Iterable[Process]) -> set[Process]:
    """Processes below others."""
    children: dict[int, list[Process]] = {}
    for item in everyone:
        children.setdefault(item.parent, []).append(item)
    found: set[Process] = set()
    waiting = [item.pid for item in ancestors]
    while waiting:
        new = set(children.get(waiting.pop(), ())) - found
        found |= new
        waiting += [item.pid for item in new]
    return found


def _mark(pid: int) -> Optional[str]:
    """Which worker a process belongs to, by its variables."""
    prefix = f"{MARK}=".encode()
    for variable in environment_of(pid).split(b"\0"):
        if variable.startswith(prefix):
            return variable[len(prefix) :].decode("utf-8", "replace")
    return None


def _signal_group(pgid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or other users' by now
        os.killpg(pgid, number)


def _wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again, at growing intervals, for that long."""
    deadline = time.monotonic() + seconds
    interval = 0.002
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(interval, left))
        interval = min(interval * 2, 0.1)
    return True


# ---------------------------------------------------------------- the reaper's own process


def _main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its life ends with the pipe, after its work
    watched: dict[int, tuple[Optional[int], str]] = {}
    for line in sys.stdin:
        if line.startswith("-"):
            watched.pop(int(line[1:]), None)
        elif line.endswith("\n"):  # a half line is of an agent that died while it wrote
            pgid, started, worker_id = line[1:].split()
            watched[int(pgid)] = (int(started) or None, worker_id)
    enders = [
        threading.Thread(target=end_worker, args=(pgid, worker_id, 0.0), kwargs={"started": started})
        for pgid, (started, worker_id) in watched.items()
    ]
    for thread in enders:
        thread.start()
    for thread in enders:
        thread.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
