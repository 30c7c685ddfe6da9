"""Bars of a call's own loops are shown here, and what its worker uses can be asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from fal_notebook.hosts.base import Host


def test_a_call_s_loops_are_shown_here(agent_host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    @fal.function(host=agent_host)
    def train(epochs: int) -> int:
        for _ in fal.progress(range(epochs), desc="epochs"):
            for _ in fal.progress(range(2), desc="batches"):
                pass
        print("trained")
        return epochs

    assert train(3) == 3

    said = capfd.readouterr()
    assert said.out == "trained\n"
    assert re.search(r"epochs: 100% █{10} 3/3.* \| batches: 100% █{10} 2/2", said.err)


def test_the_loops_of_a_map_add_up(agent_host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    @fal.function(host=agent_host)
    def work(number: int) -> int:
        return sum(1 for _ in fal.progress(range(5), desc="work"))

    assert list(work.map(range(4))) == [5] * 4

    assert re.search(r"work: 100% █{10} 20/20", capfd.readouterr().err)


def test_a_forked_child_disturbs_nothing(agent_host: Host) -> None:
    @fal.function(host=agent_host)
    def fork() -> int:
        import multiprocessing

        def child() -> None:
            for _ in fal.progress(range(3)):
                pass

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        return process.exitcode

    assert [fork(), fork()] == [0, 0]


def test_what_a_run_s_worker_uses_can_be_asked(agent_host: Host, public_folder: Path) -> None:
    release = public_folder / "release-usage"

    @fal.function(host=agent_host)
    def work() -> int:
        import os
        import time

        ballast = b"x" * 50_000_000
        until_then = time.process_time() + 0.2
        while time.process_time() < until_then or not release.exists():
            time.sleep(0)
        return os.getpid() if ballast else 0

    run = work.submit()
    until(lambda: agent_host.ask("usage", run_id=run.run_id).get("memory", 0) > 50_000_000)
    first = agent_host.ask("usage", run_id=run.run_id)
    until(lambda: agent_host.ask("usage", run_id=run.run_id)["cpu_seconds"] > first["cpu_seconds"])
    later = agent_host.ask("usage", run_id=run.run_id)
    release.touch()

    assert first["pid"] == later["pid"] == run.result(timeout=20)
    assert later["at"] > first["at"]
    assert later["gpus"] == []
    assert agent_host.ask("usage", run_id=run.run_id) == {}
