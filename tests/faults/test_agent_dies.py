"""The agent is killed, or has nothing to do any more."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import is_alive, until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.conftest import Bed


def words_of(pid: int) -> bytes:
    """A process's command line; nothing of one that has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def agent_pid(host: Any) -> int:
    pid: int = host.ask("status")["agent"]["pid"]
    return pid


def test_an_agent_killed_during_a_call_is_told_and_leaves_nothing_behind(
    bed: Bed, tmp_path: Path, nothing_is_left: Callable[[], None]
) -> None:
    host = bed.host()
    pids = tmp_path / "pids"

    @fal.function(host=host, keep_alive=0.2)
    def work(forever: bool) -> int:
        import subprocess
        import time

        if forever:
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            pids.with_suffix(".part").write_text(f"{os.getpid()} {child.pid}")
            pids.with_suffix(".part").rename(pids)
            time.sleep(600)
        return os.getpid()

    run = work.submit(True)
    until(pids.exists)
    worker, child = map(int, pids.read_text().split())
    old = agent_pid(host)
    os.kill(old, signal.SIGKILL)

    with pytest.raises(exceptions.WorkerLostError, match=r"bench.*the agent that ran it ended"):
        run.result(timeout=20)
    until(lambda: not is_alive(worker))
    until(lambda: not is_alive(child))

    assert work(False) != worker
    assert agent_pid(host) != old
    (record,) = [item for item in host.ask("runs") if item["run_id"] == run.run_id]
    assert record["state"] == "lost"
    nothing_is_left()


def test_an_agent_killed_while_a_generator_runs_ends_its_items(bed: Bed) -> None:
    host = bed.host()

    @fal.function(host=host)
    def forever() -> Any:
        n = 0
        while True:
            yield n
            n += 1

    items = forever()
    next(items)
    os.kill(agent_pid(host), signal.SIGKILL)

    with pytest.raises(exceptions.WorkerLostError):
        for _ in items:
            pass


def test_an_agent_told_to_end_ends_its_workers(bed: Bed, nothing_is_left: Callable[[], None]) -> None:
    host = bed.host()

    @fal.function(host=host)
    def pid() -> int:
        return os.getpid()

    worker = pid()
    os.kill(agent_pid(host), signal.SIGTERM)

    until(lambda: not is_alive(worker))
    assert pid() != worker
    host.ask("shutdown")
    nothing_is_left()


def test_an_idle_agent_ends_and_comes_back_when_it_is_needed(
    bed: Bed, nothing_is_left: Callable[[], None]
) -> None:
    host = bed.host()

    @fal.function(host=host, keep_alive=0.1)
    def one() -> int:
        return 1

    assert one() == 1
    first = agent_pid(host)
    nothing_is_left()

    assert one() == 1
    assert agent_pid(host) != first
    nothing_is_left()


def test_an_agent_stays_while_a_notebook_is_connected(bed: Bed) -> None:
    """Its folder's last worker is gone for longer than it takes an idle agent to end."""
    host = bed.host()

    @fal.function(host=host, keep_alive=0)
    def one() -> int:
        return 1

    one()
    first = agent_pid(host)
    until(lambda: not host.ask("status")["workers"])
    other = bed.host()
    other.connect()
    other.close()

    assert agent_pid(host) == first


def test_a_killed_reaper_comes_back(bed: Bed, nothing_is_left: Callable[[], None]) -> None:
    """Without it a worker would outlive a killed agent."""
    host = bed.host()

    @fal.function(host=host)
    def pid() -> int:
        return os.getpid()

    worker = pid()

    def reapers() -> list[int]:
        return [pid for pid in bed.processes() if b"fal_agent.server.reaper" in words_of(pid)]

    (first,) = until(reapers)
    os.kill(first, signal.SIGKILL)
    until(lambda: any(process != first for process in reapers()))
    os.kill(agent_pid(host), signal.SIGKILL)

    until(lambda: not is_alive(worker))
    nothing_is_left()
