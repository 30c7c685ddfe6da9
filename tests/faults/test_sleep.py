"""The laptop sleeps while a call runs, and its connection is gone when it wakes; the host starts anew."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from support.sshd import SSHServer

    from tests.faults.conftest import Bed

COUNTING = """
    import time
    import fal_notebook as fal

    @fal.function(host="far-box")
    def count(lines):
        for number in range(lines):
            print("line", number, flush=True)
            time.sleep(0.01)
        return lines

    print("ready for", count(0), flush=True)
    print("counted", count({lines}), flush=True)
"""


@pytest.mark.parametrize("breaks", [True, False])
def test_a_laptop_that_sleeps_during_a_call_shows_all_of_it(
    bed: Bed, ssh_server: SSHServer, *, breaks: bool
) -> None:
    """For the process it is as if the clock jumped; the server may have dropped it meanwhile, or not."""
    kernel = bed.kernel(COUNTING.format(lines=200))
    kernel.says("ready", timeout=100)  # its environment may have to be built
    while kernel.says("line") != "20":
        pass

    kernel.process.send_signal(signal.SIGSTOP)
    if breaks:
        ssh_server.kill_connections()
    time.sleep(3)  # the call ends meanwhile
    kernel.process.send_signal(signal.SIGCONT)

    assert [int(kernel.says("line")) for _ in range(179)] == list(range(21, 200))
    assert kernel.says("counted") == "200"


def test_a_host_that_loses_power_is_used_again_and_says_what_was_lost(bed: Bed) -> None:
    """Everything of ours dies in one moment, and its files stay as they were in that moment."""
    host = bed.host()

    @fal.function(host=host)
    def add(first: int, second: int) -> int:
        return first + second

    @fal.function(host=host)
    def sleep() -> None:
        time.sleep(600)

    assert add(1, 2) == 3
    run = sleep.submit()
    until(lambda: run.run_id in {item["run_id"] for item in host.ask("runs") if item["state"] == "running"})
    pids = bed.processes()
    assert len(pids) >= 3
    for stop in (signal.SIGSTOP, signal.SIGKILL):  # so that none sees another's end
        for pid in pids:
            os.kill(pid, stop)

    with pytest.raises(
        exceptions.FalServerlessError, match="the agent that ran it ended before the run did; run it again"
    ):
        run.result(timeout=60)
    assert add(3, 4) == 7
    states = {item["run_id"]: item["state"] for item in host.ask("runs")}
    assert states[run.run_id] == "lost"
