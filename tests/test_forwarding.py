"""A port of this machine that leads to a real server on a Unix socket, used by real clients."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import websockets
from support import http
from support.peer import Peer, connect, fill, read_all
from support.waiting import until
from support.web_backend import PIECE, Backend

from fal_notebook.exceptions import ConfigurationError, HostUnreachableError
from fal_notebook.forwarding import Forwarder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGE = 100  # MiB


NAME = "the app"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    running = Backend(str(tmp_path_factory.mktemp("app") / "app.sock"))
    yield running
    running.stop()


def threads() -> list[str]:
    """Those of this module's forwarders; apps that other tests spawned have their own."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"forward {NAME}")]


@pytest.fixture
def forward() -> Iterator[Callable[..., Forwarder]]:
    """Make forwarders, which must leave nothing behind."""
    made: list[Forwarder] = []

    def make(dial: Callable[[], Any], **options: Any) -> Forwarder:
        made.append(Forwarder(dial, name=NAME, **options))
        return made[-1]

    yield make
    for forwarder in made:
        forwarder.close()
        assert forwarder.connections == 0
    assert threads() == []


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as made:
        yield made


# ---------------------------------------------------------------- requests


def test_requests_reach_the_app_and_answers_come_back(
    backend: Backend, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(backend.dial)

    with httpx.Client(verify=False, base_url=forwarder.url) as client:
        answers = [client.get("/hello") for _ in range(20)]
        assert [answer.json() for answer in answers] == [{"hello": "you"}] * 20
        assert client.get("/nowhere").status_code == 404
        assert forwarder.connections == 1  # all of them went through one

    assert forwarder.url == f"http://127.0.0.1:{forwarder.port}"


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl_gets_the_same_answer(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    url = forward(backend.dial).url

    done = subprocess.run(
        ["curl", "--silent", "--noproxy", "*", "--max-time", "20", f"{url}/hello"],
        capture_output=True,
        check=True,
    )

    assert json.loads(done.stdout) == {"hello": "you"}


def test_only_this_machine_is_listened_to(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    forwarder = forward(backend.dial)

    assert forwarder._listener.getsockname() == ("127.0.0.1", forwarder.port)


def test_a_large_upload_arrives_whole(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    url = forward(backend.dial).url
    expected = hashlib.sha256(PIECE * LARGE).hexdigest()

    answer = http.post(f"{url}/digest", content=(PIECE for _ in range(LARGE)), timeout=60)

    assert answer.json() == {"sha256": expected, "size": LARGE << 20}


def test_a_large_download_arrives_whole(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    url = forward(backend.dial).url
    digest = hashlib.sha256()

    with http.stream("GET", f"{url}/bytes/{LARGE}", timeout=60) as answer:
        for piece in answer.iter_raw():
            digest.update(piece)

    assert digest.hexdigest() == hashlib.sha256(PIECE * LARGE).hexdigest()


def test_an_answer_given_before_the_request_was_read_arrives(
    backend: Backend, forward: Callable[..., Forwarder]
) -> None:
    url = forward(backend.dial).url

    answer = http.post(f"{url}/refuse", content=(PIECE for _ in range(20)), timeout=60)

    assert (answer.status_code, answer.json()) == (413, {"detail": "too large"})


def test_two_hundred_websockets_at_once(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    forwarder = forward(backend.dial)
    url = forwarder.url.replace("http", "ws") + "/echo"

    async def talk(connection: Any, number: int) -> list[str]:
        answers = []
        for turn in range(3):
            await connection.send(f"{number}:{turn}")
            answers.append(str(await connection.recv()))
        return answers

    async def all_of_them() -> list[list[str]]:
        connecting = (websockets.connect(url, open_timeout=60, proxy=None) for _ in range(200))
        connections = await asyncio.gather(*connecting)
        assert forwarder.connections == 200
        said = await asyncio.gather(
            *(talk(connection, number) for number, connection in enumerate(connections))
        )
        await asyncio.gather(*(connection.close() for connection in connections))
        return said

    said = asyncio.run(all_of_them())

    assert said == [[f"{number}:{turn}" for turn in range(3)] for number in range(200)]
    until(lambda: forwarder.connections == 0)


def test_a_client_that_goes_away_is_noticed_by_the_app(
    backend: Backend, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(backend.dial)
    with connect(forwarder) as client:
        client.sendall(b"GET /hang HTTP/1.1\r\nHost: app\r\n\r\n")
        assert backend.is_hanging.wait(20)

    assert backend.abandoned.wait(20)
    until(lambda: forwarder.connections == 0)


# ---------------------------------------------------------------- the ends of connections


def test_the_end_of_the_request_is_passed_on_and_the_answer_still_comes(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_all(peer.end()) == b"question"

        peer.end().sendall(b"answer")
        peer.end().close()

        assert read_all(client) == b"answer"
    until(lambda: forwarder.connections == 0)


def test_the_end_of_the_answer_is_passed_on_and_the_request_may_go_on(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        client.sendall(b"question, ")
        peer.end().sendall(b"greeting")
        peer.end().shutdown(socket.SHUT_WR)
        assert read_all(client) == b"greeting"

        client.sendall(b"late words")
        client.shutdown(socket.SHUT_WR)

        assert read_all(peer.end()) == b"question, late words"
    until(lambda: forwarder.connections == 0)


class Channel:
    """A stream like an SSH channel: with `end_input`, and without a file descriptor."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.sendall, self.recv = end.sendall, end.recv

    def end_input(self) -> None:
        self.end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)
        self.end.close()


def test_the_end_of_the_request_is_passed_on_through_a_channel(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(lambda: Channel(peer.dial()))
    with connect(forwarder) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_all(peer.end()) == b"question"

        peer.end().sendall(b"answer")
        peer.end().close()

        assert read_all(client) == b"answer"
    until(lambda: forwarder.connections == 0)


class Plain:
    """A stream with nothing but the three methods that every one has."""

    def __init__(self, end: socket.socket) -> None:
        self.sendall, self.recv, self.close = end.sendall, end.recv, Channel(end).close


def test_a_stream_that_cannot_end_its_input_still_gives_its_answer(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(lambda: Plain(peer.dial()))
    with connect(forwarder) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert peer.end().recv(100) == b"question"

        peer.end().sendall(b"answer")
        peer.end().close()

        assert read_all(client) == b"answer"
    until(lambda: forwarder.connections == 0)


def reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


@pytest.mark.parametrize("wrap", [lambda end: end, Channel, Plain])
@pytest.mark.parametrize("has_ended_request", [False, True])
def test_a_client_that_resets_ends_the_stream(
    peer: Peer, forward: Callable[..., Forwarder], wrap: Any, has_ended_request: bool
) -> None:
    forwarder = forward(lambda: wrap(peer.dial()))
    client = connect(forwarder)
    client.sendall(b"question")
    assert peer.end().recv(100) == b"question"
    if has_ended_request:
        client.shutdown(socket.SHUT_WR)

    reset(client)

    assert read_all(peer.end()) == b""
    until(lambda: forwarder.connections == 0)


def break_off(end: socket.socket) -> None:
    """Close a Unix socket with unread bytes: the other side finds it reset, after what was sent."""
    assert select.select([end], [], [], 20)[0]
    end.close()


def test_half_an_answer_does_not_look_like_a_whole_one(peer: Peer, forward: Callable[..., Forwarder]) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        client.sendall(b"question")
        peer.end().sendall(b"half an ans")
        assert client.recv(100) == b"half an ans"
        client.sendall(b"something that is not read")

        break_off(peer.end())

        with pytest.raises(ConnectionResetError):
            client.recv(100)
    until(lambda: forwarder.connections == 0)


def test_an_app_that_breaks_before_it_answers_is_said_to_have_done_so(
    peer: Peer, forward: Callable[..., Forwarder]
) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        head = b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\n"
        client.sendall(head)
        assert peer.end().recv(len(head)) == head
        client.sendall(b"more")  # which it does not read
        until(lambda: select.select([peer.end()], [], [], 0)[0])

        break_off(peer.end())

        assert read_all(client).startswith(b"HTTP/1.1 502 ")
    until(lambda: forwarder.connections == 0)


def test_a_silent_client_of_an_app_that_has_ended_is_let_go(
    peer: Peer, forward: Callable[..., Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of connections may keep one whose other side has ended, and not look at it again."""
    monkeypatch.setattr("fal_notebook.forwarding.connection.LINGER", 0.05)
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        client.sendall(b"question")
        assert peer.end().recv(100) == b"question"
        peer.end().close()

        until(lambda: forwarder.connections == 0)
        assert read_all(client) == b""


# ---------------------------------------------------------------- back-pressure


def test_a_client_that_never_reads_holds_the_app_back(peer: Peer, forward: Callable[..., Forwarder]) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        client.sendall(b"question")
        assert peer.end().recv(100) == b"question"
        sent = fill(peer.end())

        assert sent < 64 << 20  # what the kernel's buffers hold, and no more
        peer.end().close()
        assert len(read_all(client)) == sent
    until(lambda: forwarder.connections == 0)


def test_an_app_that_never_reads_holds_the_client_back(peer: Peer, forward: Callable[..., Forwarder]) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        sent = fill(client)

        assert sent < 64 << 20
        client.shutdown(socket.SHUT_WR)
        assert len(read_all(peer.end())) == sent


def test_closing_ends_connections_that_are_stuck(peer: Peer, forward: Callable[..., Forwarder]) -> None:
    forwarder = forward(peer.dial)
    with connect(forwarder) as first, connect(forwarder) as second:
        first.sendall(b"question")
        fill(peer.end(0))
        fill(second)
        fill(first)

        forwarder.close()

        assert threads() == []
        assert forwarder.connections == 0


# ---------------------------------------------------------------- dialling


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("nothing listens there"),
        HostUnreachableError("nothing listens there"),
    ],
)
def test_an_app_that_cannot_be_reached_is_an_answer(
    forward: Callable[..., Forwarder], error: Exception
) -> None:
    def dial() -> Any:
        raise error

    url = forward(dial).url

    for content in (b"", PIECE * 10):
        answer = http.post(url, content=content, timeout=20)
        assert (answer.status_code, answer.json()) == (503, {"detail": "nothing listens there"})
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["connection"] == "close"


def test_an_error_without_words_is_named_by_its_kind(forward: Callable[..., Forwarder]) -> None:
    def dial() -> Any:
        raise TimeoutError

    assert http.get(forward(dial).url).json() == {"detail": "TimeoutError"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_dialling_is_answered_and_not_hidden(
    forward: Callable[..., Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda details: raised.append(details.exc_value))

    def dial() -> Any:
        raise ZeroDivisionError("a bug")

    assert http.get(forward(dial).url).status_code == 503
    until(lambda: raised)
    assert isinstance(raised[0], ZeroDivisionError)


@pytest.mark.parametrize("which", ["answers", "requests"])
def test_a_process_without_another_thread_says_so(
    peer: Peer, forward: Callable[..., Forwarder], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    forwarder = forward(peer.dial)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.endswith(which):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    answer = http.get(forwarder.url, timeout=20)

    assert (answer.status_code, answer.json()) == (503, {"detail": "can't start new thread"})
    until(lambda: forwarder.connections == 0)


def test_a_request_waits_while_the_app_starts(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    started, asked = threading.Event(), threading.Event()

    def dial() -> socket.socket:
        asked.set()
        assert started.wait(20)
        return backend.dial()

    url = forward(dial).url
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(http.get(f"{url}/hello", timeout=20).json()))
    waiting.start()
    assert asked.wait(20)
    assert answers == []

    started.set()

    waiting.join(20)
    assert answers == [{"hello": "you"}]


def test_a_stream_that_comes_after_closing_is_closed(
    peer: Peer, forward: Callable[..., Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dialling cannot be interrupted, so `close` does not wait for it for ever."""
    monkeypatch.setattr("fal_notebook.forwarding.forwarder.JOIN_TIMEOUT", 0.01)
    asked, goes_on = threading.Event(), threading.Event()

    def dial() -> socket.socket:
        asked.set()
        assert goes_on.wait(20)
        return peer.dial()

    forwarder = forward(dial)
    with connect(forwarder) as client:
        client.sendall(b"question")
        assert asked.wait(20)
        forwarder.close()
        assert read_all(client) == b""

        goes_on.set()

        assert read_all(peer.end()) == b""
        until(lambda: threads() == [])


# ---------------------------------------------------------------- the port


def test_a_port_may_be_chosen_and_is_free_again_after_closing(
    backend: Backend, forward: Callable[..., Forwarder]
) -> None:
    first = forward(backend.dial)
    assert http.get(f"{first.url}/hello").status_code == 200
    first.close()
    first.close()

    second = forward(backend.dial, port=first.port)

    assert second.port == first.port
    assert http.get(f"{second.url}/hello").status_code == 200


def test_a_port_in_use_is_an_error_that_names_it(backend: Backend, forward: Callable[..., Forwarder]) -> None:
    port = forward(backend.dial).port

    with pytest.raises(ConfigurationError, match=f"cannot listen on port {port} of 127.0.0.1"):
        forward(backend.dial, port=port)


def test_nobody_is_answered_after_closing(backend: Backend) -> None:
    with Forwarder(backend.dial, name="the app") as forwarder:
        kept = connect(forwarder)

    with kept, pytest.raises(ConnectionRefusedError):
        connect(forwarder)
    assert "closed" in repr(forwarder)


def is_refused(forwarder: Forwarder) -> bool:
    try:
        connect(forwarder).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_forked_child_does_not_serve(peer: Peer, forward: Callable[..., Forwarder]) -> None:
    """Neither the port nor a connection may be held open by a process that knows nothing of them."""
    forwarder = forward(peer.dial)
    with connect(forwarder) as client:
        client.sendall(b"before")
        assert peer.end().recv(100) == b"before"
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tell)
            forwarder.close()
            is_let_go = forwarder._listener.fileno() == -1 and forwarder.connections == 0
            os.read(told, 1)  # ends with the parent's end
            os._exit(0 if is_let_go else 1)
        os.close(told)
        try:
            client.sendall(b"after")
            assert peer.end().recv(100) == b"after"  # it serves on, here
            forwarder.close()
            assert read_all(client) == b""
            until(lambda: is_refused(forwarder))
        finally:
            os.close(tell)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
