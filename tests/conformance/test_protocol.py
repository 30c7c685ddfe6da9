"""What the agent's socket takes and refuses, seen by a client that speaks frames itself."""

from __future__ import annotations

import stat
import struct
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from support.raw_client import RawClient
from support.waiting import until

import fal_notebook as fal
from fal_agent import pickling
from fal_agent.paths import default_root, socket_path
from fal_agent.wire import Ack, Ask, Attach, Call, Kill, Ping, Result, Submit
from fal_notebook.environment import environment_spec
from fal_notebook.hosts import registry
from fal_notebook.hosts.archive import source_archive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path() -> Path:
    """The socket of the local agent, which runs."""

    @fal.function(host="local")
    def one() -> int:
        return 1

    assert one() == 1
    return socket_path(default_root(), source_archive().digest)


@pytest.fixture
def client(path: Path) -> Iterator[RawClient]:
    client = RawClient(path)
    yield client
    client.close()


def submission(function: Any, run_id: str, *, again: bool = False) -> tuple[Submit, list[Any]]:
    """A submit of a function without arguments."""
    import platform

    parts = [*pickling.dump((function, None)), *pickling.dump(((), {}))]
    call = Call(
        kind="function",
        label="raw",
        function=uuid.uuid5(uuid.NAMESPACE_OID, parts[0].hex()).hex,
        environment=environment_spec(None),
        client=platform.python_version(),
    )
    submit = Submit(run_id, "t1", [1], call=call, function_data=[0], again=again)
    return submit, parts


def test_a_submit_that_is_sent_twice_runs_once(client: RawClient, tmp_path: Path) -> None:
    marks = tmp_path / "marks"

    def mark() -> int:
        with marks.open("a") as file:
            file.write("x")
        return 7

    submit, parts = submission(mark, uuid.uuid4().hex[:16])
    client.send(submit, parts)
    client.send(submit, parts)
    first, buffers = client.receive("result", "failure")
    client.send(submit, parts)
    again, buffers_again = client.receive("result", "failure")

    assert isinstance(first, Result)
    assert pickling.load(buffers) == pickling.load(buffers_again) == 7
    assert again.seq == first.seq
    assert marks.read_text() == "x"


def test_a_submit_that_is_sent_again_on_a_new_connection_runs_once(path: Path, tmp_path: Path) -> None:
    """That is what a notebook does whose connection broke before it knew that the call had arrived."""
    marks = tmp_path / "marks"

    def mark() -> int:
        with marks.open("a") as file:
            file.write("x")
        return 7

    submit, parts = submission(mark, uuid.uuid4().hex[:16])
    client = RawClient(path, client_id="kernel-1")
    client.send(submit, parts)
    client.close()
    client = RawClient(path, client_id="kernel-1")
    again, parts = submission(mark, submit.run_id, again=True)
    client.send(again, parts)
    result, buffers = client.receive("result", "failure")
    client.close()

    assert isinstance(result, Result)
    assert pickling.load(buffers) == 7
    assert marks.read_text() == "x"


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10,
        b"\xff" * 4096,
        struct.pack("<I", 1 << 31) * 100,
        bytes(range(256)) * 16,
    ],
)
def test_garbage_closes_that_connection_only(path: Path, client: RawClient, garbage: bytes) -> None:
    stranger = RawClient(path, hello=False)
    stranger.socket.sendall(garbage)
    assert stranger.socket.recv(1) == b""
    stranger.close()

    client.send(Ping(5))
    pong, _ = client.receive("pong")
    assert pong.number == 5


def test_a_stranger_that_does_not_say_hello_is_sent_away(path: Path) -> None:
    stranger = RawClient(path, hello=False)
    stranger.send(Ask("1", "status"))

    assert stranger.receive("answer") is None
    stranger.close()


def test_a_submit_that_makes_no_sense_hurts_nobody(path: Path, client: RawClient) -> None:
    """It refers to a buffer that is not in its frame."""
    stranger = RawClient(path)
    submit, parts = submission(lambda: 1, uuid.uuid4().hex[:16])
    stranger.send(submit, parts[:1])
    assert stranger.receive("result") is None
    stranger.close()

    client.send(Ping(6))
    pong, _ = client.receive("pong")
    assert pong.number == 6


def test_a_submit_whose_template_the_agent_does_not_know_is_asked_for(client: RawClient) -> None:
    client.send(Submit("nobody", "t99", [0]), [b"x"])

    need, _ = client.receive("need")

    assert (need.run_id, need.names) == ("nobody", ["t99"])


def test_an_unknown_question_is_answered_with_the_known_ones(client: RawClient) -> None:
    client.send(Ask("q", "nonsense"))

    answer, _ = client.receive("answer")

    assert "status" in answer.error


def test_only_the_user_reaches_the_agent(path: Path) -> None:
    folder = path.parent.stat()

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.st_mode) == 0o700
    assert stat.S_IMODE(default_root().stat().st_mode) == 0o700


def test_events_are_numbered_and_journaled(path: Path) -> None:
    host = registry.get_host("local")

    @fal.function(host=host)
    def talk() -> int:
        print("hello")
        return 1

    run = talk.submit()
    run.result(timeout=20)

    (record,) = [item for item in host.ask("runs", limit=20) if item["run_id"] == run.run_id]
    assert record["state"] == "done"
    assert record["last_seq"] >= 2


def test_a_run_that_was_taken_up_again_is_held_back_by_a_slow_notebook(path: Path, tmp_path: Path) -> None:
    """While nobody watches it runs freely; afterwards its output waits for the notebook, as before."""
    count = tmp_path / "count"

    def chatter() -> None:
        import time

        for number in range(20_000):
            print("x" * 10_000)
            count.write_text(str(number))
            time.sleep(0.001)

    def counted() -> int:
        return int(count.read_text() or 0) if count.exists() else 0

    def stands_still() -> bool:
        before = counted()
        time.sleep(0.3)
        return counted() == before

    first, run_id = RawClient(path), uuid.uuid4().hex[:16]
    submit, parts = submission(chatter, run_id)
    first.send(submit, parts)
    until(lambda: counted() and stands_still())
    held_at = counted()
    first.close()
    until(lambda: counted() > held_at + 300)

    second = RawClient(path)
    second.send(Attach(run_id, resumes=True))
    until(stands_still)
    held_at = counted()
    second.send(Ack(run_id, 0, 1 << 19))
    until(lambda: counted() > held_at)
    second.send(Kill(run_id))
    second.close()
