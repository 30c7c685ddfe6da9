"""The journal and the connections to an agent, taken through any order of what can happen to them."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from support.fuzzing import FUZZ, SECONDS, for_a_while
from support.waiting import until

import fal_notebook as fal
from fal_agent.errors import HostError, HostUnreachableError
from fal_agent.server.journal import Journal
from fal_agent.server.proc import identity
from fal_agent.wire import Failure, Log, Result, encode
from fal_notebook.hosts.local import LocalHost
from fal_notebook.run import start

if TYPE_CHECKING:
    from fal_notebook.hosts.client import AgentClient

RUNS = st.sampled_from(["r1", "r2", "r3"])
NEW = {"client_id": "c", "label": "f", "kind": "cell", "environment": ""}


class JournalMachine(RuleBasedStateMachine):
    """A journal beside a model of it: nothing that was recorded is lost, nothing runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk would make it wait for fsync
        self.folder = Path(tempfile.mkdtemp(prefix="fal-journal-", dir=memory))
        self.runs: dict[str, list[bytes]] = {}
        self.states: dict[str, str] = {}
        self.seen: set[str] = set()

    def open(self, folder: Path) -> None:
        """As the next agent does: with a name of its own, which counts as dead once another has come."""
        number = next(self.numbers)
        me = f"{identity().rsplit('.', 1)[0]}.{number}"
        self.path, self.journal = folder, Journal(folder / "journal-1.sqlite3", agent=me)

    @initialize()
    def begin(self) -> None:
        self.open(self.folder / "1")

    @rule(run=RUNS, again=st.booleans())
    def add(self, run: str, again: bool) -> None:
        if run in self.runs:
            assert not self.journal.add_run(run, **NEW), "it would run a second time"
            return
        assert self.journal.add_run(run, **NEW, again=again)
        self.journal.add_cell(run, key=f"notebook:{run}", session="s", inputs="{}")
        self.runs[run], self.states[run] = [], "queued"

    @rule(run=RUNS, text=st.binary(max_size=50))
    def say(self, run: str, text: bytes) -> None:
        if run in self.runs and self.states[run] in ("queued", "running"):
            frames = self.runs[run]
            frame = encode(Log(run, "stdout", sent_at=1.0, seq=len(frames) + 1), [text])
            self.journal.append(run, len(frames) + 1, frame)
            frames.append(frame)

    @rule(run=RUNS, state=st.sampled_from(["running", "done", "failed", "cancelled"]))
    def change(self, run: str, state: str) -> None:
        if run in self.runs:
            self.journal.set_state(run, state)
            if self.states[run] in ("queued", "running"):
                self.states[run] = state

    @rule(run=RUNS)
    def see(self, run: str) -> None:
        self.journal.set_seen(run)
        self.seen |= {run} & self.runs.keys()

    @rule()
    def write(self) -> None:
        assert self.journal.record()

    @rule()
    def close_and_open(self) -> None:
        self.journal.close()
        self.open(self.path)
        self.mourn()

    @rule()
    def die(self) -> None:
        """What lies on the disk in this moment is all that is left, after the events of a moment before."""
        self.journal.flush()
        copy = self.folder / str(next(self.numbers))
        with self.journal._lock:
            shutil.copytree(self.path, copy)
        self.journal.close()
        self.open(copy)
        self.mourn()

    def mourn(self) -> None:
        """Runs that had not ended are lost, and say so."""
        lost = {run for run, state in self.states.items() if state in ("queued", "running")}
        assert {record.run_id for record in self.journal.mark_lost()} == lost
        for run in lost:
            self.states[run] = "lost"
            *_, last = self.journal.events(run)
            assert b'"failure"' in last
            self.runs[run].append(last)

    @precondition(lambda self: self.runs)
    @rule()
    def forget(self) -> None:
        ended = {run for run, state in self.states.items() if state not in ("queued", "running")}
        assert self.journal.retain(max_age_seconds=-1.0).runs == len(ended)
        for run in ended:
            del self.runs[run], self.states[run]
        self.seen -= ended

    @invariant()
    def the_record_is_whole(self) -> None:
        records = {record.run_id: record.state for record in self.journal.runs()}
        assert records == self.states
        for run, frames in self.runs.items():
            assert list(self.journal.events(run)) == frames
            half = len(frames) // 2
            assert list(self.journal.events(run, half)) == frames[half:]
        cells = {cell.run.run_id: cell.is_seen for cell in self.journal.cells("notebook")}
        assert cells == {run: run in self.seen for run in self.runs}

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
        shutil.rmtree(self.folder)


class WaywardHost(LocalHost):
    """A host that can be out of reach for a while, as one behind a network is."""

    is_away = False

    def _connect(self) -> AgentClient:
        if self.is_away:
            raise HostUnreachableError("it is away")
        return super()._connect()

    def _is_away(self, _error: HostError) -> bool:
        return self.is_away


class ConnectionMachine(RuleBasedStateMachine):
    """Calls over connections that break: whoever watches sees each line once, in order, and one end."""

    host: WaywardHost
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}  # run id -> lines that it was told to say
        self.orders: dict[str, Path] = {}
        self.heard: list[tuple[str, list[Any]]] = []  # run id, what one watcher got
        self.host.connect()  # what was never reached is not waited for

    @rule()
    def call(self) -> None:
        if len(self.calls) == 2:
            return
        orders = self.folder / uuid.uuid4().hex
        orders.touch()
        run = start(self.host, obey._parcel(self.host, (str(orders),), {}), on_event=self.watcher("?"))
        run_id, heard = run.run_id, self.heard.pop()[1]
        self.heard.append((run_id, heard))
        self.calls[run_id], self.orders[run_id] = 0, orders

    def watcher(self, run_id: str) -> Any:
        heard: list[Any] = []
        self.heard.append((run_id, heard))
        return heard.append

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), count=st.integers(1, 300))
    def say(self, data: st.DataObject, count: int) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.calls)))
        self.calls[run_id] += count
        with self.orders[run_id].open("a") as file:
            file.write(f"{count}\n")

    @rule()
    def break_connection(self) -> None:
        client = self.host._client
        if client is not None:
            client._duplex._stream.close()

    @rule()
    def go_away(self) -> None:
        self.host.is_away = True
        self.break_connection()

    @rule()
    def come_back(self) -> None:
        self.host.is_away = False

    @precondition(lambda self: self.calls and not self.host.is_away)
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.calls)))
        if run_id not in {run["run_id"] for run in self.host.ask("runs", limit=50)}:
            return  # it is on its way, over a connection that broke
        if sum(watched == run_id for watched, _ in self.heard) < 3:
            fal.Run.attached(
                self.host, run_id, label="obey", decode=lambda _: None, on_event=self.watcher(run_id)
            )

    @rule(milliseconds=st.integers(1, 50))
    def wait(self, milliseconds: int) -> None:
        time.sleep(milliseconds / 1000)

    def teardown(self) -> None:
        self.come_back()
        for run_id in self.calls:
            with self.orders[run_id].open("a") as file:
                file.write("0\n")
        for run_id, heard in self.heard:
            until(lambda heard=heard: heard and isinstance(heard[-1].event, (Result, Failure)))
            said = [got for got in heard if isinstance(got.event, Log) and got.event.stream == "stdout"]
            text = b"".join(bytes(part) for got in said for part in got.data)
            lines = text.decode().split()
            assert lines == [str(number) for number in range(self.calls[run_id])], lines[-3:]
            outcomes = [got.event for got in heard if isinstance(got.event, (Result, Failure))]
            assert [type(outcome) for outcome in outcomes] == [Result], outcomes


@fal.function(keep_alive=60)
def obey(path: str) -> int:
    """Say as many lines as the file says, line by line of it; 0 ends."""
    import pathlib
    import time

    said, read = 0, 0
    while True:
        orders = pathlib.Path(path).read_text().split()
        for order in orders[read:]:
            if order == "0":
                return said
            for _ in range(int(order)):
                print(said)
                said += 1
        read = len(orders)
        time.sleep(0.002)


def test_the_journal_through_any_order_of_what_happens() -> None:
    machine = settings(FUZZ, max_examples=200 if SECONDS else 12, stateful_step_count=20)
    for_a_while(lambda: run_machine(JournalMachine, settings=machine))


def test_connections_through_any_order_of_what_happens(tmp_path: Path) -> None:
    host = WaywardHost("machine")
    bound = type("Bound", (ConnectionMachine,), {"host": host, "folder": tmp_path})
    machine = settings(FUZZ, max_examples=100 if SECONDS else 8, stateful_step_count=12)
    try:
        for_a_while(lambda: run_machine(bound, settings=machine))
    finally:
        host.close()
