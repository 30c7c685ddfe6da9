"""Large bodies, clients that are slow or say nonsense, and many of them: memory is bounded, others go on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.memory import Watch
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCALE = int(os.environ.get("FAL_TEST_SCALE", "1"))
LARGE = 25 * min(SCALE, 4)  # MiB of a body
STALLED = 20 * SCALE  # clients that read nothing
BOUND = (100 << 20) + STALLED * (2 << 20)  # bytes any process may grow by: two of the app's pieces a client
SHAPES = {"gateway": {"min_concurrency": 2, "max_concurrency": 2, "max_multiplexing": 400}, "single": {}}
SECONDS = 60.0
POUR = b"POST /pour?mib=1000 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
OPENING = (
    b"GET /echo HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
NONSENSE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"HELP\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: lots\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    OPENING + b"\xff\xff" + bytes(20),  # reserved bits, an unknown kind
    OPENING + b"\x01\x7f" + b"\xff" * 8,  # unmasked, and larger than anything
    OPENING + b"\x81\x84\x00\x00\x00\x00\xff\xfe\xfd\xfc",  # not UTF-8
]


@pytest.fixture(scope="module", params=list(SHAPES))
def info(request: pytest.FixtureRequest, host: Any, app: Callable[..., Any]) -> Iterator[Any]:
    """One app of each shape on each host, for all tests here."""
    spawned = app(**SHAPES[request.param]).spawn(host=host)
    spawned.wait(startup_timeout=SECONDS)
    yield spawned
    spawned.stop()


@contextlib.contextmanager
def bounded(info: Any) -> Iterator[None]:
    """See that nothing grows beyond the bound: this process, the agent, the gateway, the runners."""
    status = info.host.ask("status")
    pids = [os.getpid(), status["agent"]["pid"], *(worker["pid"] for worker in status["workers"])]
    with Watch(pids) as watch:
        yield
    assert max(watch.grown.values()) < BOUND, watch.grown


def raw(info: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(info.url.rpartition(":")[2])), SECONDS)


def ask(info: Any) -> int:
    answer = http.post(info.url, json={}, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    pid: int = answer.json()
    return pid


def test_large_bodies_stream_in_both_directions(info: Any) -> None:
    piece = bytes(range(256)) * 4096
    expected = hashlib.sha256(piece * LARGE).hexdigest()

    with bounded(info):
        sent = http.post(f"{info.url}/digest", content=(piece for _ in range(LARGE)), timeout=SECONDS)
        size = 0
        with http.stream("POST", f"{info.url}/pour", params={"mib": LARGE}, timeout=SECONDS) as answer:
            for part in answer.iter_raw():
                size += len(part)

    assert sent.json() == {"sha256": expected, "size": LARGE << 20}
    assert size >= LARGE << 20


def test_readers_that_stop_hold_up_nobody(info: Any) -> None:
    with contextlib.ExitStack() as clients, bounded(info):
        stalled = [clients.enter_context(raw(info)) for _ in range(STALLED)]
        for client in stalled:
            client.sendall(POUR)
        for client in stalled:
            assert client.recv(15).startswith(b"HTTP/1.1 200 OK")

        with ThreadPoolExecutor(10) as pool:
            assert all(pool.map(lambda _: ask(info), range(50)))
        clients.close()  # a storm of ends
        assert ask(info)


def test_senders_that_stop_hold_up_nobody(info: Any) -> None:
    head = b"POST /digest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n"
    with contextlib.ExitStack() as clients, bounded(info):
        for number in range(STALLED):
            client = clients.enter_context(raw(info))
            client.sendall(head if number % 2 else head[:30])
            if number % 2:
                client.sendall(bytes(300_000))

        assert ask(info)


def test_idle_clients_hold_up_nobody(info: Any) -> None:
    with contextlib.ExitStack() as clients, bounded(info):
        for _ in range(250 * SCALE):
            clients.enter_context(raw(info))

        assert ask(info)


def test_nonsense_ends_its_own_connection_alone(info: Any) -> None:
    pid = ask(info)
    for words in NONSENSE:
        with raw(info) as client:
            client.sendall(words)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while client.recv(1 << 16):
                    pass

    assert pid in {ask(info) for _ in range(4)}


def test_a_storm_of_resets_leaves_nothing_behind(info: Any) -> None:
    from fal_notebook.app_ports import _forwarders

    forwarder = _forwarders[info.host.name, info.name]
    for _ in range(SCALE):
        clients = [raw(info) for _ in range(50)]
        for client in clients:
            client.sendall(POUR)
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    until(lambda: forwarder.connections == 0)
    assert ask(info)
    until(lambda: sum(app["in_flight"] for app in info.host.ask("apps")) == 0)


def test_one_slow_stream_does_not_slow_the_next(info: Any) -> None:
    """Both answers come through the same link; the first one's reader takes a piece now and then."""
    with raw(info) as slow:
        slow.sendall(POUR)
        slow.recv(1 << 16)
        for _ in range(5):
            assert ask(info)
            assert slow.recv(1 << 16)
            time.sleep(0.01)
