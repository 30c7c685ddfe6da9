"""Websocket sessions through a gateway to real servers on Unix sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from support.gateways import PATIENCE, Request, Stage, answer, on_stage
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from fal_agent.serving.balancing import RunnerAddress

if TYPE_CHECKING:
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection

MEGABYTE = 1 << 20


async def opened(stage: Stage, path: str = "/ws", **accept: Any) -> tuple[ClientConnection, Request]:
    """Open a session at the only runner: the client's end and the runner's."""
    opening = asyncio.ensure_future(connecting(stage, path))
    request = await stage.runners[0].next()
    assert (await request.receive())["type"] == "websocket.connect"
    await request.send({"type": "websocket.accept", **accept})
    return await opening, request


async def connecting(stage: Stage, path: str = "/ws", **options: Any) -> ClientConnection:
    connection: ClientConnection = await stage.connect(path, **options)
    return connection


async def heard(request: Request) -> Any:
    return await asyncio.wait_for(request.receive(), PATIENCE)


async def ending(connection: ClientConnection) -> tuple[int, str]:
    """Wait until a session is closed, and say how."""
    await asyncio.wait_for(connection.wait_closed(), PATIENCE)
    return connection.protocol.close_code or 0, connection.protocol.close_reason or ""


def test_a_session_opens_as_it_was_asked_for(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        opening = asyncio.ensure_future(
            connecting(
                stage,
                "/a%2Fb/ws?x=%20&y",
                subprotocols=[Subprotocol("one"), Subprotocol("two")],
                additional_headers=[("X-Two", "1"), ("X-Two", "2"), ("X-Fal-Request-Id", "me")],
                origin="http://page",
            )
        )
        request = await runner.next()
        await request.receive()

        assert (request.path, request.scope["query_string"]) == ("/a%2Fb/ws", b"x=%20&y")
        assert request.scope["subprotocols"] == ["one", "two"]
        assert [request.values(name) for name in ("host", "origin", "x-two", "x-fal-request-id")] == [
            ["app"],
            ["http://page"],
            ["1", "2"],
            ["me"],
        ]
        headers = [(b"x-of-runner", b"yes")]
        await request.send({"type": "websocket.accept", "subprotocol": "two", "headers": headers})
        connection = await opening
        assert connection.subprotocol == "two"
        assert connection.response is not None
        assert connection.response.headers["x-of-runner"] == "yes"
        assert connection.response.headers.get_all("x-fal-request-id") == ["me"]
        await connection.close()

    on_stage(tmp_path, play)


def test_text_and_bytes_pass_in_both_directions(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        connection, request = await opened(stage)
        for sent in ("text \N{SNOWMAN}", "", b"bytes\x00", b"", "x" * MEGABYTE):
            await connection.send(sent)
            message = await heard(request)
            key = "text" if isinstance(sent, str) else "bytes"
            assert message[key] == sent
            await request.send({"type": "websocket.send", key: sent})
            received = await connection.recv()
            assert (type(received), received) == (type(sent), sent)
        await connection.close()

    on_stage(tmp_path, play)


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "away"), (4321, "grüße")])
def test_the_runner_learns_how_the_client_closed(tmp_path: Path, code: int, reason: str) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        connection, request = await opened(stage)
        await connection.send("last")
        await connection.close(code, reason)

        assert (await heard(request))["text"] == "last"
        assert await heard(request) == {"type": "websocket.disconnect", "code": code, "reason": reason}
        request.over.set()
        await stage.until_idle()
        assert stage.sick == []

    on_stage(tmp_path, play)


@pytest.mark.parametrize("is_rude", [False, True])
def test_the_runner_learns_that_the_client_left_without_a_code(tmp_path: Path, is_rude: bool) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        connection, request = await opened(stage)
        if is_rude:
            connection.transport.abort()
        else:
            connection.protocol.send_close()
            connection.transport.write(b"".join(connection.protocol.data_to_send()))
        message = await heard(request)

        assert message["type"] == "websocket.disconnect"
        assert message["code"] in ({1005, 1006} if is_rude else {1005})
        request.over.set()
        await stage.until_idle()
        assert stage.sick == []

    on_stage(tmp_path, play)


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1011, "failed"), (4000, "enough")])
def test_the_client_learns_how_the_runner_closed_after_all_that_it_sent(
    tmp_path: Path, code: int, reason: str
) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        connection, request = await opened(stage)
        for number in range(100):
            await request.send({"type": "websocket.send", "text": str(number)})
        await request.send({"type": "websocket.close", "code": code, "reason": reason})
        request.over.set()

        assert [await connection.recv() for _ in range(100)] == [str(number) for number in range(100)]
        assert await ending(connection) == (code, reason)
        await stage.until_idle()
        assert stage.sick == []

    on_stage(tmp_path, play)


def test_a_runner_that_dies_in_a_session_closes_it_and_is_reported(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [process] = stage.start_processes("a")
        connection = await connecting(stage)
        await connection.send("hello")
        assert await connection.recv() == "hello"
        process.kill()

        code, reason = await ending(connection)
        assert (code, "broke" in reason) == (1011, True)
        await stage.until(lambda: [name for name, _ in stage.sick] == ["a"])
        await stage.until_idle()

    on_stage(tmp_path, play)


def test_a_session_occupies_its_runner_for_its_life(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        connection, request = await opened(stage)
        waiting = stage.ask("/next")
        await stage.until_waiting(1)
        assert runner.arrived.empty()
        await connection.close()
        await heard(request)
        request.over.set()
        following = await runner.next()
        await following.answer()

        assert (await waiting).status_code == 200

    on_stage(tmp_path, play)


def test_a_session_goes_on_when_its_runner_is_no_longer_listed(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        connection, request = await opened(stage)
        stage.gateway.set_runners([])
        await connection.send("still here")
        assert (await heard(request))["text"] == "still here"
        await connection.close()
        await heard(request)
        request.over.set()
        await stage.until(lambda: stage.loads[-1].per_runner == {})

    on_stage(tmp_path, play)


@pytest.mark.parametrize("has_runner", [False, True])
def test_a_client_that_leaves_before_it_was_let_in_gives_its_place_back(
    tmp_path: Path, has_runner: bool
) -> None:
    async def play(stage: Stage) -> None:
        runners = await stage.start("a") if has_runner else []
        opening = asyncio.ensure_future(connecting(stage))
        for runner in runners:
            await runner.next()
        await stage.until(lambda: stage.loads and stage.loads[-1].waiting + stage.loads[-1].in_flight == 1)
        opening.cancel()
        await stage.until_idle()
        assert stage.sick == []

    on_stage(tmp_path, play)


# ---------------------------------------------------------------- refusals and failures


def test_a_refusal_passes_as_the_runner_made_it(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        opening = asyncio.ensure_future(connecting(stage))
        request = await runner.next()
        await request.receive()
        headers = [(b"x-why", b"because"), (b"content-type", b"text/x")]
        await request.send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
        await request.send({"type": "websocket.http.response.body", "body": b"no"})
        request.over.set()
        with pytest.raises(InvalidStatus) as caught:
            await opening

        response = caught.value.response
        assert (response.status_code, response.body) == (401, b"no")
        assert (response.headers["x-why"], response.headers["content-type"]) == ("because", "text/x")
        assert stage.sick == []

    on_stage(tmp_path, play)


def test_a_redirection_is_passed_on_and_not_followed(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        opening = asyncio.ensure_future(connecting(stage))
        request = await runner.next()
        await request.receive()
        headers = [(b"location", b"ws://elsewhere/")]
        await request.send({"type": "websocket.http.response.start", "status": 307, "headers": headers})
        await request.send({"type": "websocket.http.response.body", "body": b""})
        request.over.set()
        with pytest.raises(ValueError, match="cannot follow cross-origin redirect to ws://elsewhere/"):
            await opening
        assert runner.arrived.empty()

    on_stage(tmp_path, play)


def test_an_opening_that_fails_is_tried_at_another_runner(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        busy, fine = await stage.start("busy", "fine")
        gone = RunnerAddress("gone", str(tmp_path / "gone.sock"))
        stage.gateway.set_runners([])
        stage.gateway.set_runners([gone, busy.address, fine.address])
        opening = asyncio.ensure_future(connecting(stage))
        request = await busy.next()
        await request.receive()
        await request.send({"type": "websocket.http.response.start", "status": 503, "headers": []})
        await request.send({"type": "websocket.http.response.body", "body": b""})
        request.over.set()
        request = await fine.next()
        await request.receive()
        await request.send({"type": "websocket.accept"})
        await (await opening).close()

        assert [name for name, _ in stage.sick] == ["gone", "busy"]

    on_stage(tmp_path, play)


@pytest.mark.parametrize(
    ("options", "status", "detail"),
    [
        ({"queue_timeout": 0.01}, 504, "no runner was free"),
        ({"request_timeout": 1.0}, 504, "did not answer within 1 s"),
        ({"skip_retry_conditions": ["connection_error"]}, 502, "broke"),
    ],
)
def test_a_session_that_cannot_be_opened_has_a_clear_status(
    tmp_path: Path, options: dict[str, Any], status: int, detail: str
) -> None:
    async def play(stage: Stage) -> None:
        if "request_timeout" in options:
            await stage.start("a")
        if "skip_retry_conditions" in options:
            stage.gateway.set_runners([RunnerAddress("gone", str(tmp_path / "gone.sock"))])
        with pytest.raises(InvalidStatus) as caught:
            await connecting(stage)
        response = caught.value.response

        assert response.status_code == status
        assert detail in answer_of(response)
        await stage.until_idle()

    on_stage(tmp_path, play, **options)


def answer_of(response: Any) -> str:
    return answer(
        httpx.Response(response.status_code, headers=dict(response.headers), content=bytes(response.body))
    )[1]


def test_an_open_session_may_last_longer_than_a_request(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        connection, request = await opened(stage)
        await asyncio.sleep(1.1)  # longer than a request may take
        await connection.send("hello")
        assert (await heard(request))["text"] == "hello"
        await connection.close()

    on_stage(tmp_path, play, request_timeout=1.0)


# ---------------------------------------------------------------- slow ones


def test_messages_to_a_runner_go_as_fast_as_it_reads(tmp_path: Path) -> None:
    made = most_ahead = 0

    async def play(stage: Stage) -> None:
        nonlocal made, most_ahead
        await stage.start("a")
        connection, request = await opened(stage)

        async def fill() -> None:
            nonlocal made
            for _ in range(200):
                made += 1
                await connection.send(b"x" * (MEGABYTE // 2))

        filling = asyncio.create_task(fill())
        for read in range(1, 201):
            assert len((await heard(request))["bytes"]) == MEGABYTE // 2
            most_ahead = max(most_ahead, made - read)
            for _ in range(20):  # turns of the loop that everyone else may use
                await asyncio.sleep(0)
        await filling
        await connection.close()

        assert most_ahead < 80

    on_stage(tmp_path, play)


def test_messages_to_a_client_go_as_fast_as_it_reads(tmp_path: Path) -> None:
    made = most_ahead = 0

    async def play(stage: Stage) -> None:
        nonlocal made, most_ahead
        await stage.start("a")
        connection, request = await opened(stage)

        async def fill() -> None:
            nonlocal made
            for _ in range(200):
                made += 1
                await request.send({"type": "websocket.send", "bytes": b"x" * (MEGABYTE // 2)})

        filling = asyncio.create_task(fill())
        for read in range(1, 201):
            await connection.recv()
            most_ahead = max(most_ahead, made - read)
            for _ in range(20):
                await asyncio.sleep(0)
        await filling
        await connection.close()

        assert most_ahead < 80

    on_stage(tmp_path, play)


def test_sessions_are_closed_when_the_gateway_stops(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        connection, request = await opened(stage)
        stage.stop.set()

        assert (await ending(connection))[0] == 1012
        assert (await heard(request))["code"] == 1012
        request.over.set()

    on_stage(tmp_path, play)
