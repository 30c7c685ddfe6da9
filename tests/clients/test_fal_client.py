"""The official client, `fal_client`, talks to a spawned app as if it were on fal's own platform.

It insists on TLS, so a small reverse proxy that speaks it stands in front of the app. Where the platform is,
it reads from its environment when it is imported; so each test runs a Python of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trustme

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

KEY = "me:secret"
SECONDS = 60.0
PIECE = 1 << 16  # bytes


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # either side may go when it likes
        while data := await reader.read(PIECE):
            writer.write(data)
            await writer.drain()
    writer.close()


async def pass_on(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))


@contextlib.asynccontextmanager
async def tls_in_front(port: int, folder: Path) -> AsyncIterator[dict[str, str]]:
    """Give the environment in which the client finds the proxy, and trusts it."""
    issuer = trustme.CA()
    issuer.cert_pem.write_to_path(str(folder / "trusted.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The client reads and writes in two threads; OpenSSL now and then drops what one of them writes while the
    # other is reading a ticket.
    context.num_tickets = 0
    issuer.issue_cert("127.0.0.1").configure_cert(context)
    server = await asyncio.start_server(functools.partial(pass_on, port), "127.0.0.1", 0, ssl=context)
    own_port = server.sockets[0].getsockname()[1]
    yield {
        "FAL_RUN_HOST": f"127.0.0.1:{own_port}",
        "FAL_KEY": KEY,
        "SSL_CERT_FILE": str(folder / "trusted.pem"),
        "NO_PROXY": "127.0.0.1",
    }
    server.close()


@pytest.fixture
def official(private_app: Any, tmp_path: Path) -> Any:
    """Runs a program that uses the client; gives what the program calls `result`."""

    async def run(program: str) -> Any:
        async with tls_in_front(int(private_app.url.rpartition(":")[2]), tmp_path) as environment:
            text = f"import fal_client, json\n{program}\nprint(json.dumps(result))"
            ask = functools.partial(
                subprocess.run,
                [sys.executable, "-c", text],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
            done = await asyncio.to_thread(ask)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return lambda program: asyncio.run(run(program))


def test_it_runs_endpoints(official: Any) -> None:
    program = """
result = [
    fal_client.run("", {"name": "you"}),
    fal_client.run("repeat", {"text": "ab", "times": 2}, hint="some-model"),
    fal_client.SyncClient(key="me:secret").run("repeat", {"text": "c"}, start_timeout=30),
]
import asyncio
result.append(asyncio.run(fal_client.run_async("repeat", {"text": "d"})))
"""
    texts = [answer["text"] for answer in official(program)]
    assert texts == ["hello you", "abab", "c", "d"]


def test_its_errors_say_what_the_app_said(official: Any) -> None:
    program = """
result = []
for endpoint, arguments, key in (("repeat", {"text": 5}, None), ("nowhere", {}, None), ("", {}, "me:wrong")):
    try:
        fal_client.SyncClient(key=key).run(endpoint, arguments)
    except fal_client.client.FalClientHTTPError as error:
        result.append([error.status_code, error.message])
"""
    wrong, missing, closed = official(program)
    assert (wrong[0], wrong[1][0]["loc"]) == (422, ["body", "text"])
    assert missing == [404, "Path /nowhere not found"]
    assert closed[0] == 401
    assert "private" in closed[1]


def test_it_reads_a_stream_of_events_as_they_come(official: Any, gate: str) -> None:
    program = f"""
arguments = {{"gate": {gate!r}, "media_type": "text/event-stream"}}
events = fal_client.stream("drip", arguments, path="")
result = [next(events)]
fal_client.run("open", {{"gate": {gate!r}}})
result += events
"""
    assert official(program) == ["first", "second"]


def test_it_has_realtime_sessions_and_raw_websockets(official: Any) -> None:
    program = """
with fal_client.realtime("me/talks", use_jwt=False) as session:
    session.send({"value": 21})
    result = [session.recv()]
    session.send({})
    try:
        session.recv()
    except fal_client.client.RealtimeError as error:
        result.append(error.error)

with fal_client.ws_connect("me/talks", path="ws", use_jwt=False) as socket:
    socket.send("text")
    result.append(socket.recv())

async def talk():
    async with fal_client.realtime_async("me/talks", use_jwt=False, max_buffering=5) as session:
        await session.send({"value": "ab"})
        return await session.recv()

import asyncio
result.append(asyncio.run(talk()))
"""
    assert official(program) == [{"value": 42}, "INTERNAL_ERROR", "text", {"value": "abab"}]
