"""A port of this machine that leads to a web application through a real SSH server."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from support import http
from support.socket_server import read_exactly
from support.sshd import SSHServer, start_sshd
from support.waiting import until
from support.web_backend import PIECE, Backend

from fal_notebook.forwarding import Forwarder
from fal_notebook.hosts.paramiko_link import open_link

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fal_notebook.hosts.base import ByteStream
    from fal_notebook.hosts.ssh_link import SSHLink


SIZE = 20  # MiB
DIALER = """
import os, socket, sys, threading
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
def copy():
    while data := os.read(0, 65536):
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
threading.Thread(target=copy, daemon=True).start()
while data := connection.recv(65536):
    os.write(1, data)
"""


@pytest.fixture(scope="module", params=["by a channel", "by a command"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with start_sshd(tmp_path_factory.mktemp("sshd")) as running:
        (running.public / "dial.py").write_text(DIALER)
        if request.param == "by a command":
            running.restart("AllowStreamLocalForwarding no")
        yield running


@pytest.fixture(scope="module")
def backend(server: SSHServer) -> Iterator[Backend]:
    running = Backend(str(server.public / "app.sock"))
    Path(running.path).chmod(0o777)  # the server's user is another one
    server.public.chmod(0o755)
    yield running
    running.stop()


@pytest.fixture
def link(server: SSHServer) -> Iterator[SSHLink]:
    with open_link("gpu-box", ssh_config=server.config_path) as opened:
        opened.dial_command = f"exec /usr/bin/python3 {server.public}/dial.py {{socket}}"
        yield opened


@pytest.fixture
def forwarder(link: SSHLink, backend: Backend) -> Iterator[Forwarder]:
    with Forwarder(lambda: link.dial(backend.path), name="the app") as running:
        yield running


def test_requests_reach_the_app(forwarder: Forwarder) -> None:
    with httpx.Client(base_url=forwarder.url) as client:
        answers = [client.get("/hello").json() for _ in range(5)]

    assert answers == [{"hello": "you"}] * 5
    until(lambda: forwarder.connections == 0)


def test_large_bodies_arrive_whole_in_both_directions(forwarder: Forwarder) -> None:
    expected = hashlib.sha256(PIECE * SIZE).hexdigest()
    sent = http.post(f"{forwarder.url}/digest", content=(PIECE for _ in range(SIZE)), timeout=60).json()
    got = http.get(f"{forwarder.url}/bytes/{SIZE}", timeout=60).content

    assert sent == {"sha256": expected, "size": SIZE << 20}
    assert hashlib.sha256(got).hexdigest() == expected


def test_a_client_that_reads_in_fits_and_starts_gets_everything_in_order(forwarder: Forwarder) -> None:
    """Its socket is full at times and has room at others: the bytes come by two ways, which must not mix."""
    small = httpx.HTTPTransport(
        verify=False, socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 << 10)]
    )
    digest = hashlib.sha256()
    with (
        httpx.Client(transport=small, timeout=60) as client,
        client.stream("GET", f"{forwarder.url}/bytes/8") as answer,
    ):
        for number, piece in enumerate(answer.iter_raw(100_000)):
            digest.update(piece)
            if number % 20 == 0:
                time.sleep(0.01)

    assert digest.hexdigest() == hashlib.sha256(PIECE * 8).hexdigest()


class Repeating:
    """An app that may be asked again what it answered 503."""

    may_repeat, may_repeat_refused, own_user_only = False, True, False

    def __init__(self, dial: Callable[[], ByteStream]) -> None:
        self.dial = dial
        self.refusing: list[ByteStream] = []

    def refused(self, stream: ByteStream, /) -> None:
        self.refusing.append(stream)


def test_a_503_is_asked_again_and_not_seen(link: SSHLink, backend: Backend) -> None:
    """Though the thread that reads the connection passes answers on by itself."""
    target = Repeating(lambda: link.dial(backend.path))
    with (
        Forwarder(target, name="the app") as forwarder,
        httpx.Client(verify=False, base_url=forwarder.url) as client,
    ):
        assert client.get("/hello").status_code == 200
        backend.refusals = 2

        assert client.get("/recover").json() == {"left": -1}
        assert len(target.refusing) == 2


def test_a_client_that_goes_away_is_noticed_by_the_app(forwarder: Forwarder, backend: Backend) -> None:
    backend.is_hanging.clear()
    backend.abandoned.clear()
    with socket.create_connection(("127.0.0.1", forwarder.port)) as client:
        client.sendall(b"GET /hang HTTP/1.1\r\nHost: app\r\n\r\n")
        assert backend.is_hanging.wait(20)

    assert backend.abandoned.wait(20)
    until(lambda: forwarder.connections == 0)


def test_an_app_that_is_not_there_is_an_answer(link: SSHLink) -> None:
    with Forwarder(lambda: link.dial("/nowhere/app.sock"), name="the app") as forwarder:
        answer = http.get(forwarder.url, timeout=20)

    assert answer.status_code == 503
    assert answer.json()["detail"]


def test_a_link_that_breaks_breaks_the_answer_and_is_told_to_the_next_request(
    forwarder: Forwarder, server: SSHServer
) -> None:
    with socket.create_connection(("127.0.0.1", forwarder.port), 20) as client:
        client.sendall(b"GET /bytes/1000 HTTP/1.1\r\nHost: app\r\n\r\n")
        assert read_exactly(client, 1 << 20)

        server.kill_connections()

        with pytest.raises(ConnectionResetError):
            read_exactly(client, 1 << 30)
    answer = http.get(forwarder.url, timeout=20)
    assert (answer.status_code, "Connect again" in answer.json()["detail"]) == (503, True)
