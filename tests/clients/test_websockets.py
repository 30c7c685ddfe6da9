"""The websockets library talks to a spawned app, raw and in realtime sessions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgpack
import pytest
import websockets
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

LARGE = 4 << 20  # bytes


def address(app: Any, path: str = "/ws") -> str:
    url: str = app.url.replace("http", "ws", 1)
    return url + path


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_messages_of_every_kind_come_back(app: Any, compression: str | None) -> None:
    with connect(address(app), compression=compression, max_size=None, proxy=None) as socket:
        for message in ("text", "", "\U0001f600 \x00", b"", b"\x00\xff", b"x" * LARGE):
            socket.send(message)
            assert socket.recv(30) == message


def test_a_message_in_fragments_arrives_whole(app: Any) -> None:
    with connect(address(app), proxy=None) as socket:
        socket.send(part for part in ("one ", "two ", "three"))
        assert socket.recv(30) == "one two three"


def test_a_ping_is_answered(app: Any) -> None:
    with connect(address(app), proxy=None) as socket:
        assert socket.ping().wait(30)


def test_many_connections_are_served_at_once(app: Any) -> None:
    async def talk(number: int) -> Any:
        async with connect_async(address(app), proxy=None) as socket:
            await socket.send(str(number))
            return await socket.recv()

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(talk, range(20)))

    assert asyncio.run(all_of_them()) == [str(number) for number in range(20)]


def test_a_realtime_session_takes_packed_messages(app: Any) -> None:
    with connect(address(app, "/realtime"), proxy=None) as socket:
        for value in (21, -0.5, "ab", [1]):
            socket.send(msgpack.packb({"value": value}))
            assert msgpack.unpackb(socket.recv(30)) == {"value": value * 2}


def test_a_realtime_session_says_what_was_wrong_and_ends(app: Any) -> None:
    with connect(address(app, "/realtime"), proxy=None) as socket:
        socket.send("text")
        said = json.loads(socket.recv(30))
        assert (said["type"], said["error"]) == ("x-fal-error", "INTERNAL_ERROR")
        with pytest.raises(websockets.ConnectionClosed):
            socket.recv(30)


def test_realtime_sessions_do_not_mix(app: Any) -> None:
    async def talk(number: int) -> list[Any]:
        async with connect_async(address(app, "/realtime"), proxy=None) as socket:
            for value in range(10):
                await socket.send(msgpack.packb({"value": number * 100 + value}))
            return [msgpack.unpackb(await socket.recv())["value"] for _ in range(10)]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(talk, range(8)))

    answers = asyncio.run(all_of_them())
    assert answers == [[2 * (number * 100 + value) for value in range(10)] for number in range(8)]


@pytest.mark.parametrize("path", ["/nothing", "/"])
def test_where_no_websocket_is_the_handshake_fails(app: Any, path: str) -> None:
    with (
        pytest.raises(InvalidStatus) as caught,
        connect(address(app, path), proxy=None),
    ):
        pass
    assert caught.value.response.status_code in (403, 404)


def test_a_private_app_wants_the_key_in_the_handshake(private_app: Any) -> None:
    with pytest.raises(InvalidStatus) as caught, connect(address(private_app), proxy=None):
        pass
    assert caught.value.response.status_code == 401

    with connect(address(private_app), additional_headers=private_app.headers, proxy=None) as socket:
        socket.send("in")
        assert socket.recv(30) == "in"
