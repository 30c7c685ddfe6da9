"""The client of a realtime endpoint, against a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator  # noqa: TC003 - read by the decorator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel
from support.realtime_server import pack, serving
from support.waiting import until
from websockets.sync.server import serve as serve_websocket

from fal_agent.runtime.realtime import realtime
from fal_notebook.exceptions import AppException, HostUnreachableError, LinkLostError, ProtocolError
from fal_notebook.realtime_client import connect_realtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.realtime_server import RealtimeServer

MIB = 1024 * 1024


class Number(BaseModel):
    """A message."""

    n: int


class App:
    """Endpoints of each mode."""

    def __init__(self) -> None:
        self.closed, self.gate = threading.Event(), threading.Event()

    @realtime("/double")
    async def double(self, number: Number) -> Number:
        return Number(n=2 * number.n)

    @realtime("/count")
    def count(self, number: Number) -> Iterator[Number]:
        for n in range(number.n):
            yield Number(n=n)

    @realtime("/sum")
    async def total(self, numbers: AsyncIterator[Number]) -> Number:
        return Number(n=sum([number.n async for number in numbers]))

    @realtime("/echo")
    async def echo(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in messages:
            yield message

    @realtime("/three")
    async def three(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        for n in range(3):
            yield {"n": n}

    @realtime("/fail")
    async def fail(self, message: Any) -> Any:
        raise RuntimeError("the reason")

    @realtime("/limited", session_timeout=1.0)
    async def limited(self, message: Any) -> Any:
        return message

    @realtime("/silent")
    async def silent(self, message: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    @realtime("/stuck")
    async def stuck(self, message: Any) -> Any:
        await asyncio.to_thread(self.gate.wait, 60)
        return {}

    @realtime("/large")
    def large(self, message: Any) -> Any:
        return {"filler": bytes(message["size"])}

    @realtime("/json", decode_message=json.loads, encode_message=lambda message: json.dumps(message).encode())
    async def as_json(self, message: Any) -> Any:
        return message


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def served(app: App) -> Iterator[RealtimeServer]:
    with serving(app) as server:
        yield server
        app.gate.set()


# ---------------------------------------------------------------- messages


def test_a_message_is_answered(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/double") as connection:
        assert connection.run({"n": 1}) == {"n": 2}
        connection.send(Number(n=2))
        connection.send({"n": 3})
        assert [connection.recv(), connection.recv(timeout=20)] == [{"n": 4}, {"n": 6}]


def test_messages_are_iterated_to_the_end_of_the_stream(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/count") as connection:
        connection.send({"n": 200})

        assert list(connection) == [{"n": n} for n in range(200)]
        assert list(connection) == []
        with pytest.raises(EOFError, match="complete"):
            connection.recv()
        until(lambda: served.open == 0)
        with pytest.raises(LinkLostError, match="has ended the session"):
            connection.send({"n": 1})


def test_a_stream_of_ones_own_is_ended(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/sum") as connection:
        for n in range(10):
            connection.send({"n": n})
        connection.end()

        assert connection.recv(timeout=20) == {"n": 45}
        with pytest.raises(EOFError):
            connection.recv(timeout=20)


def test_one_thread_sends_while_another_receives(served: RealtimeServer) -> None:
    """Much more goes each way than any buffer holds, so neither may hold up the other."""
    with connect_realtime(served.url + "/echo") as connection:

        def send() -> None:
            for n in range(150):
                connection.send({"n": n, "filler": bytes(MIB)})
            connection.end()

        thread = threading.Thread(target=send, daemon=True)
        thread.start()

        assert [message["n"] for message in connection] == list(range(150))
        thread.join(60)
        assert not thread.is_alive()


def test_codecs_may_be_given(served: RealtimeServer) -> None:
    codecs: dict[str, Any] = {"encode_message": lambda message: json.dumps(message).encode()}

    with connect_realtime(served.url + "/json", decode_message=json.loads, **codecs) as connection:
        assert connection.run({"text": "é"}) == {"text": "é"}


def test_a_url_of_http_is_one_of_a_websocket(served: RealtimeServer) -> None:
    url = served.url.replace("ws:", "http:")

    with connect_realtime(url + "/double?x=1") as connection:
        assert connection.url == served.url + "/double?x=1"
        assert connection.run({"n": 1}) == {"n": 2}


def test_proxies_of_the_environment_are_not_asked_for_this_machine(
    served: RealtimeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)

    with connect_realtime(served.url + "/double") as connection:
        assert connection.run({"n": 1}) == {"n": 2}


def test_a_large_answer_is_taken(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/large") as connection:
        assert len(connection.run({"size": 20 * MIB})["filler"]) == 20 * MIB


# ---------------------------------------------------------------- the end


def send_on(connection: Any) -> None:
    """Send for ever."""
    while True:
        connection.send({})


def test_an_error_of_the_endpoint_is_a_value_error_with_its_reason(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/fail") as connection:
        with pytest.raises(ValueError, match=r"^the reason$"):
            connection.run({})
        for again in (connection.recv, connection.end, lambda: connection.send({})):
            with pytest.raises(ValueError, match=r"^the reason$"):
                again()


def test_a_sender_that_never_receives_is_told_why_it_cannot_send(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/fail") as connection:
        connection.send({})
        until(lambda: served.finished)

        with pytest.raises(ValueError, match=r"^the reason$"):
            send_on(connection)


def test_answers_that_came_before_a_failed_sending_are_kept(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/three") as connection:
        until(lambda: served.finished)
        with pytest.raises(LinkLostError, match="has ended the session"):
            send_on(connection)

        assert list(connection) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_session_that_timed_out_says_so(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/limited") as connection:
        assert connection.run({}) == {}
        with pytest.raises(ValueError, match="no inputs, reconnect when needed!"):
            connection.recv(timeout=20)


def test_a_message_that_does_not_come_in_time_is_a_timeout(served: RealtimeServer) -> None:
    with connect_realtime(served.url + "/echo") as connection:
        for timeout in (0.0, 0.05):
            with pytest.raises(TimeoutError, match="no message from"):
                connection.recv(timeout=timeout)

        assert connection.run({"n": 1}, timeout=20) == {"n": 1}


def test_a_connection_that_is_closed_is_of_no_more_use(served: RealtimeServer, app: App) -> None:
    connection = connect_realtime(served.url + "/silent")
    connection.send({})
    connection.close()
    connection.close()

    assert app.closed.wait(20)
    for use in (lambda: connection.send({}), connection.end, connection.recv):
        with pytest.raises(LinkLostError, match="closed here"):
            use()


def test_closing_ends_an_iteration_in_another_thread(served: RealtimeServer) -> None:
    connection = connect_realtime(served.url + "/echo")
    received: list[Any] = []
    thread = threading.Thread(target=lambda: received.extend(connection), daemon=True)
    thread.start()
    connection.send({"n": 1})
    until(lambda: received)
    connection.close()

    thread.join(20)
    assert not thread.is_alive()
    assert received == [{"n": 1}]


def test_a_connection_leaves_no_thread_behind(served: RealtimeServer) -> None:
    for _ in range(3):
        with connect_realtime(served.url + "/double") as connection:
            connection.run({"n": 1})
    with pytest.raises(AppException):
        connect_realtime(served.url + "/nothing")

    assert [thread for thread in threading.enumerate() if thread.name == "fal-realtime-client"] == []


# ---------------------------------------------------------------- what goes wrong


def test_a_path_that_is_not_there_is_refused_with_its_status(served: RealtimeServer) -> None:
    with pytest.raises(AppException, match="no such endpoint") as caught:
        connect_realtime(served.url + "/nothing")

    assert caught.value.status_code in (403, 404)


def test_a_port_where_nothing_listens_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(HostUnreachableError, match="Is the app up"):
        connect_realtime(f"ws://127.0.0.1:{port}/")


def test_a_server_that_never_answers_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}/"

        with pytest.raises(HostUnreachableError, match=r"did not answer within 0\.2 s"):
            connect_realtime(url, timeout=0.2)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://127.0.0.1/", "ws:///path"])
def test_what_is_no_websocket_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of a websocket"):
        connect_realtime(url)


@contextmanager
def answering(handler: Callable[[Any], None]) -> Iterator[str]:
    """Serve connections by hand."""
    with serve_websocket(handler, "127.0.0.1", 0, close_timeout=1) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/"
        finally:
            server.shutdown()
            thread.join(20)


def test_headers_go_along() -> None:
    with (
        answering(lambda peer: peer.send(pack({"key": peer.request.headers["Authorization"]}))) as url,
        connect_realtime(url, headers={"Authorization": "Key a:b"}) as connection,
    ):
        assert connection.recv(timeout=20) == {"key": "Key a:b"}


def test_a_connection_that_breaks_is_a_lost_link() -> None:
    def vanish(peer: Any) -> None:
        peer.recv()
        peer.socket.shutdown(socket.SHUT_RDWR)

    with answering(vanish) as url, connect_realtime(url) as connection:
        with pytest.raises(LinkLostError, match=r"broke .* connect again"):
            connection.run({}, timeout=20)
        with pytest.raises(LinkLostError, match="broke"):
            connection.send({})


def test_a_server_that_goes_away_is_a_lost_link_with_its_reason() -> None:
    with (
        answering(lambda peer: peer.close(1012, "restart")) as url,
        connect_realtime(url) as connection,
        pytest.raises(LinkLostError, match="code 1012 restart"),
    ):
        connection.recv(timeout=20)


def test_a_server_that_says_goodbye_has_no_more_messages() -> None:
    """As servers do that know no other end of a stream."""
    with answering(lambda peer: peer.send(pack({"n": 1}))) as url, connect_realtime(url) as connection:
        assert list(connection) == [{"n": 1}]


def test_control_messages_of_other_kinds_are_passed_over() -> None:
    def talk(peer: Any) -> None:
        peer.send('{"type": "x-fal-message", "action": "timings"}')
        peer.send(pack({"n": 1}))

    with answering(talk) as url, connect_realtime(url) as connection:
        assert list(connection) == [{"n": 1}]


@pytest.mark.parametrize("text", ["hello", "[]", "{}", "3", "[" * 3000])
def test_text_that_is_no_control_message_is_nonsense(text: str) -> None:
    with (
        answering(lambda peer: peer.send(text)) as url,
        connect_realtime(url) as connection,
        pytest.raises(ProtocolError, match="no control message"),
    ):
        connection.recv(timeout=20)


def test_a_message_that_cannot_be_opened_leaves_the_connection_usable() -> None:
    def talk(peer: Any) -> None:
        peer.send(b"\xc1")
        peer.send(pack({"n": 1}))

    with answering(talk) as url, connect_realtime(url) as connection:
        with pytest.raises(ValueError):  # noqa: PT011 - the codec's own
            connection.recv(timeout=20)
        assert connection.recv(timeout=20) == {"n": 1}


def test_a_message_above_the_servers_limit_is_named_as_the_cause(app: App) -> None:
    with (
        serving(app, ws_max_size=1000) as served,
        connect_realtime(served.url + "/echo") as connection,
        pytest.raises(LinkLostError, match="larger than it takes"),
    ):
        connection.run({"filler": bytes(2000)}, timeout=20)


def test_an_answer_above_the_clients_limit_is_named_as_the_cause(served: RealtimeServer) -> None:
    with (
        connect_realtime(served.url + "/large", max_message=1000) as connection,
        pytest.raises(LinkLostError, match=r"too large.*`max_message`"),
    ):
        connection.run({"size": 2000}, timeout=20)


WAIT = """
import sys
from fal_notebook.realtime_client import connect_realtime

with connect_realtime(sys.argv[1]) as connection:
    try:
        connection.send({})
        print("waiting", flush=True)
        if sys.argv[2] == "recv":
            connection.recv()
        else:
            while True:
                connection.send({"filler": bytes(1 << 20)})
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("kind", ["recv", "send"])
def test_a_wait_can_be_interrupted(served: RealtimeServer, kind: str) -> None:
    """In a process of its own, as it is the whole process that is interrupted."""
    command = [sys.executable, "-c", WAIT, served.url + "/stuck", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "waiting\n"
            until(lambda: served.received >= (1 if kind == "recv" else 64))
            os.kill(process.pid, signal.SIGINT)

            assert process.communicate(timeout=60)[0] == "interrupted\n"
            assert process.returncode == 0
        finally:
            process.kill()


def test_importing_the_library_does_not_import_websockets() -> None:
    code = "import sys, fal_notebook; print({'websockets', 'msgpack'} & set(sys.modules))"

    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert shown.stdout == "set()\n"
