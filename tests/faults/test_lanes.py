"""Whoever dies while calls go straight to a worker: each runs at most once and is accounted for."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.appending import appender
from support.lanes import has_lane, in_lane
from support.waiting import is_alive, until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.conftest import Bed


def test_a_lane_that_breaks_at_any_moment_runs_each_call_once(bed: Bed, tmp_path: Path) -> None:
    host = bed.host()
    append = appender(host, tmp_path / "lines")
    in_lane(host, lambda: append(-1))
    chance, broken = random.Random(1), 0

    for number in range(400):
        known = host.connect().lanes.by_template.values()
        lanes = [lane for lane in known if lane.is_dialled and lane.is_open]
        if lanes and chance.random() < 0.3:
            _break_soon(lanes[0], chance.random() * 0.0004)
            broken += 1
        assert append(number) == number

    lines = [line for line in (tmp_path / "lines").read_text().splitlines() if line != "-1"]
    assert lines == [str(number) for number in range(400)]
    assert broken > 10
    states = {run["state"] for run in host.ask("runs", limit=2000)}
    assert states == {"done"}


def _break_soon(lane: Any, seconds: float) -> None:
    """Cut a lane from outside, as a network does, while a call may be in it."""
    import threading

    def cut() -> None:
        time.sleep(seconds)
        lane._stream.close()

    threading.Thread(target=cut).start()


def test_a_call_goes_on_when_its_notebook_is_killed(
    bed: Bed, tmp_path: Path, nothing_is_left: Callable[[], None]
) -> None:
    kernel = bed.kernel(f"""
        import time
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import fal_notebook as fal
        from fal_notebook.hosts.local import LocalHost
        from support.lanes import in_lane
        host = LocalHost("bench")

        @fal.function(host=host, keep_alive=0.5)
        def work(path):
            import pathlib, time
            if path:
                pathlib.Path(path + ".begun").touch()
                time.sleep(1.0)
                pathlib.Path(path).touch()
            return 1

        in_lane(host, lambda: work(""))
        print("ready", 1, flush=True)
        work({str(tmp_path / "done")!r})
    """)
    kernel.says("ready")
    until((tmp_path / "done.begun").exists)
    kernel.kill()

    until((tmp_path / "done").exists)
    host = bed.host()
    until(lambda: host.ask("runs", limit=1)[0]["state"] == "done")
    nothing_is_left()


def test_an_agent_that_is_killed_leaves_the_calls_to_the_next(bed: Bed, tmp_path: Path) -> None:
    """What stands in the spool but not yet in the journal is recorded by the agent that comes after."""
    host = bed.host()
    append = appender(host, tmp_path / "lines")
    in_lane(host, lambda: append(0))
    for number in range(20):
        append(number)
    pid = host.ask("status")["agent"]["pid"]
    known = len(host.ask("runs", limit=1000))
    os.kill(pid, signal.SIGSTOP)
    for number in range(30):
        append(number)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid))
    until(lambda: not host.is_connected)

    runs = host.ask("runs", limit=1000)
    assert [run["state"] for run in runs] == ["done"] * (known + 30)
    assert not list(bed.root.glob("*.lane"))


def test_an_agent_killed_during_a_call_is_told(bed: Bed, tmp_path: Path) -> None:
    host = bed.host()
    begun = tmp_path / "begun"

    @fal.function(host=host)
    def work(wait: bool) -> int:
        if wait:
            begun.touch()
            time.sleep(600)
        return os.getpid()

    in_lane(host, lambda: work(False))
    worker, agent = work(False), host.ask("status")["agent"]["pid"]
    _kill_when(begun, agent)

    with pytest.raises(exceptions.WorkerLostError):
        work(True)
    until(lambda: not is_alive(worker))
    assert work(False) != worker
    assert host.ask("runs", limit=2)[1]["state"] == "lost"


def test_a_worker_killed_between_calls_is_replaced(bed: Bed) -> None:
    host = bed.host()

    @fal.function(host=host)
    def pid() -> int:
        return os.getpid()

    in_lane(host, pid)
    worker = pid()
    os.kill(worker, signal.SIGKILL)

    assert pid() != worker
    assert {run["state"] for run in host.ask("runs", limit=1000)} == {"done"}


def test_a_lent_worker_ends_with_its_keep_alive(bed: Bed, nothing_is_left: Callable[[], None]) -> None:
    host = bed.host()

    @fal.function(host=host, keep_alive=0.3)
    def pid() -> int:
        return os.getpid()

    in_lane(host, pid)
    worker = pid()

    until(lambda: not is_alive(worker))
    assert not has_lane(host)
    assert pid() != worker
    host.ask("shutdown")
    nothing_is_left()


def test_another_notebook_gets_the_worker(bed: Bed) -> None:
    """It would have to start one of its own otherwise."""
    host, other = bed.host(), bed.host()

    @fal.function(host=host)
    def pid() -> int:
        return os.getpid()

    in_lane(host, pid)

    assert pid.on(host=other)() == pid()
    assert len(host.ask("status")["workers"]) == 1


def test_a_full_disk_under_the_spool_stops_no_call(bed: Bed, tmp_path: Path) -> None:
    """The worker cannot write a call down: it is moved, and the lane ends."""
    host = bed.host()
    append = appender(host, tmp_path / "lines")
    in_lane(host, lambda: append(0))
    (spool,) = bed.root.glob("*.lane")
    limit = spool.stat().st_size + 60

    @fal.function(host=host)
    def bound(size: int) -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    bound(limit)
    for number in range(30):
        assert append(number) == number

    assert {run["state"] for run in host.ask("runs", limit=1000)} == {"done"}


def _kill_when(path: Path, pid: int) -> None:
    import threading

    def wait() -> None:
        until(path.exists)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=wait).start()
