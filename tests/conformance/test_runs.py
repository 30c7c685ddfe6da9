"""Submitting, awaiting, spawning: a run is a future of the value; `on`, `run_local` and `aio`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import os
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from pathlib import Path

    from fal_notebook.hosts.base import Host


def test_submit_gives_a_future_of_the_value(host: Host) -> None:
    @fal.function(host=host)
    def add(a: int, b: int) -> int:
        return a + b

    run = add.submit(1, b=2)

    assert isinstance(run, concurrent.futures.Future)
    assert run.result(timeout=20) == 3
    assert run.exception() is None
    assert run.done()


def test_submitted_runs_overlap(agent_host: Host, public_folder: Path) -> None:
    """Each of two runs waits until the other has begun."""

    @fal.function(host=agent_host)
    def meet(mine: str, other: str) -> bool:
        import pathlib
        import time

        pathlib.Path(public_folder, mine).touch()
        for _ in range(2000):
            if pathlib.Path(public_folder, other).exists():
                return True
            time.sleep(0.005)
        return False

    runs = [meet.submit("a", "b"), meet.submit("b", "a")]

    assert [run.result(timeout=30) for run in runs] == [True, True]


def test_a_submitted_error_is_raised_by_result_each_time(host: Host) -> None:
    @fal.function(host=host)
    def fail() -> None:
        raise KeyError("nothing")

    run = fal.function(host=host)(fail.raw_func).submit()

    for _ in range(2):
        with pytest.raises(KeyError, match="nothing"):
            run.result(timeout=20)
    assert isinstance(run.exception(), KeyError)


def test_futures_of_runs_work_with_the_standard_library(host: Host) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    runs = [double.submit(i) for i in range(4)]
    done, _ = concurrent.futures.wait(runs, timeout=20)

    assert sorted(run.result() for run in done) == [0, 2, 4, 6]


def test_done_callbacks_are_called(host: Host) -> None:
    called = threading.Event()

    @fal.function(host=host)
    def one() -> int:
        return 1

    one.submit().add_done_callback(lambda _run: called.set())

    assert called.wait(20)


def test_runs_can_be_awaited_together(host: Host) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(double.submit(i) for i in range(3)), double.aio(3))

    assert asyncio.run(all_of_them()) == [0, 2, 4, 6]


def test_awaiting_a_failing_run_raises_its_error(host: Host) -> None:
    @fal.function(host=host)
    def fail() -> None:
        raise LookupError("not here")

    async def wait() -> None:
        await fail.submit()

    async def wait_aio() -> None:
        await fail.aio()

    for waiting in (wait, wait_aio):
        with pytest.raises(LookupError, match="not here"):
            asyncio.run(waiting())


def test_spawn_starts_a_call(host: Host) -> None:
    @fal.function(host=host)
    def one() -> int:
        return 1

    assert one.spawn().result(timeout=20) == 1


def test_a_coroutine_function_runs_to_its_end(host: Host) -> None:
    @fal.function(host=host)
    async def later(value: int) -> int:
        await asyncio.sleep(0)
        return value + 1

    assert later(1) == 2
    assert later.submit(2).result(timeout=20) == 3
    assert asyncio.run(later.aio(3)) == 4


def test_calls_work_inside_a_running_loop(host: Host) -> None:
    """That is where every cell of a notebook runs."""

    @fal.function(host=host)
    async def later(value: int) -> int:
        await asyncio.sleep(0)
        return value + 1

    async def cell() -> Any:
        return later(1), await later.aio(2), later.run_local(3)

    assert asyncio.run(cell()) == (2, 3, 4)


def test_run_local_runs_the_plain_function_here(host: Host) -> None:
    @fal.function(host=host)
    def pid() -> int:
        return os.getpid()

    @fal.function(host=host)
    def fail() -> None:
        raise ZeroDivisionError

    assert pid.run_local() == os.getpid()
    with pytest.raises(ZeroDivisionError):
        fail.run_local()
    with pytest.raises(fal.exceptions.FalServerlessError, match="exposed_port"):
        pid.run_local(exposed_port=8080)


def test_on_gives_a_new_function_and_leaves_the_old_one(host: Host) -> None:
    @fal.function(host=host, keep_alive=20, machine_type="XS")
    def one() -> int:
        return 1

    other = one.on(keep_alive=30)

    assert other() == 1
    assert (one.options.host["keep_alive"], other.options.host["keep_alive"]) == (20, 30)
    assert other.options.host["machine_type"] == "XS"
    assert other.host is host


def test_on_moves_a_function_to_another_host(agent_host: Host) -> None:
    @fal.function(host="inline")
    def pid() -> int:
        return os.getpid()

    assert pid() == os.getpid()
    assert pid.on(agent_host)() != os.getpid()
    assert pid.on("local")() != os.getpid()


def test_a_run_can_be_cancelled_before_its_turn(agent_host: Host, public_folder: Path) -> None:
    begun, release, ran = (public_folder / name for name in ("begun", "release", "ran"))

    @fal.function(host=agent_host, max_concurrency=1)
    def hold(mark: Any, wait_for: Any) -> None:
        import pathlib
        import time

        pathlib.Path(mark).touch()
        while wait_for is not None and not pathlib.Path(wait_for).exists():
            time.sleep(0.005)

    first = hold.submit(begun, release)
    until(begun.exists)
    second = hold.submit(ran, None)

    assert second.cancel()
    assert second.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        second.result(timeout=20)
    agent_host.ask("status")  # comes after the wish to cancel
    release.touch()
    first.result(timeout=20)
    hold(release, None)
    assert not ran.exists()


def test_a_running_call_is_stopped_by_cancel(agent_host: Host, public_folder: Path) -> None:
    begun, ended = public_folder / "begun", public_folder / "ended"

    @fal.function(host=agent_host)
    def sleep() -> None:
        import pathlib
        import time

        try:
            pathlib.Path(begun).touch()
            time.sleep(60)
        except KeyboardInterrupt:
            pathlib.Path(ended).touch()
            raise

    run = sleep.submit()
    until(begun.exists)

    assert run.cancel()
    until(ended.exists)
    assert not run.cancel() or run.cancelled()


def test_a_finished_run_is_not_cancelled(host: Host) -> None:
    @fal.function(host=host)
    def one() -> int:
        return 1

    run = one.submit()
    run.result(timeout=20)

    assert not run.cancel()
    assert run.result() == 1


def test_a_run_stays_in_its_process(host: Host) -> None:
    @fal.function(host=host)
    def one() -> int:
        return 1

    run = one.submit()
    run.result(timeout=20)

    with pytest.raises(TypeError, match=r"send its \.result\(\) instead"):
        pickle.dumps(run)
    assert "done" in repr(run)


def test_a_function_can_be_copied(host: Host) -> None:
    @fal.function(host=host, keep_alive=7)
    def one() -> int:
        return 1

    assert copy.deepcopy(one)() == 1
    assert copy.copy(one).options == one.options


def test_calls_from_several_threads_come_back_to_their_callers(host: Host) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(double, range(20))) == [i * 2 for i in range(20)]
