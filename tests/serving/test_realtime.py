"""Connections whose every message is answered: order, waiting inputs, batches, limits, failures."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from pydantic import BaseModel
from support.realtime_server import END, TIMEOUT, drain, failure, pack, raw, serving, unpack
from support.waiting import until

from fal_agent.runtime.realtime import realtime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.realtime_server import RealtimeServer


class Number(BaseModel):
    """A message."""

    n: int

    def can_batch(self, other: Number, current_size: int) -> bool:
        """Let only numbers of the same parity share a call, and never more than three."""
        return self.n % 2 == other.n % 2 and current_size < 3


class App:
    """Endpoints of many kinds."""

    def __init__(self) -> None:
        self.gate, self.entered, self.left = threading.Event(), threading.Event(), threading.Event()
        self.meeting = threading.Barrier(2)
        self.running, self.most_running = 0, 0

    def wait(self, message: dict[str, Any]) -> None:
        """Wait for the gate at the message named "busy"."""
        if message["n"] == "busy":
            self.entered.set()
            assert self.gate.wait(20)

    @realtime("/async")
    async def double(self, number: Number) -> Number:
        await asyncio.sleep(0)
        return Number(n=number.n * 2)

    @realtime("/sync")
    def double_in_a_thread(self, number: Number) -> Number:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0)
        self.running -= 1
        return Number(n=number.n * 2)

    @realtime("/plain")
    async def plain(self, message: Any) -> Any:
        return {"got": message}

    @realtime("/keep")
    def keep(self, message: Any) -> Any:
        self.wait(message)
        return message

    @realtime("/newest", buffering=1)
    def newest(self, message: Any) -> Any:
        self.wait(message)
        return message

    @realtime("/two", buffering=2)
    def two(self, message: Any) -> Any:
        self.wait(message)
        return message

    @realtime("/batch", max_batch_size=3)
    def batch(self, *messages: Any) -> Any:
        self.wait(messages[0])
        return {"n": [message["n"] for message in messages]}

    @realtime("/matching", max_batch_size=10)
    async def matching(self, first: Number, *more: Number) -> Any:
        if first.n == 0:
            self.entered.set()
            await asyncio.to_thread(self.gate.wait, 20)
        return {"n": [first.n, *(number.n for number in more)]}

    @realtime("/limited", session_timeout=1.0)
    async def limited(self, message: Any) -> Any:
        await asyncio.sleep(message["seconds"])  # longer than the session may be silent
        return message

    @realtime("/meet")
    def meet(self, message: Any) -> Any:
        self.meeting.wait(20)
        return message

    @realtime("/raise")
    async def fail(self, message: Any) -> Any:
        raise _error(message["kind"])

    @realtime("/raise-sync")
    def fail_in_a_thread(self, message: Any) -> Any:
        raise _error(message["kind"])

    @realtime("/not-a-dict")
    async def not_a_dict(self, message: Any) -> Any:
        return (item for item in ()) if message.get("generator") else 3

    @realtime("/forever")
    async def forever(self, message: Any) -> Any:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # cleaning up may wait, too
            self.left.set()

    @realtime("/gated")
    def gated(self, message: Any) -> Any:
        self.entered.set()
        self.gate.wait(20)
        return message


def _error(kind: str) -> BaseException:
    errors: dict[str, BaseException] = {
        "ValueError": ValueError("the text of it"),
        "without a text": ValueError(),
        "SystemExit": SystemExit(3),
        "StopIteration": StopIteration(4),
        "CancelledError": asyncio.CancelledError(),
        "long": ValueError("x" * 1_000_000),
        "unprintable": Unprintable(),
        "surrogate": ValueError("\ud800"),
    }
    return errors[kind]


class Unprintable(Exception):
    """An error that cannot be written."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def served(app: App) -> Iterator[RealtimeServer]:
    with serving(app) as server:
        yield server
        app.gate.set()


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("path", ["/async", "/sync"])
def test_each_input_is_answered_in_order_one_at_a_time(served: RealtimeServer, app: App, path: str) -> None:
    with raw(served, path) as client:
        for n in range(50):
            client.send(pack({"n": n}))

        assert [unpack(client.recv(timeout=20)) for _ in range(50)] == [{"n": 2 * n} for n in range(50)]
    assert app.most_running <= 1


def test_without_a_model_a_message_is_what_msgpack_makes_of_it(served: RealtimeServer) -> None:
    message = {
        "text": "é",
        "bytes": b"\x00\xff",
        "list": [1, 2.5, None],
        "deep": {"a": {"b": True}},
        7: "seven",
    }

    with raw(served, "/plain") as client:
        client.send(pack(message))
        answer = client.recv(timeout=20)

    assert msgpack.unpackb(answer, strict_map_key=False) == {"got": message}


def test_a_message_in_fragments_is_one_message(served: RealtimeServer) -> None:
    whole = pack({"n": 21})

    with raw(served, "/async") as client:
        client.send([whole[:2], whole[2:]])

        assert unpack(client.recv(timeout=20)) == {"n": 42}


# ---------------------------------------------------------------- inputs that wait


@pytest.mark.parametrize(
    ("path", "answered"),
    [("/keep", ["busy", 1, 2, 3, 4]), ("/newest", ["busy", 4]), ("/two", ["busy", 3, 4])],
)
def test_the_oldest_waiting_inputs_make_room_for_newer_ones(
    served: RealtimeServer, app: App, path: str, answered: list[Any]
) -> None:
    with raw(served, path) as client:
        client.send(pack({"n": "busy"}))
        assert app.entered.wait(20)
        for n in (1, 2, 3, 4):
            client.send(pack({"n": n}))
        until(lambda: served.received == 5)
        app.gate.set()
        client.send('{"type": "x-fal-end"}')

        assert drain(client) == ([{"n": n} for n in answered], END, 1000)


def test_waiting_inputs_share_a_call_up_to_the_batch_size(served: RealtimeServer, app: App) -> None:
    with raw(served, "/batch") as client:
        client.send(pack({"n": "busy"}))
        assert app.entered.wait(20)
        for n in range(5):
            client.send(pack({"n": n}))
        until(lambda: served.received == 6)
        app.gate.set()
        client.send('{"type": "x-fal-end"}')

        assert drain(client)[0] == [{"n": ["busy"]}, {"n": [0, 1, 2]}, {"n": [3, 4]}]


def test_the_first_input_decides_who_shares_its_call(served: RealtimeServer, app: App) -> None:
    """The first one refused ends the batch, and is the first of the next."""
    with raw(served, "/matching") as client:
        client.send(pack({"n": 0}))
        assert app.entered.wait(20)
        for n in (1, 3, 5, 7, 9, 2, 4, 3):
            client.send(pack({"n": n}))
        until(lambda: served.received == 9)
        app.gate.set()
        client.send('{"type": "x-fal-end"}')

        batches = [message["n"] for message in drain(client)[0]]
    assert batches == [[0], [1, 3, 5], [7, 9], [2, 4], [3]]


def test_an_input_that_spoils_a_batch_fails_after_those_before_it(served: RealtimeServer, app: App) -> None:
    with raw(served, "/matching") as client:
        client.send(pack({"n": 0}))
        assert app.entered.wait(20)
        for n in (1, 3, "no number"):
            client.send(pack({"n": n}))
        until(lambda: served.received == 4)
        app.gate.set()

        messages, told, code = drain(client)
    assert messages == [{"n": [0]}, {"n": [1, 3]}]
    assert (told["error"], code) == ("INTERNAL_ERROR", 1000)


# ---------------------------------------------------------------- the end of a session


def test_a_session_without_inputs_ends_with_a_timeout(served: RealtimeServer) -> None:
    with raw(served, "/limited") as client:
        assert drain(client) == ([], TIMEOUT, 1000)


def test_work_that_goes_on_is_finished_before_a_timeout_is_told(served: RealtimeServer) -> None:
    with raw(served, "/limited") as client:
        client.send(pack({"seconds": 1.5}))
        client.send(pack({"seconds": 0.0}))

        assert drain(client) == ([{"seconds": 1.5}, {"seconds": 0.0}], TIMEOUT, 1000)


def test_a_client_may_say_that_it_has_no_more_inputs(served: RealtimeServer) -> None:
    with raw(served, "/sync") as client:
        for n in range(3):
            client.send(pack({"n": n}))
        client.send('{"type": "x-fal-end"}')

        assert drain(client) == ([{"n": 0}, {"n": 2}, {"n": 4}], END, 1000)


def test_a_client_that_leaves_cancels_its_handler(
    served: RealtimeServer, app: App, capfd: pytest.CaptureFixture[str]
) -> None:
    with raw(served, "/forever") as client:
        client.send(pack({}))
        assert app.entered.wait(20)

    assert app.left.wait(20)
    until(lambda: served.open == 0)
    assert capfd.readouterr().err == ""


def test_a_client_that_vanishes_cancels_its_handler(served: RealtimeServer, app: App) -> None:
    """Without a goodbye, as when a kernel is killed."""
    with raw(served, "/forever") as client:
        client.send(pack({}))
        assert app.entered.wait(20)
        client.close_socket()

    assert app.left.wait(20)
    until(lambda: served.open == 0)


def test_what_runs_in_a_thread_is_waited_for_when_its_client_leaves(served: RealtimeServer, app: App) -> None:
    """A thread cannot be cancelled, and its app must not be torn down under it."""
    with raw(served, "/gated") as client:
        client.send(pack({}))
        assert app.entered.wait(20)
    with raw(served, "/plain") as other:  # goes on meanwhile
        other.send(pack({}))
        other.recv(timeout=20)

    assert served.open >= 1
    app.gate.set()
    until(lambda: served.open == 0)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("path", ["/raise", "/raise-sync"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ValueError", "the text of it"),
        ("without a text", "ValueError"),
        ("SystemExit", "3"),
        ("StopIteration", "StopIteration"),
        ("CancelledError", "CancelledError"),
        ("long", "xxxxxxxxxx"),
        ("unprintable", "Unprintable"),
        ("surrogate", "\ud800"),
    ],
)
def test_a_handler_that_fails_ends_its_connection_and_no_other(
    served: RealtimeServer, path: str, kind: str, reason: str
) -> None:
    with raw(served, "/async") as other, raw(served, path) as client:
        client.send(pack({"kind": kind}))
        messages, told, code = drain(client)

        assert (messages, told["type"], told["error"], code) == ([], "x-fal-error", "INTERNAL_ERROR", 1000)
        assert reason in told["reason"]
        assert len(told["reason"]) < 20_000
        other.send(pack({"n": 1}))
        assert unpack(other.recv(timeout=20)) == {"n": 2}


def test_the_traceback_of_a_handler_is_in_the_log(
    served: RealtimeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    with raw(served, "/raise") as client:
        client.send(pack({"kind": "ValueError"}))
        drain(client)

    log = capfd.readouterr().err
    assert "realtime endpoint /raise of App failed:" in log
    assert 'raise _error(message["kind"])' in log
    assert log.rstrip().endswith("ValueError: the text of it")
    assert "serving/realtime" not in log  # it begins where the app's own code does
    assert "starlette" not in log


def test_an_output_that_is_neither_dict_nor_model_is_an_error(served: RealtimeServer) -> None:
    expected = "Expected a dict or pydantic model as output, got <class 'int'>"

    with raw(served, "/not-a-dict") as client:
        client.send(pack({}))
        assert drain(client) == ([], failure(expected), 1000)


def test_a_handler_that_yields_without_an_annotation_is_told_so(served: RealtimeServer) -> None:
    with raw(served, "/not-a-dict") as client:
        client.send(pack({"generator": True}))

        reason = drain(client)[1]["reason"]
    assert reason.startswith("Expected a dict or pydantic model as output, got <class 'generator'>")
    assert "annotated as an iterator" in reason


def test_an_input_that_does_not_fit_the_model_is_an_error(served: RealtimeServer) -> None:
    with raw(served, "/async") as client:
        client.send(pack({"n": 1}))
        client.send(pack({"n": "no number"}))
        messages, told, code = drain(client)

    assert (messages, told["error"], code) == ([{"n": 2}], "INTERNAL_ERROR", 1000)
    assert "valid integer" in told["reason"]


@pytest.mark.parametrize(
    "text", ["hello", "{}", "[1]", '{"type": "x-fal-other"}', '{"n": 1}', "[" * 4000, ""]
)
def test_a_text_frame_is_no_input(served: RealtimeServer, text: str) -> None:
    with raw(served, "/async") as client:
        client.send(pack({"n": 1}))
        client.send(text)
        messages, told, code = drain(client)

    assert (messages, told["error"], code) == ([{"n": 2}], "INTERNAL_ERROR", 1000)
    assert "binary frames" in told["reason"]


def test_connections_do_not_wait_for_each_other(served: RealtimeServer) -> None:
    """Both handlers must run at once, or neither gets past the meeting."""
    with raw(served, "/meet") as one, raw(served, "/meet") as two:
        one.send(pack({"n": 1}))
        two.send(pack({"n": 2}))

        assert (unpack(one.recv(timeout=20)), unpack(two.recv(timeout=20))) == ({"n": 1}, {"n": 2})


def test_a_message_above_the_servers_limit_disturbs_no_other_connection(app: App) -> None:
    with (
        serving(app, ws_max_size=1000) as served,
        raw(served, "/async") as other,
        raw(served, "/async") as client,
    ):
        client.send(pack({"n": 1, "filler": b"x" * 2000}))

        assert drain(client) == ([], None, 1009)
        other.send(pack({"n": 1}))
        assert unpack(other.recv(timeout=20)) == {"n": 2}


def test_connections_end_when_the_server_stops(app: App) -> None:
    with serving(app) as served, raw(served, "/forever") as client:
        client.send(pack({}))
        assert app.entered.wait(20)
        stopping = served

    assert app.left.wait(20)
    until(lambda: stopping.open == 0)
