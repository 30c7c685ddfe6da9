"""Brief calls one after the other go straight to a worker, and nobody can tell by anything but the time."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from support.lanes import has_lane, in_lane
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions


@pytest.fixture
def echo(agent_host: Any) -> Any:
    """A function whose calls are in a lane."""

    @fal.function(host=agent_host)
    def do(what: str = "", value: Any = None) -> Any:
        import os
        import time

        if what == "print":
            print(value)
        elif what == "sleep":
            time.sleep(value)
        elif what == "raise":
            raise KeyError(value)
        elif what == "exit":
            os._exit(value)
        elif what == "big":
            return bytes(value)
        elif what == "pid":
            time.sleep(value or 0)
            return os.getpid()
        return value

    in_lane(agent_host, do)
    return do


def record_of(host: Any, run_id: str) -> dict[str, Any]:
    """What the journal has of a run."""
    (record,) = [item for item in host.ask("runs", limit=1000) if item["run_id"] == run_id]
    return record  # type: ignore[no-any-return]


def newest(host: Any) -> dict[str, Any]:
    """The run that was begun last."""
    return host.ask("runs", limit=1)[0]  # type: ignore[no-any-return]


def test_values_and_errors_come_back(agent_host: Any, echo: Any) -> None:
    assert [echo(value=number) for number in range(50)] == list(range(50))
    with pytest.raises(KeyError, match="lost"):
        echo("raise", "lost")
    assert echo(value={"a": (1, 2)}) == {"a": (1, 2)}
    assert has_lane(agent_host)


def test_calls_meet_the_worker_that_was_warm_before(agent_host: Any) -> None:
    @fal.function(host=agent_host)
    def pid() -> int:
        return os.getpid()

    first = pid()
    in_lane(agent_host, pid)

    assert {pid() for _ in range(20)} == {first}


def test_every_call_is_in_the_journal(agent_host: Any, echo: Any) -> None:
    before = {item["run_id"] for item in agent_host.ask("runs", limit=10_000)}
    for number in range(30):
        echo(value=number)
    with pytest.raises(KeyError):
        echo("raise", "x")

    after = [item for item in agent_host.ask("runs", limit=10_000) if item["run_id"] not in before]
    assert [item["state"] for item in after] == ["failed", *["done"] * 30]
    assert {item["label"] for item in after} == {echo.__qualname__}
    assert all(item["finished_at"] >= item["submitted_at"] for item in after)


def test_what_a_call_prints_is_printed(
    agent_host: Any, echo: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert echo("print", "a line") == "a line"
    assert capsys.readouterr().out == "a line\n"
    assert newest(agent_host)["state"] == "done"


def test_a_call_that_takes_long_is_seen_running(agent_host: Any, echo: Any) -> None:
    caller = threading.Thread(target=echo, args=("sleep", 1.5))
    caller.start()

    (run,) = until(lambda: [run for worker in agent_host.ask("status")["workers"] for run in worker["runs"]])
    assert run["label"] == echo.__qualname__
    caller.join()
    assert record_of(agent_host, run["run_id"])["state"] == "done"


def test_a_result_too_large_for_a_frame_arrives(echo: Any) -> None:
    assert echo("big", 3 << 20) == bytes(3 << 20)


def test_an_argument_too_large_for_a_frame_arrives(echo: Any) -> None:
    data = os.urandom(1 << 20)

    assert echo(value=data) == data


def test_a_worker_that_dies_in_a_call_is_reported_and_replaced(agent_host: Any, echo: Any) -> None:
    with pytest.raises(exceptions.WorkerLostError, match="exit status 7"):
        echo("exit", 7)

    assert newest(agent_host)["state"] == "lost"
    assert echo(value=1) == 1


def test_an_interrupt_reaches_the_call_and_leaves_the_worker(agent_host: Any, echo: Any) -> None:
    worker = echo("pid")
    strike_soon()

    with pytest.raises(KeyboardInterrupt):
        echo("sleep", 60)

    assert newest(agent_host)["state"] == "cancelled"
    assert echo("pid") == worker


def test_an_interrupt_between_calls_harms_nothing(echo: Any) -> None:
    """Struck at any moment, a call either gives its value or KeyboardInterrupt, and the next one works."""
    struck = 0
    for delay in range(12):
        deadline = time.monotonic() + 1.0
        try:
            strike_soon(0.001 + delay * 0.0003)
            while time.monotonic() < deadline:
                assert echo(value=delay) == delay
        except KeyboardInterrupt:
            struck += 1
        assert echo(value="next") == "next"

    assert struck == 12


def test_calls_from_two_threads_are_kept_apart(echo: Any) -> None:
    results: dict[int, list[int]] = {1: [], 2: []}

    def work(number: int) -> None:
        for index in range(30):
            results[number].append(echo(value=number * 1000 + index))

    threads = [threading.Thread(target=work, args=(number,)) for number in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == {number: [number * 1000 + index for index in range(30)] for number in (1, 2)}


def test_background_calls_have_the_worker_back(agent_host: Any, echo: Any) -> None:
    worker = echo("pid")
    runs = [echo.submit("pid", 0.3) for _ in range(5)]  # more than another worker is done with at once

    assert worker in {run.result(timeout=20) for run in runs}
    in_lane(agent_host, echo)


def test_two_functions_in_turn_share_a_lane(agent_host: Any) -> None:
    @fal.function(host=agent_host)
    def one(value: int) -> int:
        return value + 1

    @fal.function(host=agent_host)
    def two(value: int) -> int:
        return value * 2

    in_lane(agent_host, lambda: two(one(1)))
    client = agent_host.connect()

    until(lambda: two(one(20)) == 42 and len(client.lanes.by_template) >= 2)
    assert two(one(4)) == 10


def test_functions_that_are_limited_stay_with_the_agent(agent_host: Any) -> None:
    """What only the agent can keep count of does not go past it."""
    limits = ({"max_concurrency": 1}, {"request_timeout": 5}, {"max_multiplexing": 2}, {"min_concurrency": 1})
    for options in limits:

        @fal.function(host=agent_host, **options)
        def one() -> int:
            return 1

        for _ in range(12):
            one()
        client = agent_host.connect()
        template = client._submissions.template_of(next(iter(one._calls.values()))[1])
        assert template is not None
        assert template not in client.lanes.by_template, options


def strike_soon(seconds: float = 0.3) -> None:
    """Press Ctrl-C in a while."""
    threading.Timer(seconds, lambda: os.kill(os.getpid(), 2)).start()
