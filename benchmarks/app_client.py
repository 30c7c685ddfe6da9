"""A client of the benchmark's application: `app_client.py NAME PORT` prints figures, named after NAME.

It is the same for every server, and spends little itself: HTTP is read by httptools, llhttp underneath.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import httptools
from timing import Figures, calls, p95, report
from websockets.sync.client import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOPBACK = "127.0.0.1"
PROMPT = "a lighthouse in a storm, oil on canvas"
REQUESTS = 5_000
CLIENTS = 16
MESSAGE = b"x" * 1_000


def request(port: int) -> bytes:
    """One request, as it goes over a connection that stays open."""
    body = json.dumps({"prompt": PROMPT}).encode()
    head = (
        f"POST / HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Answer:
    """Reads one answer after the other; `is_whole` says that the present one is there."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.is_whole = False
        self.body = b""

    def on_body(self, body: bytes) -> None:
        """Keep the body, to be checked."""
        self.body = body

    def on_message_complete(self) -> None:
        """Look at what came."""
        if self.parser.get_status_code() != 200 or json.loads(self.body) != {"length": len(PROMPT)}:
            raise AssertionError(f"status {self.parser.get_status_code()}: {self.body!r}")
        self.is_whole = True


def one_by_one(name: str, port: int) -> Figures:
    """Requests over one connection, each after the answer to the one before."""
    text = request(port)
    with socket.create_connection((LOOPBACK, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer = Answer()

        def ask() -> None:
            answer.is_whole = False
            connection.sendall(text)
            while not answer.is_whole:
                answer.parser.feed_data(connection.recv(65536))

        return calls(f"{name} request", ask, count=2_000)


class _Caller(asyncio.Protocol):
    """One of several clients: asks as soon as it has its answer, while there is something left to ask."""

    def __init__(self, text: bytes, left: Iterator[int], taken: list[float]) -> None:
        self.text, self.left, self.taken = text, left, taken
        self.answer = Answer()
        self.ended = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        assert self.transport is not None
        if next(self.left, None) is None:
            self.ended.set_result(None)
            self.transport.close()
            return
        self.answer.is_whole = False
        self.since = time.perf_counter()
        self.transport.write(self.text)

    def data_received(self, data: bytes) -> None:
        self.answer.parser.feed_data(data)
        if self.answer.is_whole:
            self.taken.append(time.perf_counter() - self.since)
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server hung up"))


async def at_once(port: int, count: int) -> tuple[float, list[float]]:
    """Ask `count` times from several clients: the seconds of all, and those of each."""
    left, taken = iter(range(count)), list[float]()
    loop = asyncio.get_running_loop()
    make = partial(_Caller, request(port), left, taken)
    started = time.perf_counter()
    callers = [(await loop.create_connection(make, LOOPBACK, port))[1] for _ in range(CLIENTS)]
    await asyncio.gather(*(caller.ended for caller in callers))
    return time.perf_counter() - started, taken


def together(name: str, port: int) -> Figures:
    """Requests from several clients at once."""
    asyncio.run(at_once(port, REQUESTS // 5))
    seconds, taken = asyncio.run(at_once(port, REQUESTS))
    if len(taken) != REQUESTS:
        raise AssertionError(f"{name} answered {len(taken)} of {REQUESTS} requests")
    p99 = sorted(taken)[round(REQUESTS * 0.99) - 1]
    whole = f"{name} {REQUESTS} requests from {CLIENTS} clients"
    return {whole: seconds, f"{whole}: p95": p95(taken), f"{whole}: p99": p99}


def over_websocket(name: str, port: int) -> Figures:
    """Messages of 1 kB there and back over one websocket."""
    with connect(f"ws://{LOOPBACK}:{port}/echo") as websocket:

        def echo() -> None:
            websocket.send(MESSAGE)
            if websocket.recv() != MESSAGE:
                raise AssertionError("another message came back")

        return calls(f"{name} websocket echo", echo, count=2_000)


if __name__ == "__main__":
    _, NAME, PORT = sys.argv
    report({**one_by_one(NAME, int(PORT)), **together(NAME, int(PORT)), **over_websocket(NAME, int(PORT))})
