"""Apps with several runners on one host."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.spawning import SECONDS, spawning
from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Iterator

numbers = itertools.count(1)


@pytest.fixture
def spawn(agent_host: Any) -> Iterator[Any]:
    """Spawn apps; those that are left are stopped."""
    with spawning() as do:
        yield lambda **settings: do(sleeper(**settings), agent_host)


def sleeper(**settings: Any) -> Any:
    """An app whose requests take as long as they say."""

    class Sleeper(fal.App, name=f"sleeper-{os.getpid()}-{next(numbers)}", **settings):
        @fal.endpoint("/")
        def sleep(self, seconds: float) -> int:
            import os
            import time

            time.sleep(seconds)
            return os.getpid()

        @fal.realtime("/realtime")
        def double(self, message: dict[str, Any]) -> dict[str, Any]:
            return {"value": message["value"] * 2}

    return Sleeper


def sleep(info: Any, seconds: float) -> int:
    answer = http.post(info.url, json={"seconds": seconds}, headers=info.headers, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    pid: int = answer.json()
    return pid


def runners(host: Any, info: Any) -> int:
    """How many are ready."""
    (found,) = [app["runners"] for app in host.ask("apps") if app["name"] == info.name]
    return int(found)


def test_what_waits_starts_another_runner_up_to_the_limit(agent_host: Any, spawn: Any) -> None:
    info = spawn(max_concurrency=2)

    pids: set[int] = set()

    def both_answer() -> bool:
        with ThreadPoolExecutor(6) as pool:
            pids.update(pool.map(lambda _: sleep(info, 0.7), range(6)))
        return len(pids) > 1

    until(both_answer, seconds=60)
    assert len(pids) == 2
    assert runners(agent_host, info) == 2


def test_runners_that_are_not_needed_end(agent_host: Any, spawn: Any) -> None:
    info = spawn(max_concurrency=3, min_concurrency=1, keep_alive=0.3)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: sleep(info, 1.0), range(3)))

    until(lambda: runners(agent_host, info) == 1)
    assert sleep(info, 0)


def test_an_app_with_a_gateway_scales_to_zero_and_back(agent_host: Any, spawn: Any) -> None:
    info = spawn(max_concurrency=2, keep_alive=0.2)
    before = sleep(info, 0)

    until(lambda: runners(agent_host, info) == 0)
    assert sleep(info, 0) != before


def test_spare_runners_are_there_before_they_are_needed(agent_host: Any, spawn: Any) -> None:
    info = spawn(concurrency_buffer=1, max_concurrency=3, min_concurrency=2)

    until(lambda: runners(agent_host, info) == 2)


def test_a_runner_killed_under_load_costs_no_request(agent_host: Any, spawn: Any) -> None:
    info = spawn(max_concurrency=2, min_concurrency=2, max_multiplexing=4)
    until(lambda: runners(agent_host, info) == 2)
    pids = {sleep(info, 0.1) for _ in range(8)}
    stop = threading.Event()

    def strike() -> None:
        fal.function(host=agent_host)(os.kill)(min(pids), signal.SIGKILL)
        stop.set()

    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(sleep, info, 0.05) for _ in range(60)]
        threading.Timer(0.2, strike).start()
        assert all(answer.result() for answer in answers)
    assert stop.wait(20)
    until(lambda: runners(agent_host, info) == 2)


def test_websockets_pass_the_gateway(spawn: Any) -> None:
    from fal_notebook.realtime_client import connect_realtime

    info = spawn(max_concurrency=2)

    with connect_realtime(info.url.replace("http", "ws") + "/realtime") as connection:
        assert connection.run({"value": 21}) == {"value": 42}


def test_a_private_app_with_a_gateway_wants_the_key(spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_KEY", "me:secret")
    info = spawn(max_concurrency=2, app_auth="private")

    assert sleep(info, 0)
    assert http.post(info.url, json={"seconds": 0}).status_code == 401
