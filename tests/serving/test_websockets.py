"""Raw websocket endpoints: what they must look like, and how connections end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import fastapi
import pytest
from fastapi import Query, WebSocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import fal_notebook as fal
from fal_agent.runtime.requests import current_request_id
from fal_agent.serving.http import build_application
from fal_notebook.app import RequestContext
from fal_notebook.ref import get_current_app

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.apps import Served

    Serve = Callable[..., Served]


class Raw(fal.App):
    @fal.endpoint("/echo", is_websocket=True)
    async def echo(self, websocket: WebSocket, times: int = 1) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text * times)

    @fal.endpoint("/typed", is_websocket=True)
    async def typed(self, connection: WebSocket) -> None:
        await connection.accept()
        await connection.send_json(
            [
                self.current_request == RequestContext(),
                get_current_app() is self,
                current_request_id.get(),
            ]
        )

    @fal.endpoint("/fails", is_websocket=True)
    async def fails(self, websocket: WebSocket) -> None:
        await websocket.accept()
        raise ValueError("no more")

    @fal.endpoint("/echo")
    def echo_once(self, text: str) -> str:
        return text


def url(served: Served, path: str) -> str:
    return served.url.replace("http", "ws", 1) + path


def test_the_handler_speaks_any_protocol_and_gets_its_other_parameters(serve: Serve) -> None:
    served = serve(Raw)

    with connect(url(served, "/echo?times=2")) as connection:
        connection.send("ab")
        assert connection.recv(20) == "abab"
    assert served.client.post("/echo", json={"text": "x"}).json() == "x"


def test_an_annotation_that_is_only_there_for_type_checkers_counts(serve: Serve) -> None:
    """Its name ends in WebSocket only as a string; nothing of that name exists when the app is served."""

    class Lazy(fal.App):
        @fal.endpoint("/", is_websocket=True)
        async def run(self, connection: Any) -> None:
            await connection.accept()
            await connection.send_text("here")

    Lazy.run.__annotations__["connection"] = "somewhere.WebSocket"

    with connect(url(serve(Lazy), "/")) as connection:
        assert connection.recv(20) == "here"


def test_a_websocket_is_no_request_but_has_an_id(serve: Serve) -> None:
    served = serve(Raw)
    headers = {"x-fal-request-id": "w1"}

    with connect(url(served, "/typed"), additional_headers=headers) as connection:
        assert connection.recv(20) == '[true,true,"w1"]'
        assert connection.response is not None
        assert connection.response.headers["x-fal-request-id"] == "w1"
    assert served.client.get("/health").status_code == 200


def test_a_handler_that_fails_closes_its_connection_alone(
    serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(Raw)

    with connect(url(served, "/echo")) as other:
        with connect(url(served, "/fails")) as connection, pytest.raises(ConnectionClosed) as info:
            connection.recv(20)
        other.send("still here")
        assert other.recv(20) == "still here"

    assert info.value.rcvd is not None
    assert info.value.rcvd.code == 1011
    log = capfd.readouterr().err
    assert "websocket /fails failed" in log
    assert "ValueError: no more" in log


def test_a_client_that_leaves_is_no_error(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    class Waiting(fal.App):
        @fal.endpoint("/", is_websocket=True)
        async def run(self, websocket: fastapi.WebSocket) -> None:
            await websocket.accept()
            await websocket.receive_text()
            await websocket.receive_text()

    served = serve(Waiting)
    with connect(url(served, "/")) as connection:
        connection.send("one")
    served.stop()

    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- refusals


def refusal(function: Any) -> str:
    cls = type("Refused", (fal.App,), {"run": fal.endpoint("/ws", is_websocket=True)(function)})
    with pytest.raises(ValueError, match="websocket endpoint") as info:
        build_application(cls(_allow_init=True))
    return str(info.value)


def test_a_handler_must_be_async() -> None:
    def run(self: Any, websocket: WebSocket) -> None: ...

    told = refusal(run)

    assert "run() at '/ws' must be defined with `async def`." in told
    assert re.search(r"Its signature is run\(websocket: .*WebSocket.*\) -> ", told)
    assert "async def run(self, websocket: fastapi.WebSocket)" in told


def test_a_handler_must_take_the_connection() -> None:
    async def run(self: Any, socket: Any, other: int = 3) -> None: ...

    assert "must have a parameter annotated `fastapi.WebSocket`." in refusal(run)


def test_a_parameter_of_the_query_is_not_the_connection() -> None:
    async def run(self: Any, websocket: WebSocket = Query()) -> None: ...  # noqa: B008

    run.__annotations__["websocket"] = WebSocket

    assert "must have a parameter annotated `fastapi.WebSocket`." in refusal(run)


def test_all_that_is_wrong_is_told_at_once() -> None:
    def run(self: Any) -> None: ...

    assert "must be defined with `async def` and have a parameter annotated" in refusal(run)
