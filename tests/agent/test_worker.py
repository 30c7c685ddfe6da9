"""A worker seen from the agent's end of its connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fal_agent
from fal_agent import pickling
from fal_agent.framing import FrameDecoder
from fal_agent.wire import (
    INLINE_LIMIT,
    WINDOW,
    Ack,
    Execute,
    Failure,
    Interrupt,
    Item,
    Log,
    Message,
    Result,
    Task,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CODE = Path(fal_agent.__file__).parents[1]


class Agent:
    """The agent's end of one worker."""

    def __init__(self, folder: Path) -> None:
        self.outbox = folder / "outbox"
        self.outbox.mkdir()
        self.log = folder / "log"
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fal_agent.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(CODE)},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        theirs.close()
        self._decoder = FrameDecoder()
        self._waiting: list[Any] = []
        self._templates = 0

    def send(self, message: Message, buffers: Any = ()) -> None:
        self.socket.sendall(encode(message, buffers))

    def next(self) -> tuple[Any, list[bytes]]:
        """The worker's next message; raises EOFError at the end, TimeoutError after 20 s."""
        while not self._waiting:
            data = self.socket.recv(1 << 18)
            if not data:
                raise EOFError
            self._waiting += self._decoder.feed(data)
        frame = self._waiting.pop(0)
        return decode(frame), frame.buffers

    def until(self, *types: type) -> tuple[Any, list[bytes]]:
        """The next message of some types."""
        while True:
            message, buffers = self.next()
            if isinstance(message, types):
                return message, buffers

    def is_silent(self, seconds: float = 0.5) -> bool:
        """Whether nothing comes for a while."""
        self.socket.settimeout(seconds)
        try:
            return not self._waiting and not self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(20)

    def execute(
        self,
        run_id: str,
        function: Callable[..., Any] | None,
        *args: Any,
        digest: str = "f1",
        multiplexing: int = 1,
        blobs: dict[str, str] | None = None,
        arguments: list[Any] | None = None,
        then: Message | None = None,
    ) -> None:
        """Let a call begin; `then` goes with it in one write."""
        self._templates += 1
        template = str(self._templates)
        task = Task(
            kind="function",
            label="f",
            function=digest,
            outbox=str(self.outbox),
            multiplexing=multiplexing,
        )
        buffers = pickling.dump((args, {})) if arguments is None else []
        refs = list(range(len(buffers))) if arguments is None else arguments
        function_data = None
        if function is not None:
            function_data = [len(buffers)]
            buffers = [*buffers, *pickling.dump((function, None))]
        request = Execute(run_id, template, refs, task=task, function_data=function_data, blobs=blobs or {})
        data = encode(request, buffers) + (encode(then) if then is not None else b"")
        self.socket.sendall(data)

    def close(self) -> None:
        self.socket.close()
        try:
            self.process.wait(timeout=20)
        finally:
            self.process.kill()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    ready, _ = agent.next()
    assert ready.type == "ready"
    assert ready.pid == agent.process.pid
    yield agent
    agent.close()


def test_a_call_gives_its_result(agent: Agent) -> None:
    agent.execute("r1", lambda a, b: a + b, 2, 3)

    result, buffers = agent.until(Result, Failure)

    assert result.run_id == "r1"
    assert pickling.load(buffers) == 5


def test_a_function_sent_once_can_be_called_by_its_digest(agent: Agent) -> None:
    agent.execute("r1", lambda a: a * 2, 4)
    agent.until(Result)
    agent.execute("r2", None, 5)

    _, buffers = agent.until(Result, Failure)

    assert pickling.load(buffers) == 10


def test_a_digest_that_means_nothing_here_is_a_failure(agent: Agent) -> None:
    agent.execute("r1", None, 5, digest="unknown")

    failure, _ = agent.until(Result, Failure)

    assert failure.kind == "agent"
    assert "unknown" in failure.message


def test_printing_waits_for_a_reader_that_does_not_read(agent: Agent) -> None:
    """Memory stays bounded, and no text is dropped."""
    agent.execute("r1", lambda: [print("x" * 9_999) for _ in range(400)] and None)
    received, cost, last = 0, 0, 0
    while not agent.is_silent():
        log, buffers = agent.until(Log, Result)
        assert isinstance(log, Log), "the call ended before its output was read"
        received, cost, last = received + len(buffers[0]), cost + log.cost, log.seq
    held_back = received

    while True:
        agent.send(Ack("r1", last, cost))
        message, buffers = agent.until(Log, Result)
        if isinstance(message, Result):
            break
        received, cost = received + len(buffers[0]), message.cost

    assert held_back <= WINDOW
    assert received == 400 * 10_000


def test_a_generator_waits_for_its_reader(agent: Agent) -> None:
    def forever() -> Iterator[int]:
        n = 0
        while True:
            yield n
            n += 1

    agent.execute("r1", forever)
    items = []
    while not agent.is_silent():
        items.append(pickling.load(agent.until(Item)[1]))
    agent.send(Interrupt("r1"))
    failure, _ = agent.until(Result, Failure)

    assert items == list(range(len(items)))
    assert 0 < len(items) <= 128
    assert failure.kind == "interrupted"


def test_an_interrupt_that_comes_with_the_call_stops_it(agent: Agent) -> None:
    def sleep() -> None:
        import time

        time.sleep(60)

    for i in range(20):
        agent.execute(f"r{i}", sleep, then=Interrupt(f"r{i}"))
        failure, _ = agent.until(Result, Failure)
        assert (failure.run_id, failure.kind) == (f"r{i}", "interrupted")


def test_an_interrupt_for_another_call_stops_nothing(agent: Agent) -> None:
    agent.execute("r1", lambda: 1, then=Interrupt("r0"))

    result, _ = agent.until(Result, Failure)

    assert isinstance(result, Result)


def test_an_acknowledgement_for_a_call_that_is_over_is_ignored(agent: Agent) -> None:
    agent.execute("r1", lambda: 1)
    agent.until(Result)
    agent.send(Ack("r1", 1, 100))
    agent.execute("r2", lambda: 2, digest="f2")

    assert pickling.load(agent.until(Result, Failure)[1]) == 2


def test_arguments_are_read_from_files_and_large_results_become_files(agent: Agent, tmp_path: Path) -> None:
    pickle_file = tmp_path / "blob"
    data = b"x" * (2 * INLINE_LIMIT)
    (part,) = pickling.dump(((data,), {}))
    pickle_file.write_bytes(part)
    agent.execute("r1", lambda value: value * 2, arguments=["b1"], blobs={"b1": str(pickle_file)})

    result, _ = agent.until(Result, Failure)

    (name,) = result.data
    assert pickling.load([(agent.outbox / name).read_bytes()]) == data * 2


def test_a_result_that_the_disk_does_not_take_is_a_failure(agent: Agent) -> None:
    """Here the folder for results is gone, as when its file system is."""
    agent.outbox.rmdir()
    agent.execute("r1", lambda: b"x" * (2 * INLINE_LIMIT))
    failure, _ = agent.until(Result, Failure)
    agent.execute("r2", lambda: 1, digest="f2")
    result, _ = agent.until(Result, Failure)

    assert failure.kind == "resources"
    assert "Free space there" in failure.message
    assert isinstance(result, Result)


@pytest.mark.parametrize("multiplexing", [1, 2])
def test_a_worker_ends_with_its_connection_whatever_it_is_doing(agent: Agent, multiplexing: int) -> None:
    def stubborn() -> None:
        import time

        print("begun", flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                continue

    agent.execute("r1", stubborn, multiplexing=multiplexing)
    agent.until(Log)
    agent.socket.close()

    assert agent.process.wait(timeout=20) == 0


def test_nonsense_ends_the_worker(agent: Agent) -> None:
    agent.socket.sendall(b"\xff" * 64)

    assert agent.process.wait(timeout=20) == 0
    assert "connection" in agent.log.read_text()


def test_text_that_belongs_to_no_call_goes_to_the_log(agent: Agent) -> None:
    def begin() -> None:
        import threading
        import time

        def late() -> None:
            time.sleep(0.2)
            print("nobody's text", flush=True)

        threading.Thread(target=late).start()

    agent.execute("r1", begin)
    agent.until(Result)
    agent.is_silent(1.0)

    assert "nobody's text" in agent.log.read_text()


def test_calls_that_share_the_process_run_at_the_same_time(agent: Agent, tmp_path: Path) -> None:
    def meet(mine: str, other: str) -> str:
        import pathlib
        import time

        pathlib.Path(tmp_path, mine).touch()
        for _ in range(2000):
            if pathlib.Path(tmp_path, other).exists():
                return f"{mine} met {other}"
            time.sleep(0.005)
        return "nobody came"

    agent.execute("r1", meet, "a", "b", multiplexing=2)
    agent.execute("r2", meet, "b", "a", multiplexing=2)

    assert {pickling.load(agent.until(Result, Failure)[1]) for _ in range(2)} == {"a met b", "b met a"}
