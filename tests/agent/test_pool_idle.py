"""How long a worker that has nothing to do is kept."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from fal_agent.server.pool import Pool


class Worker(SimpleNamespace):
    """What the pool looks at, of a worker that has been idle for some seconds."""

    def __init__(self, idle: float, **more: Any) -> None:
        usual = {
            "runs": {},
            "is_ready": True,
            "is_ending": False,
            "lane": None,
            "key": "k",
            "keep_alive": 300.0,
        }
        others = {"key": "k", "sessions": {}, "kept_for": "", "keep_at_least": 0, "was_ended": False}
        super().__init__(**{**usual, **others, "idle_since": time.monotonic() - idle, **more})

    def end(self) -> None:
        self.was_ended = self.is_ending = True


def ended(*workers: Worker, connected: bool = False) -> list[bool]:
    """Which of some workers the pool ends."""
    pool = Pool.__new__(Pool)
    pool.workers = list(workers)  # type: ignore[arg-type]
    pool._is_connected = lambda _client: connected
    pool._end_idle()
    return [worker.was_ended for worker in workers]


def test_an_idle_worker_ends_after_its_keep_alive() -> None:
    assert ended(Worker(299), Worker(301)) == [False, True]
    assert ended(Worker(0.1, keep_alive=0.0), Worker(301, runs={"r": 1})) == [True, False]


@pytest.mark.parametrize(("connected", "ends"), [(False, [False, True]), (True, [False, False])])
def test_a_session_ends_two_hours_after_its_last_notebook_has_gone(connected: bool, ends: list[bool]) -> None:
    sessions = {"main": "client"}

    assert (
        ended(Worker(7190, sessions=sessions), Worker(7210, sessions=sessions), connected=connected) == ends
    )


def test_as_many_as_min_concurrency_stay_while_their_notebook_is_connected() -> None:
    kept = {"kept_for": "client", "keep_at_least": 1}

    assert ended(Worker(400, **kept), Worker(400, **kept), connected=True) == [True, False]
    assert ended(Worker(400, **kept), connected=False) == [True]
