"""The SSH connection breaks: during a call, and between calls."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import random
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.appending import appender
from support.waiting import until

import fal_notebook as fal
from fal_agent.wire import BlobPart, Cancel, Message, Need
from fal_notebook import exceptions
from fal_notebook.hosts.blob_traffic import BlobTraffic
from fal_notebook.hosts.client import AgentClient
from fal_notebook.hosts.ssh import SSHHost
from fal_notebook.hosts.ssh_transport import LinkTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.sshd import SSHServer


@pytest.fixture
def far(
    ssh_server: SSHServer, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SSHHost]:
    """The server as a host; a parameter says what carries the link."""
    settings = Path(os.environ["FAL_NOTEBOOK_CONFIG"], "hosts.toml").read_text()
    (tmp_path / "hosts.toml").write_text(settings + f'link = "{getattr(request, "param", "paramiko")}"\n')
    monkeypatch.setenv("FAL_NOTEBOOK_CONFIG", str(tmp_path))
    host = SSHHost(ssh_server.name)
    yield host
    host.ask("stop", everything=True)
    host.close()


def test_a_call_goes_on_over_a_link_that_broke(
    far: SSHHost, ssh_server: SSHServer, shared_folder: Path
) -> None:
    begun, go = shared_folder / "begun", shared_folder / "go"

    @fal.function(host=far)
    def work() -> int:
        import time

        begun.touch()
        while not go.exists():
            time.sleep(0.005)
        return 42

    run = work.submit()
    until(begun.exists)
    ssh_server.kill_connections()

    go.touch()

    assert run.result(timeout=30) == 42
    assert record(far, run.run_id)["state"] == "done"


def record(host: SSHHost, run_id: str) -> dict[str, Any]:
    return next((item for item in host.ask("runs") if item["run_id"] == run_id), {})


def test_a_link_that_broke_between_calls_is_made_anew(far: SSHHost, ssh_server: SSHServer) -> None:
    @fal.function(host=far)
    def pid() -> int:
        import os

        return os.getpid()

    before = pid()
    ssh_server.kill_connections()
    until(lambda: not far.is_connected)

    assert pid() == before  # the worker was kept


def test_a_call_right_after_the_link_broke_works(far: SSHHost, ssh_server: SSHServer) -> None:
    """Whoever notices first, the connection or the call, the call makes a new link."""

    @fal.function(host=far)
    def one() -> int:
        return 1

    one()
    for _ in range(5):
        agent = far.connect()
        agent.close()  # the agent's stream is gone; the link is found broken only when it is used
        until(lambda agent=agent: not agent.is_open)
        ssh_server.kill_connections()
        assert one() == 1


def test_a_restarted_server_is_found_again(far: SSHHost, ssh_server: SSHServer) -> None:
    @fal.function(host=far)
    def one() -> int:
        return 1

    one()
    ssh_server.restart()
    until(lambda: not far.is_connected)

    assert one() == 1


@pytest.fixture
def append(far: SSHHost, shared_folder: Path) -> Any:
    """A function on the server that notes each of its calls in a file, `lines`."""
    return appender(far, shared_folder / "lines")


@pytest.fixture
def away(far: SSHHost, ssh_server: SSHServer) -> Iterator[Callable[[], None]]:
    """Take the server away; what is given brings it back, as does the end of the test."""
    far.connect()
    ssh_server.stop_listening()
    until(lambda: not far.is_connected)
    is_back = False

    def bring_back() -> None:  # in the main thread: the server ends with the one that starts it
        nonlocal is_back
        if not is_back:
            ssh_server.restart()
            is_back = True

    yield bring_back
    bring_back()


@pytest.mark.parametrize("far", ["paramiko", "openssh"], indirect=True)
def test_calls_begun_while_the_server_is_away_wait_for_it_and_run_once_each(
    append: Any, away: Callable[[], None], shared_folder: Path
) -> None:
    runs = [append.submit(number) for number in range(20)]
    assert not any(run.done() for run in runs)
    away()

    assert [run.result(timeout=30) for run in runs] == list(range(20))
    assert sorted(map(int, (shared_folder / "lines").read_text().split())) == list(range(20))
    assert append(20) == 20  # and those after them need not wait


def test_a_call_that_waits_for_the_server_says_why(
    append: Any, away: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def is_said(text: str) -> bool:
        said.append(capfd.readouterr().err)
        return re.search(text, "".join(said)) is not None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        calling = pool.submit(append, 1)
        until(lambda: is_said(r"'far-box' is lost; .* until \d\d:\d\d\. .*refused"))
        away()
        assert calling.result(timeout=30) == 1

    assert is_said("Connected to 'far-box' again")


def test_the_calls_of_a_map_say_once_that_they_wait(
    far: SSHHost, ssh_server: SSHServer, shared_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun, go = shared_folder / "begun", shared_folder / "go"

    @fal.function(host=far)
    def wait(number: int) -> int:
        import time

        begun.touch()
        while not go.exists():
            time.sleep(0.005)
        return number

    with concurrent.futures.ThreadPoolExecutor() as pool:
        mapping = pool.submit(lambda: list(wait.map(range(10), chunk_size=1, in_flight=10)))
        until(begun.exists)
        ssh_server.stop_listening()
        said: list[str] = []
        until(lambda: said.append(capfd.readouterr().err) or "connecting again" in "".join(said))
        ssh_server.restart()
        go.touch()
        assert mapping.result(timeout=30) == list(range(10))

    text = "".join([*said, capfd.readouterr().err])
    assert text.count("connecting again") == text.count("Connected to 'far-box' again") == 1


@pytest.mark.parametrize("wish", ["interrupt", "cancel"])
def test_a_call_that_waits_for_the_server_can_be_ended(
    append: Any, away: Callable[[], None], shared_folder: Path, wish: str
) -> None:
    run = append.submit(1)

    getattr(run, wish)()

    with pytest.raises((KeyboardInterrupt, concurrent.futures.CancelledError)):
        run.result(timeout=5)
    away()
    assert append(2) == 2
    assert (shared_folder / "lines").read_text() == "2\n"


def test_a_call_that_waited_in_vain_did_not_begin_and_the_next_is_refused_at_once(
    far: SSHHost, append: Any, away: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far._returning, "_patience", lambda: 0.2)

    with pytest.raises(exceptions.HostUnreachableError, match=r"'far-box' .*did not begin: .*refused the"):
        append(1)

    with pytest.raises(exceptions.HostUnreachableError, match="refused the connection"):
        append.submit(2)
    away()
    assert append(3) == 3


def test_a_first_connection_that_breaks_during_the_login_is_made_again(
    far: SSHHost, ssh_server: SSHServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in, breaks = LinkTransport.auth_publickey, [True, False]

    def cut_off(transport: LinkTransport, *arguments: Any) -> Any:
        if breaks and breaks.pop(0):
            ssh_server.kill_connections()
        return log_in(transport, *arguments)

    monkeypatch.setattr(LinkTransport, "auth_publickey", cut_off)

    far.connect()

    assert breaks == []


def test_a_large_upload_that_breaks_goes_on_from_what_has_arrived(
    far: SSHHost, ssh_server: SSHServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = AgentClient.ask

    def listening(client: AgentClient, question: str, timeout: float, **arguments: Any) -> Any:
        answer = ask(client, question, timeout, **arguments)
        if question == "arrived":
            asked.append(answer)
        return answer

    def has_arrived(size: int) -> bool:
        pieces = ssh_server.home.glob(".fal_notebook/*/blobs/.writers/*/incoming/*")
        return any(piece.stat().st_size >= size for piece in pieces)

    @fal.function(host=far)
    def digest(data: bytes) -> str:
        import hashlib

        return hashlib.sha256(data).hexdigest()

    monkeypatch.setattr(AgentClient, "ask", listening)
    digest(b"x")
    data = random.Random(5).randbytes(1_000_000) * 300
    run = digest.submit(data)
    until(lambda: has_arrived(20_000_000))
    ssh_server.kill_connections()

    assert run.result(timeout=60) == hashlib.sha256(data).hexdigest()
    assert asked[0] == 0
    assert 20_000_000 <= asked[-1] < len(data)

    another = SSHHost(ssh_server.name)  # as in another notebook
    assert digest.on(host=another)(data) == run.result()
    another.close()
    assert asked[-1] >= len(data)


def test_a_large_result_that_breaks_goes_on_from_what_has_arrived(
    far: SSHHost, ssh_server: SSHServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[tuple[int, int]] = []
    take_part = BlobTraffic.take_part

    def listening(blobs: BlobTraffic, message: BlobPart, buffers: list[bytes]) -> None:
        parts.append((message.offset, len(buffers[0])))
        take_part(blobs, message, buffers)

    @fal.function(host=far)
    def make(size: int) -> bytes:
        return bytes(range(250)) * (size // 250)

    monkeypatch.setattr(BlobTraffic, "take_part", listening)
    make(250)
    for _ in range(2):  # a first call has events of its own before its result, a warm one may have none
        parts.clear()
        run = make.submit(300_000_000)
        until(lambda: parts and parts[-1][0] >= 20_000_000)
        ssh_server.kill_connections()

        assert run.result(timeout=60) == bytes(range(250)) * 1_200_000
        assert sum(size for _, size in parts) < 1.05 * 300_000_000


def test_output_goes_on_after_the_last_that_was_seen(
    far: SSHHost, ssh_server: SSHServer, shared_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    go = shared_folder / "go"

    @fal.function(host=far)
    def count(lines: int) -> int:
        import time

        for number in range(lines):
            print(f"line {number}", flush=True)
            time.sleep(0.002)
        while not go.exists():
            time.sleep(0.005)
        print("end")
        return lines

    def breaking() -> None:
        for _ in range(3):
            until(lambda: far.is_connected)
            time.sleep(0.3)
            ssh_server.kill_connections()
        go.touch()

    breaker = threading.Thread(target=breaking)
    breaker.start()
    result = count(600)
    breaker.join()

    printed = [line for line in capfd.readouterr().out.splitlines() if line]
    assert result == 600
    assert printed == [*(f"line {number}" for number in range(600)), "end"]


def test_brief_calls_one_after_the_other_survive_breaks_and_run_once_each(
    far: SSHHost, append: Any, ssh_server: SSHServer, shared_folder: Path
) -> None:
    """Also those in a lane: what became of a call there is known to the agent."""
    append(0)
    stop = threading.Event()

    def breaking() -> None:
        while not stop.wait(0.3):
            if far.is_connected:
                ssh_server.kill_connections()

    breaker = threading.Thread(target=breaking)
    breaker.start()
    try:
        given = [append(number) for number in range(1, 400)]
    finally:
        stop.set()
        breaker.join()

    assert given == list(range(1, 400))
    assert (shared_folder / "lines").read_text().split() == [str(number) for number in range(400)]


def begin_long_call(far: SSHHost, shared_folder: Path) -> fal.Run:
    """Start a call that does not end by itself; it has begun when this returns."""
    begun = shared_folder / "begun"

    @fal.function(host=far)
    def work() -> None:
        import time

        begun.touch()
        time.sleep(600)

    run = work.submit()
    until(begun.exists)
    return run


def test_a_host_that_stays_away_is_told_with_the_way_back(
    far: SSHHost, ssh_server: SSHServer, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far._returning, "_patience", lambda: 0.0)
    run = begin_long_call(far, shared_folder)
    ssh_server.kill_connections()

    with pytest.raises(exceptions.LinkLostError, match=rf"'far-box' broke.*fal\.attach\('{run.run_id}'"):
        run.result(timeout=30)


def test_an_interrupt_ends_the_waiting_for_a_host_that_is_away(
    far: SSHHost, ssh_server: SSHServer, shared_folder: Path
) -> None:
    run = begin_long_call(far, shared_folder)
    ssh_server.freeze()
    try:
        ssh_server.kill_connections()
        until(lambda: not far.is_connected)
        run.interrupt()
        with pytest.raises(exceptions.LinkLostError, match="cannot be reached to stop the call"):
            run.result(timeout=30)
    finally:
        ssh_server.thaw()


def test_a_cancelled_call_is_cancelled_though_the_link_broke_with_the_wish(
    far: SSHHost, ssh_server: SSHServer, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = shared_folder / "begun"

    @fal.function(host=far)
    def work() -> None:
        import time

        begun.touch()
        while True:
            time.sleep(0.01)

    run = work.submit()
    until(begun.exists)
    send = AgentClient.send_if_open

    def swallow(client: AgentClient, message: Message) -> bool:
        if isinstance(message, Cancel):
            ssh_server.kill_connections()
            return True  # as it looks while the network still takes what it will not deliver
        return send(client, message)

    monkeypatch.setattr(AgentClient, "send_if_open", swallow)

    assert run.cancel()

    until(lambda: record(far, run.run_id).get("state") == "cancelled")


class Forgotten(set[str]):
    """What a client believes the agent to have, which has let it go."""

    def __contains__(self, name: object) -> bool:
        return not super().__contains__(name)

    def discard(self, name: str) -> None:
        self.add(name)


def test_a_call_that_is_cancelled_while_it_must_be_sent_again_never_begins(
    far: SSHHost, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = shared_folder / "begun"

    @fal.function(host=far)
    def work(mark: Path) -> None:
        mark.touch()

    client = far.connect()
    monkeypatch.setattr(client._submissions, "_functions", Forgotten())
    asked, cancelled = threading.Event(), threading.Event()
    send_again = client._send_again

    def later(need: Need) -> None:
        asked.set()
        assert cancelled.wait(30)
        send_again(need)

    monkeypatch.setattr(client, "_send_again", later)
    run = work.submit(mark)
    assert asked.wait(30)

    assert run.cancel()

    cancelled.set()
    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=30)
    far.ask("status")  # comes after whatever was sent for the call
    monkeypatch.undo()
    work.on(far)(shared_folder / "other")
    assert not mark.exists()
