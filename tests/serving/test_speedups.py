"""Answers go out quickly, with what the environment has for that and without it."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.responses import StreamingResponse
from support import http

import fal_notebook as fal
from fal_agent.serving import speedups
from fal_agent.serving.corked import _Cork
from fal_agent.serving.server import bind_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from support.apps import Served

    Serve = Callable[..., Served]

SIZE = 3 << 20


class Said(fal.App):
    @fal.endpoint("/loop")
    def loop(self) -> dict[str, str]:
        return {}

    @fal.endpoint("/which")
    async def which(self) -> dict[str, str]:
        return {"loop": type(asyncio.get_running_loop()).__module__}

    @fal.endpoint("/large")
    def large(self) -> StreamingResponse:
        return StreamingResponse(iter([b"x" * SIZE]))

    @fal.endpoint("/waits")
    def waits(self) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            await asyncio.sleep(30)
            yield b"late"

        return StreamingResponse(pieces())


class Recorder:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


def written(use: Callable[[Any], Any]) -> tuple[Recorder, list[bytes]]:
    """What a corked transport has written right after `use`, and the transport a turn of the loop later."""

    async def run() -> tuple[Recorder, list[bytes]]:
        recorder: Any = Recorder()
        use(_Cork(recorder, asyncio.get_running_loop()))
        at_once = list(recorder.pieces)
        await asyncio.sleep(0)
        return recorder, at_once

    return asyncio.run(run())


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def test_head_and_body_are_one_piece() -> None:
    recorder, at_once = written(lambda cork: (cork.write(HEAD), cork.write(b"body"), cork.write(b"more")))

    assert at_once == [HEAD + b"body", b"more"]
    assert recorder.pieces == at_once


def test_a_head_whose_body_is_late_goes_out_alone() -> None:
    recorder, at_once = written(lambda cork: cork.write(HEAD))

    assert at_once == []
    assert recorder.pieces == [HEAD]


def test_a_large_body_is_not_copied() -> None:
    body = bytes(SIZE)

    recorder, _ = written(lambda cork: (cork.write(HEAD), cork.write(body)))

    assert recorder.pieces == [HEAD, body]
    assert recorder.pieces[1] is body


def test_two_answers_keep_their_order() -> None:
    recorder, _ = written(lambda cork: (cork.write(HEAD), cork.write(HEAD), cork.write(b"b")))

    assert b"".join(recorder.pieces) == HEAD + HEAD + b"b"


@pytest.mark.parametrize("end", ["close", "uncorked"])
def test_nothing_is_held_back_at_the_end(end: str) -> None:
    recorder, at_once = written(lambda cork: (cork.write(HEAD), getattr(cork, end)()))

    assert at_once == [HEAD]
    assert recorder.is_closed == (end == "close")


def test_a_stream_shows_its_head_before_its_first_piece(serve: Serve) -> None:
    served = serve(Said, drain_seconds=1)

    with http.stream("POST", f"{served.url}/waits", timeout=20) as answer:
        assert answer.status_code == 200


@pytest.mark.parametrize("without", [(), ("httptools",), ("uvloop",), ("httptools", "uvloop")])
def test_an_app_answers_with_and_without_them(
    without: tuple[str, ...], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedups, "_has", lambda module: module in {"httptools", "uvloop"} - {*without})
    served = serve(Said)

    loop = served.client.post("/which").json()["loop"].partition(".")[0]

    assert loop == ("asyncio" if "uvloop" in without else "uvloop")
    assert len(served.client.post("/large").content) == SIZE


def test_an_app_that_may_enter_its_loop_again_gets_one_that_can_be(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nest_asyncio.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    assert serve(Said).client.post("/which").json()["loop"].startswith("asyncio")


def test_small_answers_do_not_wait_for_the_clients_acknowledgement() -> None:
    async def option() -> int:
        accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        listener = bind_port(0)
        server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener)
        _, client = await asyncio.open_connection(*listener.getsockname())
        writer = await accepted
        value: int = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for end in (client, writer):
            end.close()
        server.close()
        return value

    assert asyncio.run(option()) != 0
