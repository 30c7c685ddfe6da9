"""`run`, `submit`, `stream` and `ws`, with apps that are really served."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import math
import os
import socket
import subprocess
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Request  # noqa: TC002 - resolved when the app is served
from fastapi.responses import PlainTextResponse, StreamingResponse
from support.raw_server import RawServer

import fal_notebook as fal
from fal_notebook import app_http, app_registry
from fal_notebook.app_requests import Completed, InProgress, run, stream, submit, ws
from fal_notebook.exceptions import (
    AppClientError,
    AppException,
    CallCancelledError,
    CallTimeoutError,
    ConfigurationError,
    FalSerializationError,
    HostUnreachableError,
    LinkLostError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from support.spawned import Spawned


class Worker(fal.App, name="worker"):
    entered: threading.Event
    abandoned: threading.Event
    goes_on: threading.Event

    def setup(self) -> None:
        self.entered, self.abandoned, self.goes_on = (threading.Event() for _ in range(3))

    @fal.endpoint("/")
    def double(self, number: int) -> dict[str, int]:
        return {"number": 2 * number}

    @fal.endpoint("/echo")
    async def echo(self, request: Request) -> dict[str, Any]:
        context = self.current_request
        assert context is not None
        body = (await request.body()).decode()
        return {"body": body, "id": context.request_id, "headers": context.headers}

    @fal.endpoint("/text")
    def text(self) -> PlainTextResponse:
        return PlainTextResponse("wörds")

    @fal.endpoint("/bytes")
    def bytes(self) -> StreamingResponse:
        return StreamingResponse(iter([b"\xff", b"\xfe"]), media_type="image/png")

    @fal.endpoint("/refuse")
    def refuse(self) -> None:
        raise AppException("not today", 418)

    @fal.endpoint("/hang")
    async def hang(self, request: Request) -> None:
        self.entered.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.abandoned.set()

    @fal.endpoint("/wait")
    async def wait(self) -> str:
        self.entered.set()
        assert await asyncio.to_thread(self.goes_on.wait, 20)
        return "waited"

    @fal.endpoint("/stream")
    async def events(self, count: int = 3) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            try:
                for number in range(count):
                    yield f'data: {{"number": {number}}}\n\n'
                yield "data: words\n\n"
                if count == 0:
                    await asyncio.sleep(60)
            finally:
                self.abandoned.set()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @fal.endpoint("/broken")
    async def broken(self) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "data: 1\n\n"
            raise ZeroDivisionError

        return StreamingResponse(pieces(), media_type="text/event-stream")


@pytest.fixture
def worker(spawned: list[Spawned]) -> Iterator[Any]:
    handle = Worker.spawn()
    handle.wait(health_check_interval=0.02)
    app_registry.register("worker", handle)
    yield handle
    app_registry.forget("worker")


# ---------------------------------------------------------------- run


def test_an_app_is_given_by_name_by_handle_or_by_url(worker: Any) -> None:
    for application in ("worker", worker, worker.url, worker.url + "/"):
        assert run(application, {"number": 2}) == {"number": 4}
    assert run("me/worker", {"number": 2}) == {"number": 4}
    assert run("me/worker/text") == run("worker", path="/text") == "wörds"


def test_an_unknown_name_is_an_error(worker: Any) -> None:
    with pytest.raises(ConfigurationError, match="no app is called 'wroker'"):
        run("wroker", {})


def test_the_body_is_json_and_the_headers_are_the_handles_and_the_callers(worker: Any) -> None:
    given = {"when": dt.date(2024, 2, 29), "words": ["wörds"]}

    answer = run(worker, given, path="/echo", headers={"x-mine": "too"})

    assert answer["body"] == '{"when":"2024-02-29","words":["wörds"]}'
    assert answer["headers"]["content-type"] == "application/json"
    assert (answer["headers"]["x-test"], answer["headers"]["x-mine"]) == ("yes", "too")
    assert len(answer["id"]) == 32
    assert run(worker, None, path="echo")["body"] == ""


def test_a_request_id_of_the_callers_is_kept(worker: Any) -> None:
    assert run(worker, path="/echo", headers={"x-fal-request-id": "mine"})["id"] == "mine"


def test_answers_that_are_not_json_are_text_or_bytes(worker: Any) -> None:
    assert run(worker, path="/text") == "wörds"
    assert run(worker, path="/bytes") == b"\xff\xfe"


def test_an_error_says_what_was_asked_and_answered(worker: Any) -> None:
    with pytest.raises(
        AppClientError, match=r"POST http://.*/refuse was answered with 418 .*: not today"
    ) as caught:
        run(worker, path="/refuse")
    assert caught.value.status_code == 418

    with pytest.raises(AppClientError, match=r'422 .*"number"') as caught:
        run(worker, {"number": "no number"})
    assert caught.value.status_code == 422


def test_a_long_error_is_cut(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_http, "MAX_DETAIL", 5)

    with pytest.raises(AppClientError, match=r": not t\.\.\.$"):
        run(worker, path="/refuse")


def test_arguments_that_json_cannot_hold_are_an_error(worker: Any) -> None:
    with pytest.raises(FalSerializationError, match="cannot be written as JSON"):
        run(worker, {"lock": threading.Lock()})


def test_arguments_may_hold_whatever_pydantic_knows(worker: Any) -> None:
    @dataclasses.dataclass
    class Point:
        x: int

    assert run(worker, [Point(1), {2}], path="/echo")["body"] == '[{"x":1},[2]]'
    assert run(worker, {"x": math.inf}, path="/echo")["body"] == '{"x": Infinity}'


def test_a_request_that_takes_too_long_is_given_up(worker: Any) -> None:
    with pytest.raises(CallTimeoutError, match=r"/hang did not answer within 0\.1 s"):
        run(worker, path="/hang", timeout=0.1)

    assert worker.app.abandoned.wait(20)


def test_an_app_that_is_not_there_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(HostUnreachableError, match=f"no app can be reached at http://127.0.0.1:{port}/"):
        run(f"http://127.0.0.1:{port}", {})


def test_a_connection_that_breaks_before_the_answer_is_whole_is_an_error() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    with RawServer(lambda _request: half) as server, pytest.raises(LinkLostError, match="broke before"):
        run(server.url)


def test_no_proxy_is_asked_for_what_is_on_this_machine(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(app_http, "_senders", {})

    assert run(worker, {"number": 2}) == {"number": 4}
    assert list(stream(worker, {"count": 1})) == [{"number": 0}, "words"]


def test_an_interrupt_gives_the_request_up(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(exchange: app_http.Exchange, timeout: float | None = None) -> Any:
        assert worker.app.entered.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(app_http.Exchange, "response", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(worker, path="/hang")

    assert worker.app.abandoned.wait(20)


def test_a_forked_child_makes_requests_of_its_own(worker: Any) -> None:
    assert run(worker, {"number": 1}) == {"number": 2}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if run(worker.url, {"number": 2}, timeout=20) == {"number": 4} else 1
        finally:
            os._exit(status)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run(worker, {"number": 3}) == {"number": 6}


# ---------------------------------------------------------------- submit


def test_a_submitted_request_tells_how_far_it_is(worker: Any) -> None:
    handle = submit("worker", path="/wait")
    assert worker.app.entered.wait(20)
    events = handle.iter_events()
    assert (handle.status(), next(events)) == (InProgress(), InProgress())
    assert "InProgress" in repr(handle)
    with pytest.raises(CallTimeoutError, match=r"no answer after 0\.01 s; the request goes on"):
        handle.get(timeout=0.01)

    worker.app.goes_on.set()

    assert handle.get() == handle.get() == "waited"
    assert list(events) == [Completed()]
    assert (handle.status(), list(handle.iter_events())) == (Completed(), [Completed()])
    assert handle.cancel() is False


def test_a_cancelled_request_is_seen_by_the_app(worker: Any) -> None:
    handle = submit(worker, path="/hang")
    assert worker.app.entered.wait(20)

    assert handle.cancel() is True

    assert worker.app.abandoned.wait(20)
    with pytest.raises(CallCancelledError, match=f"{handle.request_id} was cancelled"):
        handle.get()
    assert list(handle.iter_events()) == [Completed()]


def test_an_error_comes_when_the_answer_is_asked_for(worker: Any) -> None:
    handle = submit(worker, path="/refuse")

    assert list(handle.iter_events())[-1] == Completed()
    with pytest.raises(AppClientError, match="not today"):
        handle.get()


def test_more_requests_may_wait_than_a_client_keeps_connections_by_itself(worker: Any) -> None:
    waiting = [submit(worker, path="/hang") for _ in range(120)]

    assert run(worker, {"number": 1}, timeout=20) == {"number": 2}

    assert all(handle.cancel() for handle in waiting)


# ---------------------------------------------------------------- stream


def test_events_are_iterated_as_json_or_text(worker: Any) -> None:
    assert list(stream("worker", {"count": 2})) == [{"number": 0}, {"number": 1}, "words"]


def test_ending_the_iteration_ends_the_request(worker: Any) -> None:
    events = stream(worker, {"count": 0})
    assert next(events) == "words"

    events.close()  # type: ignore[attr-defined] # it is a generator

    assert worker.app.abandoned.wait(20)


def test_a_stream_that_is_silent_too_long_is_given_up(worker: Any) -> None:
    events = stream(worker, {"count": 0}, timeout=0.1)
    assert next(events) == "words"

    with pytest.raises(CallTimeoutError, match="did not answer in time"):
        next(events)


def test_a_stream_that_breaks_off_does_not_just_end(worker: Any) -> None:
    events = stream(worker, path="/broken")
    assert next(events) == 1

    with pytest.raises(LinkLostError, match="broke before the answer was whole"):
        next(events)


def test_an_error_instead_of_a_stream_is_raised_with_its_detail(worker: Any) -> None:
    with pytest.raises(AppClientError, match="not today"):
        list(stream(worker, path="/refuse"))


# ---------------------------------------------------------------- ws


def test_a_realtime_connection_is_opened_where_the_app_is_and_closed(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Connection:
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    def connect_realtime(url: str, **options: Any) -> Connection:
        made.append({"url": url, **options})
        return Connection()

    stand_in = types.SimpleNamespace(connect_realtime=connect_realtime)
    monkeypatch.setitem(sys.modules, "fal_notebook.realtime_client", stand_in)

    with ws("worker", headers={"x-mine": "too"}, encode_message=repr) as opened:
        assert not opened.is_closed

    assert opened.is_closed
    address = f"ws://127.0.0.1:{worker.url.rsplit(':')[-1]}/realtime"
    headers = {"x-test": "yes", "x-mine": "too"}
    assert made == [{"url": address, "headers": headers, "encode_message": repr}]


# ---------------------------------------------------------------- imports


def test_nothing_heavy_is_imported_before_the_first_use() -> None:
    heavy = ["httpx", "pydantic", "starlette", "fastapi", "uvicorn", "websockets", "paramiko"]
    modules = "fal_notebook.app_requests, fal_notebook.app_client, fal_notebook.forwarding"
    code = f"import sys, {modules}; print(*[name for name in {heavy!r} if name in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert loaded.split() == []
