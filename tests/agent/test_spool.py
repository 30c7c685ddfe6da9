"""What a worker writes down about the calls of a lane reaches the journal, whoever is killed when."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fal_agent.server.journal import Journal
from fal_agent.server.journal_file import NewEvent, NewRun, NewState
from fal_agent.server.proc import identity
from fal_agent.server.spool import Spool, left_spools
from fal_agent.wire import Begun, Failure, Result, encode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CALLS = {"7": ["f", "function", "[]"]}
FRAMES = [
    encode(Begun("one", "7", 10.0)),
    encode(Result("one", [0], seconds=0.5, seq=1, sent_at=11.0), [b"value"]),
    encode(Begun("two", "7", 12.0)),
    encode(Failure("two", "user", "KeyError: 'x'", seq=1, sent_at=13.0)),
    encode(Begun("three", "7", 14.0)),
]


def make(folder: Path, agent: str = "somebody.1") -> Spool:
    return Spool.create(folder / "journal", agent, "lane", "me", CALLS)


def append(spool: Spool, data: bytes) -> None:
    with spool.path.open("ab") as file:
        file.write(data)


def told(entries: Sequence[Any]) -> list[tuple[str, ...]]:
    """Entries in short."""
    short = {
        NewRun: lambda entry: ("run", entry.run_id, entry.label, entry.client_id),
        NewEvent: lambda entry: ("event", entry.run_id, str(entry.seq)),
        NewState: lambda entry: ("state", entry.run_id, entry.state, str(entry.error)),
    }
    return [short[type(entry)](entry) for entry in entries]


ALL = [
    ("run", "one", "f", "me"),
    ("state", "one", "running", "None"),
    ("event", "one", "1"),
    ("state", "one", "done", "None"),
    ("run", "two", "f", "me"),
    ("state", "two", "running", "None"),
    ("event", "two", "1"),
    ("state", "two", "failed", "KeyError: 'x'"),
    ("run", "three", "f", "me"),
    ("state", "three", "running", "None"),
]


def test_calls_become_runs_and_one_that_goes_on_stays_open(tmp_path: Path) -> None:
    spool = make(tmp_path)
    append(spool, b"".join(FRAMES))

    assert told(list(spool.take())) == ALL
    assert list(spool.open) == ["three"]
    assert list(spool.take()) == []


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, sum(map(len, FRAMES))), max_size=6))
def test_it_may_be_read_at_any_moment(cuts: list[int], tmp_path_factory: Any) -> None:
    spool, data = make(tmp_path_factory.mktemp("spool")), b"".join(FRAMES)
    entries: list[Any] = []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        append(spool, data[start:stop])
        entries += spool.take()

    assert told(entries) == ALL


@settings(max_examples=60)
@given(kept=st.integers(0, sum(map(len, FRAMES))), garbage=st.binary(max_size=80))
def test_what_a_full_disk_cut_short_is_left_out(kept: int, garbage: bytes, tmp_path_factory: Any) -> None:
    spool = make(tmp_path_factory.mktemp("spool"))
    append(spool, b"".join(FRAMES)[:kept] + garbage)

    found = told(list(spool.take()))
    assert found[: len(ALL)] == ALL[: len(found)]


def test_the_spool_of_a_dead_agent_is_recorded_and_removed(tmp_path: Path) -> None:
    """And the call that has not ended is lost, as every other run of that agent is."""
    dead = f"{identity().rpartition('.')[0]}.1"  # our process number, but started at another time
    append(make(tmp_path, dead), b"".join(FRAMES))
    journal = Journal(tmp_path / "journal")

    journal.mark_lost()

    states = {run.run_id: run.state for run in journal.runs()}
    assert states == {"one": "done", "two": "failed", "three": "lost"}
    assert left_spools(journal.path) == []
    journal.close()


def test_the_spool_of_a_living_agent_is_left_alone(tmp_path: Path) -> None:
    spool = make(tmp_path, identity(os.getppid()))
    journal = Journal(tmp_path / "journal")

    journal.mark_lost()

    assert left_spools(journal.path) == [(identity(os.getppid()), spool.path)]
    assert journal.runs() == []
    journal.close()
