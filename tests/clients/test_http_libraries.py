"""requests and aiohttp talk to a spawned app."""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import requests
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LARGE = 4 << 20  # bytes
SECONDS = 60.0


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False  # proxies are for other machines
        yield session


def test_requests_posts_json_and_shows_an_image(app: Any, session: requests.Session) -> None:
    assert session.post(app.url, json={"name": "you"}, timeout=SECONDS).json() == {"text": "hello you"}
    wrong = session.post(f"{app.url}/repeat", json={"text": 5}, timeout=SECONDS)
    assert wrong.status_code == 422
    assert wrong.json()["detail"][0]["loc"] == ["body", "text"]

    picture = session.get(session.post(f"{app.url}/picture", timeout=SECONDS).json()["url"], timeout=SECONDS)
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).size == (64, 48)


def test_requests_streams_both_ways(app: Any, session: requests.Session, gate: str) -> None:
    url = f"{app.url}/drip?gate={gate}"
    with session.post(url, stream=True, timeout=SECONDS) as answer:
        lines = answer.iter_lines()
        assert next(lines) == b'data: "first"'
        requests.post(f"{app.url}/open?gate={gate}", timeout=SECONDS)
        assert [line for line in lines if line] == [b'data: "second"']

    pieces = (b"x" * 1024 for _ in range(LARGE // 1024))
    assert session.post(f"{app.url}/size", data=pieces, timeout=SECONDS).json() == {"bytes": LARGE}


def test_requests_uploads_a_form_of_files(app: Any, session: requests.Session) -> None:
    answer = session.post(f"{app.url}/size", files={"file": ("x.bin", b"x" * LARGE)}, timeout=SECONDS)

    assert answer.json()["bytes"] > LARGE


def test_a_client_that_leaves_an_answer_half_read_does_no_harm(
    app: Any, session: requests.Session, gate: str
) -> None:
    with session.post(f"{app.url}/drip?gate={gate}", stream=True, timeout=SECONDS) as answer:
        assert next(answer.iter_content(None)).startswith(b"data")

    assert session.post(app.url, json={"name": "you"}, timeout=SECONDS).status_code == 200


def test_aiohttp_makes_many_requests_at_once(app: Any) -> None:
    async def ask() -> list[Any]:
        async with aiohttp.ClientSession(app.url) as session:

            async def one(number: int) -> Any:
                async with session.post("/", json={"name": str(number)}) as answer:
                    return await answer.json()

            return await asyncio.gather(*map(one, range(50)))

    assert asyncio.run(ask()) == [{"text": f"hello {number}"} for number in range(50)]


def test_aiohttp_streams_both_ways(app: Any, gate: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(LARGE // 1024):
            yield b"x" * 1024

    async def talk() -> None:
        async with aiohttp.ClientSession(app.url) as session:
            async with session.post("/drip", params={"gate": gate}) as answer:
                assert await answer.content.readline() == b'data: "first"\n'
                await session.post("/open", params={"gate": gate})
                assert await answer.content.read() == b'\ndata: "second"\n\n'
            async with session.post("/size", data=pieces(), expect100=True) as answer:
                assert await answer.json() == {"bytes": LARGE}

    asyncio.run(talk())


def test_aiohttp_speaks_websocket(app: Any) -> None:
    async def talk() -> None:
        options: dict[str, Any] = {"compress": 15, "max_msg_size": 0}
        async with aiohttp.ClientSession(app.url) as session, session.ws_connect("/ws", **options) as socket:
            await socket.send_str("text")
            assert await socket.receive_str() == "text"
            await socket.send_bytes(b"x" * LARGE)
            assert await socket.receive_bytes() == b"x" * LARGE
            await socket.ping()
        assert socket.close_code == 1000

    asyncio.run(talk())
