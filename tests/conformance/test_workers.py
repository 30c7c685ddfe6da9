"""Workers: what they keep between calls, how many calls they take, and how calls are ended."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import is_alive, until

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fal_notebook.hosts.base import Host


def wait_for(path: Any) -> None:
    """Wait, on the host, until a file is there; the caller's test fails if it never comes."""
    import pathlib
    import time

    deadline = time.monotonic() + 20
    while not pathlib.Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def workers(host: Host) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = host.ask("status")["workers"]
    return found


def press_stop() -> None:
    """Do what Jupyter's stop button does."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.fixture
def fresh(agent_host: Host) -> Iterator[Host]:
    """A host without workers."""
    agent_host.ask("stop", everything=True)
    until(lambda: not workers(agent_host))
    yield agent_host
    agent_host.ask("stop", everything=True)


def test_a_setup_function_runs_once_per_worker(host: Host, public_folder: Path) -> None:
    marks = public_folder / "setups"

    def setup() -> Any:
        with marks.open("a") as file:
            file.write("x")
        return {"generator": (i for i in range(100))}  # stays there: it cannot be pickled

    @fal.function(host=host, setup_function=setup)
    def take(kept: dict[str, Any], step: int) -> int:
        return next(kept["generator"]) + step

    assert [take(0), take(10), take(0)] == [0, 11, 2]
    assert marks.read_text() == "x"


def test_the_error_of_a_setup_function_is_raised_at_the_call_and_setup_is_tried_again(
    host: Host, public_folder: Path
) -> None:
    ready = public_folder / "ready"

    def setup() -> int:
        if not ready.exists():
            raise LookupError("not ready")
        return 5

    @fal.function(host=host, setup_function=setup)
    def value(kept: int) -> int:
        return kept

    with pytest.raises(LookupError, match="not ready"):
        value()
    ready.touch()
    assert value() == 5


def test_calls_share_one_worker_when_they_may(agent_host: Host, public_folder: Path) -> None:
    """All three are in the worker at the same time: each waits for the others."""

    @fal.function(host=agent_host, max_multiplexing=3, max_concurrency=1)
    def meet(me: int) -> int:
        (public_folder / str(me)).touch()
        for other in range(3):
            wait_for(public_folder / str(other))
        return os.getpid()

    runs = [meet.submit(i) for i in range(3)]

    assert len({run.result(timeout=30) for run in runs}) == 1


def test_calls_wait_for_their_turn(agent_host: Host, public_folder: Path) -> None:
    """With `max_concurrency=1` the second call begins when the first has ended."""
    log = public_folder / "log"

    @fal.function(host=agent_host, max_concurrency=1)
    def work(name: str) -> None:
        import time

        for word in ("begins", "ends"):
            with log.open("a") as file:
                file.write(f"{name} {word}\n")
            time.sleep(0.02)

    for run in [work.submit(name) for name in "abcd"]:
        run.result(timeout=30)

    assert log.read_text().split("\n")[:-1] == [f"{n} {w}" for n in "abcd" for w in ("begins", "ends")]


def test_more_calls_than_the_host_carries_all_run(agent_host: Host) -> None:
    @fal.function(host=agent_host)
    def slow(i: int) -> int:
        import time

        time.sleep(0.02)
        return i

    runs = [slow.submit(i) for i in range(12)]

    assert [run.result(timeout=30) for run in runs] == list(range(12))


def test_a_waiting_call_is_told_why(agent_host: Host, public_folder: Path) -> None:
    from fal_agent.wire import Stage
    from fal_notebook.run import start

    release = public_folder / "release"

    @fal.function(host=agent_host, max_concurrency=1)
    def hold() -> None:
        wait_for(release)

    told: list[Any] = []
    first = hold.submit()
    second = start(
        agent_host, hold._parcel(agent_host, (), {}), on_event=lambda item: told.append(item.event)
    )
    until(lambda: any(isinstance(event, Stage) and event.phase == "queue" for event in told))
    release.touch()
    first.result(timeout=20)
    second.result(timeout=20)

    (reason,) = [event.text for event in told if isinstance(event, Stage) and event.phase == "queue"]
    assert "max_concurrency=1" in reason


def test_no_keep_alive_gives_each_call_a_worker_of_its_own(fresh: Host) -> None:
    @fal.function(host=fresh, keep_alive=0)
    def pid() -> int:
        return os.getpid()

    first, second = pid(), pid()

    assert first != second
    until(lambda: not workers(fresh))


def test_a_worker_ends_after_its_keep_alive(fresh: Host) -> None:
    @fal.function(host=fresh, keep_alive=0.3)
    def pid() -> int:
        return os.getpid()

    first = pid()
    until(lambda: not workers(fresh))

    assert pid() != first


def test_a_call_that_takes_too_long_is_stopped_and_its_worker_stays(fresh: Host) -> None:
    @fal.function(host=fresh, request_timeout=0.3)
    def slow(seconds: float) -> int:
        import time

        time.sleep(seconds)
        return os.getpid()

    before = slow(0)
    with pytest.raises(fal.exceptions.CallTimeoutError, match=r"slow.* ran longer than its timeout of 0.3 s"):
        slow(60)

    assert slow(0) == before


def test_an_interrupt_stops_the_call_and_keeps_the_worker_and_what_is_cached(
    fresh: Host, public_folder: Path
) -> None:
    @fal.cached
    def model() -> object:
        return object()

    @fal.function(host=fresh)
    def use(mark: Any, wait: bool) -> tuple[int, int]:
        import time

        found = id(model())
        mark.touch()
        time.sleep(60 if wait else 0)
        return os.getpid(), found

    before = use(public_folder / "a", False)
    run = use.submit(public_folder / "b", True)
    until((public_folder / "b").exists)
    run.interrupt()

    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=20)
    assert use(public_folder / "c", False) == before


def test_an_interrupt_stops_one_of_several_calls_in_a_worker(fresh: Host, public_folder: Path) -> None:
    @fal.function(host=fresh, max_multiplexing=2, max_concurrency=1)
    def loop(name: str) -> str:
        import time

        (public_folder / name).touch()
        while not (public_folder / f"end-{name}").exists():
            time.sleep(0.005)
        return name

    runs = {name: loop.submit(name) for name in "ab"}
    for name in runs:
        until((public_folder / name).exists)
    runs["a"].interrupt()

    with pytest.raises(KeyboardInterrupt):
        runs["a"].result(timeout=20)
    assert not runs["b"].done()
    (public_folder / "end-b").touch()
    assert runs["b"].result(timeout=20) == "b"


def test_an_interrupt_of_a_waiting_call_takes_it_out_of_the_queue(
    agent_host: Host, public_folder: Path
) -> None:
    @fal.function(host=agent_host, max_concurrency=1)
    def hold(name: str) -> str:
        (public_folder / name).touch()
        wait_for(public_folder / "release")
        return name

    first = hold.submit("first")
    until((public_folder / "first").exists)
    second = hold.submit("second")
    second.interrupt()

    with pytest.raises(KeyboardInterrupt):
        second.result(timeout=20)
    (public_folder / "release").touch()
    assert first.result(timeout=20) == "first"
    assert not (public_folder / "second").exists()


def test_a_keyboard_interrupt_here_interrupts_the_call_there(fresh: Host, public_folder: Path) -> None:
    """What Jupyter's stop button does: SIGINT while the main thread waits for the call."""

    @fal.function(host=fresh)
    def pid() -> int:
        return os.getpid()

    @fal.function(host=fresh)
    def sleep() -> None:
        import time

        try:
            (public_folder / "begun").touch()
            time.sleep(60)
        finally:
            (public_folder / "ended").touch()

    before = pid()
    watcher = threading.Thread(target=lambda: (until((public_folder / "begun").exists), press_stop()))
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        sleep()
    watcher.join()

    assert (public_folder / "ended").exists()
    assert pid() == before


def test_a_second_interrupt_kills_a_worker_that_does_not_listen(fresh: Host, public_folder: Path) -> None:
    @fal.function(host=fresh)
    def stubborn() -> None:
        import time

        (public_folder / "pid").write_text(str(os.getpid()))
        while True:
            try:
                (public_folder / "begun").touch()
                time.sleep(60)
            except KeyboardInterrupt:
                (public_folder / "ignored").touch()

    def strike() -> None:
        until((public_folder / "begun").exists)
        press_stop()
        until((public_folder / "ignored").exists)
        press_stop()

    watcher = threading.Thread(target=strike)
    watcher.start()
    with pytest.raises(fal.exceptions.CallCancelledError, match="was killed, and its worker with it"):
        stubborn()
    watcher.join()

    until(lambda: not is_alive(int((public_folder / "pid").read_text())))


def test_a_killed_run_says_so_and_the_next_call_works(fresh: Host, public_folder: Path) -> None:
    @fal.function(host=fresh)
    def sleep(seconds: float) -> int:
        import time

        (public_folder / "begun").touch()
        time.sleep(seconds)
        return os.getpid()

    before = sleep(0)
    (public_folder / "begun").unlink()
    run = sleep.submit(60)
    until((public_folder / "begun").exists)
    run.kill()

    with pytest.raises(fal.exceptions.CallCancelledError, match="was killed"):
        run.result(timeout=20)
    assert sleep(0) != before


def test_cancelling_at_once_never_hangs(fresh: Host) -> None:
    """Wherever the cancellation meets the call: on its way, in the queue, beginning, running, ending."""

    @fal.function(host=fresh, max_concurrency=1)
    def nap() -> int:
        import time

        time.sleep(0.001)
        return os.getpid()

    before = nap()
    runs = [nap.submit() for _ in range(60)]
    for run in reversed(runs):
        run.cancel()
    concurrent.futures.wait(runs, timeout=20)

    assert all(run.done() for run in runs)
    assert nap() == before


def test_interrupts_of_quick_calls_in_threads_lose_no_call(fresh: Host) -> None:
    """An interrupt that comes when its call is over must strike neither our code nor another call."""

    @fal.function(host=fresh, max_multiplexing=4, max_concurrency=1)
    def nap(i: int) -> int:
        return i if i >= 0 else os.getpid()

    before = nap(-1)
    for _ in range(5):
        runs = [nap.submit(i) for i in range(20)]
        for run in runs:
            run.interrupt()
        for i, run in enumerate(runs):
            assert isinstance(run.exception(timeout=20), KeyboardInterrupt) or run.result() == i

    assert nap(-1) == before


def test_children_of_a_call_end_with_its_worker(fresh: Host, public_folder: Path) -> None:
    @fal.function(host=fresh)
    def leave_behind() -> int:
        import subprocess

        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        return child.pid

    child = leave_behind()
    assert is_alive(child)
    fresh.ask("stop", everything=True)

    until(lambda: not is_alive(child))


def test_different_options_of_the_worker_do_not_disturb_each_other(fresh: Host) -> None:
    @fal.function(host=fresh)
    def variables() -> Any:
        return os.environ.get("FAL_NOTEBOOK_WORKER"), os.environ.get("CUDA_VISIBLE_DEVICES")

    name, devices = variables()

    assert name
    assert devices == os.environ.get("CUDA_VISIBLE_DEVICES")
