"""Waiting for an app, and calling it by its methods."""

from __future__ import annotations

import datetime as dt
import json
import queue
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import WebSocket  # noqa: TC002 - resolved when the app is served
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field
from support.raw_server import RawServer

import fal_notebook as fal
from fal_agent.runtime.routes import RouteSignature, mark
from fal_notebook import app_client
from fal_notebook.app_client import AppClient, LogPrinter, wait_until_healthy
from fal_notebook.exceptions import AppClientError, AppException, CallTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.spawned import Spawned

# ---------------------------------------------------------------- waiting


def statuses(*given: int) -> Callable[[str], bytes]:
    """Answer with each status, then with the last one again and again."""
    left = list(given)

    def answer(_request: str) -> bytes:
        status = left.pop(0) if len(left) > 1 else left[0]
        body = '{"detail": "because"}'
        head = f"HTTP/1.1 {status} Word\r\nX-Why: because\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    return answer


def wait(server: RawServer, **options: Any) -> None:
    options = {"startup_timeout": 20, "health_check_interval": 0.01, **options}
    wait_until_healthy(server.url, **options)


@pytest.mark.parametrize("status", [200, 201, 204])
def test_any_success_means_healthy(status: int) -> None:
    answer = b"HTTP/1.1 %d Word\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status
    with RawServer(lambda _request: answer) as server:
        wait(server)

        assert server.requests[0].startswith("GET /health HTTP/1.1\r\n")


@pytest.mark.parametrize("status", [404, 500])
def test_an_app_that_is_not_there_yet_is_asked_again(status: int) -> None:
    with RawServer(statuses(status, status, 200)) as server:
        wait(server)

        assert len(server.requests) == 3


def test_a_connection_that_breaks_is_made_again() -> None:
    answers = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
    with RawServer(lambda _request: answers.pop(0)) as server:
        wait(server)

        assert answers == []


def test_a_request_without_an_answer_is_given_up_and_made_again() -> None:
    answers: list[bytes | None] = [None, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
    with RawServer(lambda _request: answers.pop(0)) as server:
        wait(server, health_request_timeout=0.1)

        assert answers == []


@pytest.mark.parametrize("status", [302, 401, 403, 422, 502, 503])
def test_any_other_status_is_an_error_at_once(status: int) -> None:
    with RawServer(statuses(status)) as server:
        with pytest.raises(AppClientError, match=f"answered with {status} .*: because") as caught:
            wait(server)

        assert len(server.requests) == 1
    assert caught.value.status_code == status
    assert caught.value.headers["x-why"] == "because"


def test_the_end_of_the_time_says_how_often_and_what_came_last() -> None:
    with (
        RawServer(statuses(404, 500)) as server,
        pytest.raises(
            AppClientError, match=r"within 0\.2 s \(\d+ attempts\); the last one: .* 500"
        ) as caught,
    ):
        wait(server, startup_timeout=0.2)

    assert caught.value.status_code == 500
    assert caught.value.headers["x-why"] == "because"


def test_the_end_of_the_time_without_any_answer() -> None:
    with RawServer(lambda _request: None) as server:
        url = server.url
    with pytest.raises(AppClientError, match=r"\(1 attempt\); the last one: no app can be reached") as caught:
        wait_until_healthy(url, startup_timeout=0)

    assert caught.value.status_code == 504


def test_the_headers_given_are_sent() -> None:
    with RawServer(statuses(200)) as server:
        wait(server, headers={"Authorization": "Key a:b"})

        assert "authorization: key a:b" in server.requests[0].lower()


def test_a_problem_is_raised_between_attempts() -> None:
    def problem() -> Exception | None:  # asked again while a request is under way
        return ZeroDivisionError("in setup") if len(server.requests) == 3 else None

    with RawServer(statuses(404)) as server:
        with pytest.raises(ZeroDivisionError, match="in setup"):
            wait(server, problem=problem)

        assert len(server.requests) == 3


def test_a_problem_is_raised_while_a_request_hangs() -> None:
    problems: list[Any] = [None, ZeroDivisionError("in setup")]
    with RawServer(lambda _request: None) as server, pytest.raises(ZeroDivisionError, match="in setup"):
        wait(server, problem=lambda: problems.pop(0))


def test_a_problem_explains_more_than_the_status_it_caused() -> None:
    with RawServer(statuses(503)) as server, pytest.raises(CallTimeoutError, match="in setup"):
        wait(server, problem=lambda: CallTimeoutError("in setup"))


# ---------------------------------------------------------------- the client


class Prompt(BaseModel):
    text: str
    when: dt.date | None = None
    size: int = Field(1, alias="imageSize")


class Picture(BaseModel):
    words: list[str]
    when: dt.date | None = None


class Painter(fal.App, name="painter"):
    say: Callable[[str], None]

    def setup(self) -> None:
        self.say("setting up")

    def teardown(self) -> None:
        self.say("tearing down\n")

    def health(self) -> dict[str, str]:
        return {"mood": "fine"}

    @fal.endpoint("/")
    def paint(self, prompt: Prompt) -> Picture:
        """Paint words."""
        return Picture(words=prompt.text.split() * prompt.size, when=prompt.when)

    @fal.endpoint("/scalars")
    def repeat(self, word: str, times: int = 1) -> list[str]:
        return [word] * times

    @fal.endpoint("/plain")
    def plain(self):  # what is tested: it says nothing
        return {"words": ["as", "they", "are"]}

    @fal.endpoint("/optional")
    def maybe(self, picture: bool) -> Picture | None:
        return Picture(words=["yes"]) if picture else None

    @fal.endpoint("/nothing")
    def nothing(self) -> None:
        pass

    @fal.endpoint("/text")
    def text(self) -> PlainTextResponse:
        return PlainTextResponse("words, not JSON")

    @fal.endpoint("/stream")
    def streamed(self) -> StreamingResponse:
        return StreamingResponse(iter([b"\xff", b"\xfe"]), media_type="application/octet-stream")

    @fal.endpoint("/headers")
    def headers(self) -> dict[str, Any]:
        request = self.current_request
        assert request is not None
        return {"x-test": request.headers.get("x-test"), "id": request.request_id}

    @fal.endpoint("/refuse")
    def refuse(self) -> None:
        self.say("about to refuse")
        raise AppException("not today", 418)

    @fal.endpoint("/socket", is_websocket=True)
    async def socket(self, connection: WebSocket) -> None:
        await connection.accept()
        await connection.send_text(await connection.receive_text() * 2)
        await connection.close()


def connect(**options: Any) -> Any:
    return AppClient.connect(Painter, health_check_interval=0.02, **options)


def test_endpoints_are_methods_of_the_client(spawned: list[Spawned]) -> None:
    with connect() as client:
        assert client.url == spawned[0].url
        assert client.application == "painter"
        assert client.health() == {"mood": "fine"}
        assert {"paint", "repeat", "url"} <= set(dir(client))
        assert (client.paint.__name__, client.paint.__doc__) == ("paint", "Paint words.")
        with pytest.raises(
            AttributeError, match="Painter has no endpoint 'pain'; there are: headers, maybe,"
        ):
            client.pain  # noqa: B018


def test_an_endpoint_takes_a_dictionary_a_model_or_keywords(spawned: list[Spawned]) -> None:
    day = dt.date(2024, 2, 29)
    with connect() as client:
        assert client.paint({"text": "a b", "imageSize": 2}).words == ["a", "b", "a", "b"]
        assert client.paint(Prompt(text="a b", imageSize=2)).words == ["a", "b", "a", "b"]
        assert client.paint({"text": "a", "when": day}) == Picture(words=["a"], when=day)
        assert client.repeat(word="w", times=2) == ["w", "w"]
        assert client.repeat({"word": "w"}) == ["w"]
        with pytest.raises(TypeError, match="not both"):
            client.repeat({"word": "w"}, times=2)


def test_an_answer_is_what_the_method_says_that_it_returns(spawned: list[Spawned]) -> None:
    with connect() as client:
        assert client.paint({"text": "a"}) == Picture(words=["a"])
        assert client.maybe(picture=True) == Picture(words=["yes"])
        assert client.maybe(picture=False) is None
        assert client.plain() == {"words": ["as", "they", "are"]}
        assert client.nothing() is None
        assert client.text() == "words, not JSON"
        assert client.streamed() == b"\xff\xfe"


def test_the_headers_of_the_handle_are_sent(spawned: list[Spawned]) -> None:
    with connect() as client:
        assert client.headers()["x-test"] == "yes"
        assert len(client.headers()["id"]) == 32


def test_a_raw_websocket_is_a_connection(spawned: list[Spawned]) -> None:
    with connect() as client, client.socket() as connection:
        connection.send("two")

        assert connection.recv() == "twotwo"


def test_a_realtime_endpoint_is_a_connection_with_the_endpoints_codecs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []
    stand_in = SimpleNamespace(connect_realtime=lambda url, **options: made.append({"url": url, **options}))
    monkeypatch.setitem(sys.modules, "fal_notebook.realtime_client", stand_in)

    class Live(fal.App):
        def live(self, value: dict[str, Any]) -> dict[str, Any]:
            return value

        mark(
            live,
            RouteSignature("/live", is_websocket=True, realtime_mode="unary", encode_message=json.dumps),
        )

    client = AppClient(Live, "http://127.0.0.1:1", headers={"x-test": "yes"})
    client.live()
    client.live(decode_message=json.loads)

    address = {"url": "ws://127.0.0.1:1/live", "headers": {"x-test": "yes"}, "encode_message": json.dumps}
    assert made == [{**address, "decode_message": None}, {**address, "decode_message": json.loads}]


def test_an_error_of_the_app_is_raised_after_its_log(
    spawned: list[Spawned], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log travels on another way than the answer, and may be later."""
    monkeypatch.setattr(app_client, "LOG_QUIET", 0.5)
    settle = LogPrinter.settle

    def late_entry(printer: LogPrinter) -> None:
        threading.Timer(0.05, spawned[0].say, ["why it was refused"]).start()
        settle(printer)

    monkeypatch.setattr(LogPrinter, "settle", late_entry)
    with connect() as client:
        with pytest.raises(
            AppClientError, match=r"POST .*/refuse was answered with 418 .*: not today"
        ) as caught:
            client.refuse()
        printed = capsys.readouterr().out

    assert caught.value.status_code == 418
    assert caught.value.headers["content-type"] == "application/json"
    assert printed.endswith("about to refuse\nwhy it was refused\n")


def test_invalid_arguments_are_named_by_the_error(spawned: list[Spawned]) -> None:
    with connect() as client, pytest.raises(AppClientError, match="Field required") as caught:
        client.paint({})

    assert caught.value.status_code == 422


def test_the_log_is_printed_to_the_end_and_the_app_is_ended(
    spawned: list[Spawned], capsys: pytest.CaptureFixture[str]
) -> None:
    with connect():
        assert not spawned[0].future.done()

    assert spawned[0].is_quiet  # or it were printed twice
    assert spawned[0].future.done()
    assert capsys.readouterr().out == "setting up\ntearing down\n"


def test_the_app_is_ended_when_the_block_fails(spawned: list[Spawned]) -> None:
    with pytest.raises(ZeroDivisionError), connect():
        raise ZeroDivisionError

    assert spawned[0].future.done()


def test_a_setup_that_fails_is_raised_at_once_with_its_own_error(
    spawned: list[Spawned], capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(fal.App):
        def setup(self) -> None:
            raise ZeroDivisionError("in setup")

        @fal.endpoint("/")
        def run(self) -> None: ...

    with pytest.raises(ZeroDivisionError, match="in setup"), AppClient.connect(Broken, startup_timeout=60):
        pytest.fail("there is no client of an app that failed")

    assert "failed: ZeroDivisionError('in setup')\n" in capsys.readouterr().out


def test_a_client_needs_no_launcher(spawned: list[Spawned]) -> None:
    """An app that is served anywhere has a URL."""
    handle = Painter.spawn()
    handle.wait(health_check_interval=0.02)

    client = AppClient(Painter, handle.url, timeout=20)

    assert client.repeat(word="w") == ["w"]
    assert repr(client) == f"<AppClient of Painter at {handle.url}>"


def test_an_answer_whose_type_cannot_be_found_is_plain(spawned: list[Spawned]) -> None:
    """An annotation may name a class that is known to a function only."""

    class Hidden(BaseModel):
        number: int

    class Local(fal.App):
        @fal.endpoint("/")
        def run(self) -> Hidden:
            return Hidden(number=1)

    Local.run.__annotations__["return"] = Hidden  # so that it can be served
    with AppClient.connect(Local, health_check_interval=0.02) as client:
        assert client.run() == Hidden(number=1)
        Local.run.__annotations__["return"] = "Hidden"
        assert AppClient(Local, client.url).run() == {"number": 1}


def test_settling_ends_though_the_log_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_client, "LOG_PATIENCE", 0.1)
    monkeypatch.setattr(app_client, "LOG_QUIET", 60)
    entries: queue.Queue[Any] = queue.Queue()
    printer = LogPrinter(entries)
    entries.put(SimpleNamespace(message="on and on"))

    printer.settle()

    printer.close()


def test_the_names_of_fal_app_are_there() -> None:
    assert fal.app.AppClient is AppClient
    assert fal.app.AppClientError is AppClientError
    assert "AppClient" in dir(fal.app)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fal.app.nothing  # noqa: B018
