"""Clients that are slow, silent or gone, and apps that end: what becomes of them at a forwarded port."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.peer import Peer, connect, fill, read_all
from support.waiting import until
from support.web_backend import Backend
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect as open_session

from fal_notebook.forwarding import Forwarder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GET = b"GET /hello HTTP/1.1\r\nHost: app\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 10\r\n\r\n"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TCP_REPAIR = 19  # of Linux: a socket closed in this mode tells nobody


class Target:
    """An app of which the test holds the other ends, and which allows repetition if it is told so."""

    def __init__(
        self, dial: Callable[[], Any], *, may_repeat: bool = False, may_repeat_refused: bool = False
    ) -> None:
        self.dial, self.may_repeat, self.may_repeat_refused = dial, may_repeat, may_repeat_refused
        self.own_user_only = False
        self.refusing: list[Any] = []

    def refused(self, stream: Any) -> None:
        self.refusing.append(stream)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as made:
        yield made


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Forwarder]]:
    """Make forwarders; constants of theirs may be given by name."""
    made: list[Forwarder] = []

    def make(target: Any, **constants: float) -> Forwarder:
        for name, value in constants.items():
            module = "waiting" if name in ("HEAD_PATIENCE", "IDLE_PATIENCE") else "connection"
            monkeypatch.setattr(f"fal_notebook.forwarding.{module}.{name}", value)
        made.append(Forwarder(target, name="patience"))
        return made[-1]

    yield make
    for forwarder in made:
        forwarder.close()
        assert forwarder.connections == 0
    until(lambda: not [thread for thread in threading.enumerate() if "forward patience" in thread.name])


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    running = Backend(str(tmp_path_factory.mktemp("app") / "app.sock"))
    yield running
    running.stop()


def take(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := end.recv(size - len(data))):
        data += piece
    return data


# ---------------------------------------------------------------- clients with nothing to ask


def test_a_thousand_idle_clients_cost_no_streams_and_no_threads(
    backend: Backend, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(backend.dial)
    threads = threading.active_count()
    with contextlib.ExitStack() as clients:
        for _ in range(1000):
            clients.enter_context(connect(forwarder))
        until(lambda: forwarder.waiting == 1000)

        assert threading.active_count() <= threads
        assert forwarder.connections == 0
        assert http.get(f"{forwarder.url}/hello", timeout=20).status_code == 200
    until(lambda: forwarder.waiting == 0)


def test_those_that_are_idle_for_longest_make_room(
    backend: Backend, forward: Callable[..., Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fal_notebook.forwarding.forwarder._most_connections", lambda: 3)
    forwarder = forward(backend.dial)
    with connect(forwarder) as first, connect(forwarder) as second:
        until(lambda: forwarder.waiting == 2)
        with connect(forwarder), connect(forwarder):
            assert read_all(first) == b""
            second.sendall(GET)
            assert second.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_more_connections_than_there_may_be_are_told_so(
    peer: Peer, forward: Callable[..., Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fal_notebook.forwarding.forwarder._most_connections", lambda: 1)
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        client.sendall(GET)
        peer.end()

        answer = http.get(forwarder.url, timeout=20)

        assert (answer.status_code, "connections" in answer.json()["detail"]) == (503, True)


def test_an_idle_client_is_let_go_in_the_end(peer: Peer, forward: Callable[..., Forwarder]) -> None:
    with connect(forward(peer.dial, HEAD_PATIENCE=0.05)) as client:
        assert read_all(client) == b""
    assert peer.ends == []


def exchange(client: socket.socket, peer: Peer, number: int) -> None:
    """Have a request answered over the stream of that number."""
    client.sendall(GET)
    assert take(peer.end(number), len(GET)) == GET
    peer.end(number).sendall(OK)
    assert take(client, len(OK)) == OK


def test_a_client_that_was_answered_holds_no_stream_and_may_ask_again(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(peer.dial, GLANCE=0.05)
    with connect(forwarder) as client:
        for number in range(3):
            exchange(client, peer, number)

            assert read_all(peer.end(number)) == b""
            until(lambda: (forwarder.connections, forwarder.waiting) == (0, 1))


def test_an_app_that_ends_an_idle_connection_does_not_end_the_clients(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    """It does so when a runner is replaced: the next request goes to the new one."""
    forwarder = forward(peer.dial, GLANCE=20.0)
    with connect(forwarder) as client:
        for number in range(3):
            exchange(client, peer, number)
            peer.end(number).close()


# ---------------------------------------------------------------- slow clients


def test_a_head_that_takes_too_long_is_told_so_and_costs_no_stream(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    with connect(forward(peer.dial, HEAD_PATIENCE=0.05)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        assert read_all(client).startswith(b"HTTP/1.1 408 ")
    assert peer.ends == []


def test_a_head_may_come_byte_by_byte(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    with connect(forward(backend.dial)) as client:
        for byte in GET:
            client.sendall(bytes([byte]))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_stops_is_told_so_and_its_stream_is_ended(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(peer.dial, GLANCE=0.05, REQUEST_PATIENCE=0.2, LINGER=0.05)
    with connect(forwarder) as client:
        client.sendall(POST + b"half")
        assert read_all(peer.end()) == POST + b"half"
        assert read_all(client).startswith(b"HTTP/1.1 408 ")
    until(lambda: forwarder.connections == 0)


def test_a_client_that_reads_nothing_is_reset_in_the_end(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(peer.dial, ANSWER_PATIENCE=0.3)
    with connect(forwarder) as client:
        client.sendall(GET)
        assert take(peer.end(), len(GET)) == GET
        peer.end().sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            fill(peer.end())

        until(lambda: forwarder.connections == 0)
        with pytest.raises(ConnectionResetError):
            read_all(client)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may close a socket without a word")
def test_a_client_that_vanishes_is_noticed(
    peer: Peer, forward: Callable[..., Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 1))
    monkeypatch.setattr("fal_notebook.forwarding.sockets.PROBES", probes)
    forwarder = forward(peer.dial)
    client = connect(forwarder)
    client.sendall(GET)
    assert take(peer.end(), len(GET)) == GET

    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    client.close()

    assert read_all(peer.end()) == b""
    until(lambda: forwarder.connections == 0)


# ---------------------------------------------------------------- apps that end


def test_what_was_not_answered_is_asked_again_where_that_is_allowed(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(Target(peer.dial, may_repeat=True))
    with connect(forwarder) as client:
        client.sendall(POST + b"half ")
        assert take(peer.end(0), len(POST) + 5) == POST + b"half "
        peer.end(0).close()
        assert take(peer.end(1), len(POST) + 5) == POST + b"half "

        client.sendall(b"whole")

        assert take(peer.end(1), 5) == b"whole"
        peer.end(1).close()
        assert take(peer.end(2), len(POST) + 10) == POST + b"half whole"
        peer.end(2).sendall(OK)
        assert take(client, len(OK)) == OK


def test_what_is_never_answered_is_told_so_after_two_more_tries(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(Target(peer.dial, may_repeat=True))
    with connect(forwarder) as client:
        client.sendall(GET)
        for number in range(3):
            assert take(peer.end(number), len(GET)) == GET
            peer.end(number).close()

        assert read_all(client).startswith(b"HTTP/1.1 502 ")
    assert len(peer.ends) == 3


def test_the_second_request_of_a_connection_is_told_that_its_runner_broke(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    with connect(forward(peer.dial)) as client:
        client.sendall(GET)
        assert take(peer.end(), len(GET)) == GET
        peer.end().sendall(OK)
        assert take(client, len(OK)) == OK
        client.sendall(GET)
        assert take(peer.end(), len(GET)) == GET

        peer.end().close()

        assert read_all(client).startswith(b"HTTP/1.1 502 ")


def test_what_was_never_read_is_asked_again_though_nothing_may_be_repeated(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    """A runner that is being killed still takes connections, which nobody serves."""
    with connect(forward(peer.dial)) as client:
        client.sendall(GET)
        until(lambda: select.select([peer.end(0)], [], [], 0)[0])

        peer.end(0).close()

        assert take(peer.end(1), len(GET)) == GET
        peer.end(1).sendall(OK)
        assert take(client, len(OK)) == OK

        client.sendall(POST + b"half ")
        assert take(peer.end(1), len(POST) + 5) == POST + b"half "
        client.sendall(b"whole")  # the runner may have acted on what came before
        until(lambda: select.select([peer.end(1)], [], [], 0)[0])
        peer.end(1).close()

        assert read_all(client).startswith(b"HTTP/1.1 502 ")


def test_a_503_is_asked_again_of_another_runner_where_that_is_allowed(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    target = Target(peer.dial, may_repeat_refused=True)
    with connect(forward(target)) as client:
        client.sendall(POST + b"half ")
        assert take(peer.end(0), len(POST) + 5) == POST + b"half "
        peer.end(0).sendall(REFUSAL)

        assert take(peer.end(1), len(POST) + 5) == POST + b"half "
        client.sendall(b"whole")
        assert take(peer.end(1), 5) == b"whole"
        peer.end(1).sendall(OK)
        assert take(client, len(OK)) == OK
        assert len(target.refusing) == 1

        client.sendall(GET)  # on a connection that has been answered before
        assert take(peer.end(1), len(GET)) == GET
        peer.end(1).sendall(REFUSAL)
        for number in (2, 3):
            assert take(peer.end(number), len(GET)) == GET
            peer.end(number).sendall(REFUSAL)

        assert take(client, len(REFUSAL)) == REFUSAL  # after two more tries
        assert len(target.refusing) == 3


def test_a_503_is_passed_on_where_nothing_may_be_repeated(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    """Nor a request that is too large to be kept."""
    large = b"POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 1048577\r\n\r\n" + bytes((1 << 20) + 1)
    cases = ((peer.dial, GET), (Target(peer.dial, may_repeat_refused=True), large))
    for number, (target, request) in enumerate(cases):
        with connect(forward(target)) as client:
            sending = threading.Thread(target=client.sendall, args=(request,))
            sending.start()
            end = peer.end(number)
            assert take(end, len(request)) == request
            sending.join()
            end.sendall(REFUSAL)

            assert take(client, len(REFUSAL)) == REFUSAL


def test_an_answer_that_ends_too_early_does_not_look_whole(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    with connect(forward(Target(peer.dial, may_repeat=True))) as client:
        client.sendall(GET)
        assert take(peer.end(), len(GET)) == GET
        peer.end().sendall(OK[:-1])
        assert take(client, len(OK) - 1) == OK[:-1]

        peer.end().close()

        with pytest.raises(ConnectionResetError):
            client.recv(10)


def test_a_session_whose_runner_dies_is_closed_with_a_reason(
    peer: Peer, forward: Callable[..., Forwarder], backend: Backend
) -> None:
    held: list[socket.socket] = []

    def dial() -> socket.socket:
        held.append(backend.dial())
        return held[-1]

    url = forward(dial).url.replace("http", "ws")
    with open_session(f"{url}/echo", compression=None) as session:
        session.send("hello")
        session.recv()

        held[0].shutdown(socket.SHUT_RDWR)

        with pytest.raises(ConnectionClosedError) as raised:
            session.recv(timeout=20)
    assert raised.value.rcvd is not None
    assert (raised.value.rcvd.code, "connect again" in raised.value.rcvd.reason) == (1011, True)


def test_a_waiting_client_is_not_held_open_by_a_forked_child(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        until(lambda: forwarder.waiting == 1)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tell)
            os.read(told, 1)  # ends with the parent's end
            os._exit(0)
        os.close(told)
        try:
            forwarder.close()
            assert read_all(client) == b""
        finally:
            os.close(tell)
            os.waitpid(child, 0)


def test_a_client_reset_while_it_waits_is_forgotten(peer: Peer, forward: Callable[..., Forwarder]) -> None:
    forwarder = forward(peer.dial)
    client = connect(forwarder)
    until(lambda: forwarder.waiting == 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    until(lambda: forwarder.waiting == 0)
