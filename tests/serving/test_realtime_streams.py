"""Streams of realtime endpoints: order, ends, back-pressure, and memory that stays bounded."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import (  # noqa: TC003 - read by the decorator
    AsyncGenerator,
    AsyncIterator,
    Iterable,
    Iterator,
)
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel
from support.realtime_server import END, drain, failure, pack, raw, send_late, serving, unpack
from support.waiting import until

from fal_agent.runtime.realtime import realtime
from fal_agent.serving.realtime_inbox import MAX_WAITING_BYTES, MAX_WAITING_INPUTS

if TYPE_CHECKING:
    from support.realtime_server import RealtimeServer

MIB = 1024 * 1024
_LEVEL: contextvars.ContextVar[str] = contextvars.ContextVar("_LEVEL", default="outside")


class Number(BaseModel):
    """A message."""

    n: int


class App:
    """Endpoints of all streaming modes."""

    def __init__(self) -> None:
        self.gate, self.closed, self.waiting = threading.Event(), threading.Event(), threading.Event()
        self.made = self.handled = 0
        self.threads: set[int] = set()
        self.levels: list[str] = []

    @realtime("/async")
    async def count(self, number: Number) -> AsyncIterator[Number]:
        for n in range(number.n):
            yield Number(n=n)

    @realtime("/sync", buffering=1)
    def count_in_a_thread(self, number: Number) -> Iterator[dict[str, int]]:
        _LEVEL.set("inside")
        for n in range(number.n):
            self.threads.add(threading.get_ident())
            self.levels.append(_LEVEL.get())
            yield {"n": n}

    @realtime("/plain")
    def count_elsewhere(self, number: Number) -> AsyncIterator[Number]:
        return self.count.original_func(self, number)

    @realtime("/later")
    async def count_later(self, number: Number) -> AsyncIterator[Number]:
        await asyncio.sleep(0)
        return self.count.original_func(self, number)

    @realtime("/no-stream")
    def no_stream(self, message: Any) -> Iterator[Any]:
        return [1, 2]  # type: ignore[return-value]

    @realtime("/breaks")
    def breaks(self, message: Any) -> Iterator[Any]:
        yield {"n": 1}
        raise ValueError("in the middle")

    @realtime("/limited", session_timeout=1.0)
    async def limited(self, message: Any) -> AsyncIterator[Any]:
        yield {}

    @realtime("/endless")
    async def endless(self, message: Any) -> AsyncIterator[Any]:
        with self.closing():
            while True:
                self.made += 1
                yield {"n": self.made, "filler": bytes(MIB)}

    @realtime("/endless-sync")
    def endless_in_a_thread(self, message: Any) -> Iterable[Any]:
        with self.closing():
            while True:
                self.made += 1
                yield {"n": self.made, "filler": bytes(MIB)}

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Tell when a generator is closed."""
        try:
            yield
        finally:
            self.closed.set()

    @realtime("/sum")
    async def total(self, numbers: AsyncIterator[Number]) -> Number:
        total = 0
        async for number in numbers:
            total += number.n
        return Number(n=total)

    @realtime("/sum-limited", session_timeout=1.0)
    async def total_limited(self, numbers: AsyncIterator[Number]) -> Number:
        return await self.total.original_func(self, numbers)

    @realtime("/sum-sync")
    def total_sync(self, numbers: AsyncIterator[Number]) -> Number:
        return Number(n=0)

    @realtime("/sum-forgiving")
    async def total_forgiving(self, numbers: AsyncIterator[Number]) -> dict[str, int]:
        total = bad = 0
        while True:
            try:
                total += (await numbers.__anext__()).n
            except StopAsyncIteration:
                return {"total": total, "bad": bad}
            except ValueError:
                bad += 1

    @realtime("/patient")
    async def patient(self, messages: AsyncIterator[Any]) -> Any:
        while True:
            try:
                return await asyncio.wait_for(messages.__anext__(), 0.01)
            except asyncio.TimeoutError:
                self.waiting.set()

    @realtime("/first")
    async def first(self, messages: AsyncGenerator[Any, None]) -> Any:
        async for message in messages:
            await messages.aclose()
            return message
        return {}

    @realtime("/hang")
    async def hang(self, messages: AsyncIterator[Any]) -> Any:
        with self.closing():
            async for _ in messages:
                self.waiting.set()
        return {}

    @realtime("/echo")
    async def echo(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        with self.closing():
            async for message in messages:
                yield message

    @realtime("/echo-limited", session_timeout=1.0)
    async def echo_limited(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in messages:
            yield message
        yield {"said": "all"}

    @realtime("/three")
    async def three(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        for _ in range(3):
            yield await messages.__anext__()

    @realtime("/slow")
    async def slow(self, message: Any) -> Any:
        await self.opened()
        self.handled += 1
        return {"n": message["n"]}

    @realtime("/slow-newest", buffering=2)
    async def slow_newest(self, message: Any) -> Any:
        await self.opened()
        return {"n": message["n"]}

    @realtime("/slow-stream")
    async def slow_stream(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        await self.opened()
        async for message in messages:
            yield {"n": message["n"]}

    @realtime("/slow-failure")
    async def slow_failure(self, message: Any) -> Any:
        await self.opened()
        raise ValueError("after all")

    async def opened(self) -> None:
        """Wait for the gate."""
        await asyncio.to_thread(self.gate.wait, 60)

    @realtime("/witness")
    async def witness(self, message: Any) -> Any:
        return message


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def served(app: App) -> Iterator[RealtimeServer]:
    with serving(app) as server:
        yield server
        app.gate.set()


def let_the_server_go_on(served: RealtimeServer) -> None:
    """Have it answer others a while, so that whatever it can do meanwhile is done."""
    with raw(served, "/witness") as client:
        for n in range(300):
            client.send(pack({"n": n}))
            assert unpack(client.recv(timeout=20)) == {"n": n}


# ---------------------------------------------------------------- the server streams


@pytest.mark.parametrize("path", ["/async", "/sync", "/plain", "/later"])
def test_every_item_comes_in_order_and_then_the_end(served: RealtimeServer, path: str) -> None:
    with raw(served, path) as client:
        client.send(pack({"n": 1000}))

        assert drain(client) == ([{"n": n} for n in range(1000)], END, 1000)


def test_an_empty_stream_is_complete_at_once(served: RealtimeServer) -> None:
    with raw(served, "/sync") as client:
        client.send(pack({"n": 0}))

        assert drain(client) == ([], END, 1000)


def test_a_plain_generator_lives_in_one_thread_and_one_context(served: RealtimeServer, app: App) -> None:
    """So what it sets up for its thread holds from its first item to its last."""
    with raw(served, "/sync") as client:
        client.send(pack({"n": 100}))
        drain(client)

    assert len(app.threads) == 1
    assert app.levels == ["inside"] * 100


def test_a_handler_that_gives_no_iterator_is_an_error(served: RealtimeServer) -> None:
    with raw(served, "/no-stream") as client:
        client.send(pack({}))

        assert drain(client) == ([], failure("Expected an iterator as output, got <class 'list'>"), 1000)


def test_a_stream_that_breaks_has_its_items_before_the_error(served: RealtimeServer) -> None:
    with raw(served, "/breaks") as client:
        client.send(pack({}))

        assert drain(client) == ([{"n": 1}], failure("in the middle"), 1000)


def test_a_stream_that_nobody_asks_for_times_out(served: RealtimeServer) -> None:
    with raw(served, "/limited") as client:
        assert drain(client)[1]["error"] == "TIMEOUT"


def test_what_comes_after_the_one_input_changes_nothing(served: RealtimeServer) -> None:
    with raw(served, "/async") as client:
        client.send(pack({"n": 3}))
        send_late(client, b"\xc1 more")

        assert drain(client) == ([{"n": 0}, {"n": 1}, {"n": 2}], END, 1000)


@pytest.mark.parametrize("path", ["/endless", "/endless-sync"])
def test_a_slow_client_makes_the_generator_wait(served: RealtimeServer, app: App, path: str) -> None:
    """An item is made when there is room for it on the way to the client."""
    with raw(served, path, max_queue=1) as client:
        client.send(pack({}))
        until(lambda: app.made >= 2)
        let_the_server_go_on(served)

        assert app.made < 64, "what is under way fits the buffers of two sockets"
        numbers = [unpack(client.recv(timeout=20))["n"] for _ in range(100)]
        assert numbers == list(range(1, 101))
        assert app.made < 164

    assert app.closed.wait(20), "the generator is closed when its client leaves"
    until(lambda: served.open == 0)


# ---------------------------------------------------------------- the client streams


def test_a_streamed_input_ends_when_the_client_says_so(served: RealtimeServer) -> None:
    with raw(served, "/sum") as client:
        for n in range(100):
            client.send(pack({"n": n}))
        client.send('{"type": "x-fal-end"}')

        assert drain(client) == ([{"n": 4950}], END, 1000)


def test_a_streamed_input_ends_when_nothing_comes_for_the_sessions_timeout(served: RealtimeServer) -> None:
    with raw(served, "/sum-limited") as client:
        client.send(pack({"n": 1}))
        client.send(pack({"n": 2}))

        assert drain(client) == ([{"n": 3}], END, 1000)


def test_a_handler_of_a_streamed_input_must_be_asynchronous(served: RealtimeServer) -> None:
    with raw(served, "/sum-sync") as client:
        send_late(client, pack({"n": 1}))
        messages, told, code = drain(client)

    assert (messages, told["error"], code) == ([], "INTERNAL_ERROR", 1000)
    assert "must be an `async def`" in told["reason"]


def test_a_handler_may_pass_over_inputs_that_do_not_fit(served: RealtimeServer) -> None:
    with raw(served, "/sum-forgiving") as client:
        for n in (1, "no number", 2):
            client.send(pack({"n": n}))
        client.send('{"type": "x-fal-end"}')

        assert drain(client)[0] == [{"total": 3, "bad": 1}]


def test_a_handler_that_does_not_fails_by_them(served: RealtimeServer) -> None:
    with raw(served, "/sum") as client:
        client.send(pack({"n": "no number"}))

        assert drain(client)[1]["error"] == "INTERNAL_ERROR"


def test_a_handler_may_wait_for_an_input_with_a_limit_of_its_own(served: RealtimeServer, app: App) -> None:
    with raw(served, "/patient") as client:
        assert app.waiting.wait(20)
        client.send(pack({"n": 1}))

        assert drain(client)[0] == [{"n": 1}]


def test_a_handler_may_leave_a_streamed_input(served: RealtimeServer) -> None:
    with raw(served, "/first") as client:
        client.send(pack({"n": 1}))

        assert drain(client) == ([{"n": 1}], END, 1000)


@pytest.mark.parametrize("path", ["/hang", "/echo"])
def test_a_client_that_leaves_its_stream_ends_the_handler(
    served: RealtimeServer, app: App, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with raw(served, path) as client:
        client.send(pack({"n": 1}))
        if path == "/echo":
            client.recv(timeout=20)
        else:
            assert app.waiting.wait(20)

    assert app.closed.wait(20)
    until(lambda: served.open == 0)
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- both stream


def test_items_come_while_inputs_still_go(served: RealtimeServer) -> None:
    with raw(served, "/echo") as client:
        for n in range(20):
            client.send(pack({"n": n}))
            assert unpack(client.recv(timeout=20)) == {"n": n}
        client.send('{"type": "x-fal-end"}')

        assert drain(client) == ([], END, 1000)


def test_a_stream_of_inputs_that_falls_silent_ends(served: RealtimeServer) -> None:
    with raw(served, "/echo-limited") as client:
        client.send(pack({"n": 1}))

        assert drain(client) == ([{"n": 1}, {"said": "all"}], END, 1000)


def test_the_handler_may_end_first(served: RealtimeServer) -> None:
    with raw(served, "/three") as client:
        send_late(client, *(pack({"n": n}) for n in range(5)))

        assert drain(client) == ([{"n": 0}, {"n": 1}, {"n": 2}], END, 1000)


# ---------------------------------------------------------------- bounds


@contextmanager
def sending(client: Any, frames: int, filler: int) -> Iterator[threading.Thread]:
    """Send numbered frames from a thread, and then the end."""

    def send() -> None:
        for n in range(frames):
            client.send(pack({"n": n, "filler": bytes(filler)}))
        client.send('{"type": "x-fal-end"}')

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("path", ["/slow", "/slow-stream"])
@pytest.mark.parametrize(
    ("sent", "most"), [((3000, 10), MAX_WAITING_INPUTS), ((160, MIB), MAX_WAITING_BYTES // MIB)]
)
def test_a_fast_client_waits_for_a_slow_handler_and_loses_nothing(
    served: RealtimeServer, app: App, path: str, sent: tuple[int, int], most: int
) -> None:
    """No more is read from it than may wait, so what it sends waits on its own machine."""
    frames, filler = sent

    with raw(served, path) as client, sending(client, frames, filler) as sender:
        until(lambda: served.received >= most)
        before = served.received
        let_the_server_go_on(served)

        assert served.received - 300 <= before + 2 <= most + 4
        assert sender.is_alive() or filler < MIB, "there is no place where so much could have gone"
        app.gate.set()
        assert drain(client) == ([{"n": n} for n in range(frames)], END, 1000)


def test_a_client_whose_inputs_wait_is_not_taken_for_dead(app: App) -> None:
    """Its answers to pings wait behind its inputs, so there must be no deadline for them."""
    with (
        serving(app, ws_ping_interval=0.02) as served,
        raw(served, "/slow") as client,
        sending(client, 160, MIB),
    ):
        until(lambda: served.received >= MAX_WAITING_BYTES // MIB)
        let_the_server_go_on(served)
        app.gate.set()

        assert drain(client) == ([{"n": n} for n in range(160)], END, 1000)


def test_where_old_inputs_make_room_a_fast_client_need_not_wait(served: RealtimeServer, app: App) -> None:
    with raw(served, "/slow-newest") as client:
        with sending(client, 300, MIB):
            until(lambda: served.received == 301)
        app.gate.set()
        numbers = [message["n"] for message in drain(client)[0]]

    assert numbers[-2:] == [298, 299]
    assert len(numbers) == 3


def test_a_client_that_is_busy_sending_is_told_of_a_failure(served: RealtimeServer, app: App) -> None:
    with raw(served, "/slow-failure") as client:
        failed = threading.Event()

        def send() -> None:
            try:
                for n in range(1000):
                    client.send(pack({"n": n, "filler": bytes(MIB)}))
            except Exception:
                failed.set()

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        until(lambda: served.received >= MAX_WAITING_BYTES // MIB)
        app.gate.set()

        assert drain(client) == ([], failure("after all"), 1000)
        thread.join(60)
        assert failed.is_set()
