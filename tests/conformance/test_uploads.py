"""Data that is still on its way when something happens to its call."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

import fal_notebook as fal

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host


def test_a_call_withdrawn_while_its_data_travels_never_runs(agent_host: Host) -> None:
    """And the same data can be sent again afterwards, on the same connection."""

    @fal.function(host=agent_host)
    def size(data: bytes) -> int:
        return len(data)

    assert size(b"warm") == 4
    data = os.urandom(48 << 20)
    for wait in (0.0, 0.005, 0.02, 0.05):
        run = size.submit(data)
        time.sleep(wait)
        run.cancel()

    assert size(data) == len(data)


def test_an_interrupt_while_data_travels_ends_the_call(linked_host: Host) -> None:
    @fal.function(host=linked_host)
    def size(data: bytes) -> int:
        import time

        time.sleep(60)
        return len(data)

    run = size.submit(os.urandom(64 << 20))
    run.interrupt()

    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=20)


def test_calls_with_the_same_data_at_the_same_time_share_its_way(linked_host: Host) -> None:
    @fal.function(host=linked_host)
    def size(data: bytes) -> int:
        return len(data)

    assert size(b"warm") == 4
    data = os.urandom(24 << 20)
    runs: list[fal.Run] = []
    threads = [threading.Thread(target=lambda: runs.append(size.submit(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [run.result(timeout=60) for run in runs] == [len(data)] * 4
