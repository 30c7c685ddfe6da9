"""The notebook's process is killed while its calls run; several notebooks use one host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.faults.conftest import Bed

LONG_CALL = """
    import pathlib, time
    import fal_notebook as fal

    folder = pathlib.Path({folder!r})

    @fal.function(host=fal.local, keep_alive=0.3, {options})
    def work():
        try:
            (folder / "begun").touch()
            while not (folder / "go").exists():
                print("x" * 10_000)   # more than fits in anything, with nobody reading
                time.sleep(0.001)
        except KeyboardInterrupt:
            (folder / "interrupted").touch()
            raise
        (folder / "finished").touch()
        return 42

    run = work.submit()
    print("run", run.run_id, flush=True)
    run.result()
"""


def state_of(host: Any, run_id: str) -> str:
    records = {item["run_id"]: item["state"] for item in host.ask("runs")}
    return str(records.get(run_id))


def begin(bed: Bed, folder: Path, options: str = "") -> tuple[Any, str]:
    """Start a notebook with a long call; gives it and the run's id."""
    kernel = bed.kernel(LONG_CALL.format(folder=str(folder), options=options))
    run_id = kernel.says("run")
    until((folder / "begun").exists)
    return kernel, run_id


def test_a_run_goes_on_without_its_kernel_and_nothing_is_left_afterwards(
    bed: Bed, tmp_path: Path, nothing_is_left: Callable[[], None]
) -> None:
    kernel, run_id = begin(bed, tmp_path)
    kernel.kill()
    host = bed.host()
    assert state_of(host, run_id) in ("running", "queued")
    (tmp_path / "go").touch()

    until(lambda: state_of(host, run_id) == "done")
    assert (tmp_path / "finished").exists()
    until(lambda: not host.ask("status")["workers"])
    nothing_is_left()


def test_another_kernel_attaches_to_the_run_of_one_that_was_killed(
    bed: Bed, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kernel, run_id = begin(bed, tmp_path)
    kernel.kill()
    host = bed.host()

    run = fal.attach(run_id, host=host)
    until(lambda: "x" * 10_000 in capfd.readouterr().out)
    (tmp_path / "go").touch()

    assert run.result(timeout=30) == 42


@pytest.mark.parametrize("lease", [0, 1])
def test_a_run_ends_with_its_lease(
    bed: Bed, tmp_path: Path, lease: int, nothing_is_left: Callable[[], None]
) -> None:
    kernel, run_id = begin(bed, tmp_path, f"lease={lease}")
    kernel.kill()
    host = bed.host()

    until(lambda: state_of(host, run_id) == "lease")
    assert (tmp_path / "interrupted").exists()
    assert not (tmp_path / "finished").exists()
    nothing_is_left()


def test_a_waiting_run_ends_with_its_lease_too(bed: Bed, tmp_path: Path) -> None:
    kernel = bed.kernel(
        f"""
        import pathlib, time
        import fal_notebook as fal

        folder = pathlib.Path({str(tmp_path)!r})

        @fal.function(host=fal.local, lease=0, max_concurrency=1)
        def work(name):
            (folder / name).touch()
            time.sleep(600)

        runs = [work.submit("first"), work.submit("second")]
        print("run", runs[1].run_id, flush=True)
        runs[0].result()
        """
    )
    run_id = kernel.says("run")
    until((tmp_path / "first").exists)
    kernel.kill()

    host = bed.host()
    until(lambda: state_of(host, run_id) == "lease")
    assert not (tmp_path / "second").exists()


def test_two_kernels_that_start_at_once_share_one_agent(
    bed: Bed, nothing_is_left: Callable[[], None]
) -> None:
    source = """
        import fal_notebook as fal

        @fal.function(host=fal.local, keep_alive=0.1)
        def square(x):
            return x * x

        values = list(square.map(range(20)))
        print("agent", fal.local.ask("status")["agent"]["pid"], sum(values), flush=True)
    """
    kernels = [bed.kernel(source), bed.kernel(source)]

    (first, first_sum), (second, second_sum) = (kernel.says("agent").split() for kernel in kernels)

    assert first == second
    assert first_sum == second_sum == str(sum(x * x for x in range(20)))
    for kernel in kernels:
        assert kernel.process.wait(timeout=20) == 0
    nothing_is_left()


def test_a_kernel_that_dies_leaves_the_other_ones_calls_alone(bed: Bed, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    dying, dying_run = begin(bed, one, "lease=0")
    living, living_run = begin(bed, two)
    dying.kill()
    host = bed.host()

    until(lambda: state_of(host, dying_run) == "lease")
    assert state_of(host, living_run) in ("running", "queued")
    (two / "go").touch()
    assert living.process.wait(timeout=20) == 0


def test_a_forked_child_of_a_notebook_makes_a_connection_of_its_own(bed: Bed) -> None:
    """`multiprocessing` with fork is common; two processes on one socket would mix up their frames."""
    kernel = bed.kernel(
        """
        import os
        import fal_notebook as fal

        @fal.function(host=fal.local, keep_alive=0.1)
        def add(a, b):
            return a + b

        assert add(1, 2) == 3
        child = os.fork()
        value = [add(i, i) for i in range(20)]
        if child == 0:
            os._exit(0 if value == [i + i for i in range(20)] else 1)
        _, status = os.waitpid(child, 0)
        print("status", status, value == [i + i for i in range(20)], flush=True)
        """
    )

    assert kernel.says("status") == "0 True"
