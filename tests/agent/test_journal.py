"""What the journal promises: recorded when it says so, in order, bounded, and never in the way of a call."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.errors import ResourceError
from fal_agent.framing import FrameDecoder
from fal_agent.server.journal import QUEUE_BYTES, Journal
from fal_agent.server.proc import identity
from fal_agent.wire import Failure, Item, Log, Result, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

NEW = {"client_id": "kernel", "label": "f", "kind": "function", "environment": "[]"}
AGENT = Path(__file__).parents[2] / "agent"


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Journal]:
    journal = Journal(path / "journal-1.sqlite3", **options)
    try:
        yield journal
    finally:
        journal.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with opened(tmp_path) as journal:
        yield journal


def log(run_id: str, seq: int, text: bytes) -> bytes:
    return encode(Log(run_id, "stdout", seq=seq), [text])


def messages(journal: Journal, run_id: str, after: int = 0) -> list[Any]:
    return [decode(FrameDecoder().feed(frame)[0]) for frame in journal.events(run_id, after)]


def text_of(journal: Journal, run_id: str) -> bytes:
    return b"".join(b"".join(FrameDecoder().feed(frame)[0].buffers) for frame in journal.events(run_id))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_run_is_in_the_file_when_add_run_returns(journal: Journal) -> None:
    """Another process that looks at once, as a new agent would, must find it."""
    journal.add_run("r1", **NEW, submitted_at=5.0)

    other = sqlite3.connect(journal.path)
    found = other.execute("SELECT run_id, state, submitted_at FROM runs").fetchall()
    other.close()

    assert found == [("r1", "queued", 5.0)]


def test_a_known_run_is_refused_by_every_agent_that_shares_the_file(tmp_path: Path, journal: Journal) -> None:
    """A submit that is sent again must never run twice."""
    with opened(tmp_path) as other:
        assert journal.add_run("r1", **NEW)
        assert not journal.add_run("r1", **NEW)
        assert not other.add_run("r1", **NEW)


def test_events_come_back_in_order_and_from_any_number_on(journal: Journal) -> None:
    journal.add_run("r1", **NEW)
    journal.add_run("r2", **NEW)
    frames = [log("r1", seq, str(seq).encode()) for seq in range(1, 1001)]
    for seq, frame in enumerate(frames, 1):
        journal.append("r1", seq, frame)
        journal.append("r2", seq, log("r2", seq, b"other"))

    assert list(journal.events("r1")) == frames
    assert list(journal.events("r1", after=990)) == frames[990:]
    assert list(journal.events("r1", after=1000)) == []
    assert list(journal.events("unknown")) == []


def test_events_reach_the_file_without_a_flush(journal: Journal) -> None:
    journal.add_run("r1", **NEW)
    journal.append("r1", 1, log("r1", 1, b"x"))
    journal.set_state("r1", "running")
    other = sqlite3.connect(journal.path)

    wait_for(lambda: other.execute("SELECT count(*) FROM events").fetchone() == (1,))
    wait_for(lambda: other.execute("SELECT state FROM runs").fetchone() == ("running",))
    other.close()


def test_a_killed_agent_loses_no_run_and_only_the_last_moment_of_events(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from fal_agent.server.journal import Journal\n"
        "from fal_agent.wire import Log, encode\n"
        "j = Journal(Path(sys.argv[1]) / 'journal-1.sqlite3')\n"
        "j.add_run('r1', client_id='c', label='f', kind='function', environment='')\n"
        "j.append('r1', 1, encode(Log('r1', 'stdout', seq=1), [b'early'])); j.flush()\n"
        "j.add_run('r2', client_id='c', label='g', kind='function', environment='')\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(AGENT)},
    )
    assert agent.stdout is not None
    assert agent.stdout.readline() == b"ready\n"
    with opened(tmp_path) as journal:
        assert journal.mark_lost() == [], "the agent lives"

        agent.kill()
        agent.wait()
        agent.stdout.close()

        assert [run.run_id for run in journal.mark_lost()] == ["r2", "r1"]
        assert text_of(journal, "r1") == b"early"
        assert [journal.run(run_id).state for run_id in ("r1", "r2")] == ["lost", "lost"]
        assert journal.mark_lost() == []


def run_until_killed(script: str, folder: Path) -> None:
    """Run an agent that kills itself at the end of a script, which has the journal's folder as argument."""
    command = [sys.executable, "-c", script, str(folder)]
    agent = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(AGENT)})
    assert agent.returncode == -signal.SIGKILL


def test_a_run_that_was_only_noted_is_lost_and_not_forgotten_with_its_agent(tmp_path: Path) -> None:
    """The quick way in writes a line and no transaction; that line must outlive the agent too."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from fal_agent.server import journal\n"
        "journal.GROUP_SECONDS = 60.0\n"
        "j = journal.Journal(Path(sys.argv[1]) / 'journal-1.sqlite3')\n"
        "j.add_run('r1', client_id='c', label='f', kind='function', environment='', again=False)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run_until_killed(script, tmp_path)

    with opened(tmp_path) as journal:
        assert journal.runs() == []

        assert [run.run_id for run in journal.mark_lost()] == ["r1"]
        assert not journal.add_run("r1", **NEW), "it must not run a second time"


def test_a_run_that_was_forgotten_does_not_come_back_when_its_agent_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from fal_agent.server import journal\n"
        "j = journal.Journal(Path(sys.argv[1]) / 'journal-1.sqlite3')\n"
        "for run in ('r1', 'r2'):\n"
        "    j.add_run(run, client_id='c', label='f', kind='function', environment='', again=False)\n"
        "j.set_state('r1', 'done')\n"
        "assert j.record() and j.retain(max_age_seconds=-1).runs == 1\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run_until_killed(script, tmp_path)

    with opened(tmp_path) as journal:
        assert [run.run_id for run in journal.mark_lost()] == ["r2"]
        assert [run.run_id for run in journal.runs()] == ["r2"]


def test_a_run_that_was_noted_is_known_at_once_to_who_asks(journal: Journal) -> None:
    with journal._lock:  # it cannot have been recorded yet
        assert journal.add_run("r1", **NEW, again=False)
        journal.append("r1", 1, log("r1", 1, b"x"))
        assert not journal.add_run("r1", **NEW)

    assert text_of(journal, "r1") == b"x"
    assert not journal.add_run("r1", **NEW)


def test_agents_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """After an upgrade the old agent serves on beside the new one."""
    script = (
        "import sys; from pathlib import Path\n"
        "from fal_agent.server.journal import Journal\n"
        "from fal_agent.wire import Log, encode\n"
        "j = Journal(Path(sys.argv[1]) / 'journal-1.sqlite3', on_error=print)\n"
        "for n in range(200):\n"
        "    r = f'{sys.argv[2]}-{n}'\n"
        "    assert j.add_run(r, client_id=sys.argv[2], label='f', kind='function', environment='')\n"
        "    for k in range(1, 6): j.append(r, k, encode(Log(r, 'stdout', seq=k), [b'x' * 500]))\n"
        "    j.set_state(r, 'done')\n"
        "j.close()\n"
    )
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(AGENT)},
        )
        for name in ("a", "b", "c")
    ]
    outputs = [agent.communicate(timeout=60)[0] for agent in agents]

    assert outputs == [b"", b"", b""]
    with opened(tmp_path) as journal:
        runs = journal.runs(limit=1000)
        assert len(runs) == 600
        assert {(run.state, run.last_seq) for run in runs} == {("done", 5)}
        assert all(len(list(journal.events(run.run_id))) == 5 for run in runs)


def test_a_lost_run_ends_with_a_failure_that_comes_after_anything_seen(tmp_path: Path) -> None:
    """The notebook may have seen events that the killed agent had not recorded yet."""
    dead = identity().rsplit(".", 1)[0] + ".1"  # this process number, at another time
    with opened(tmp_path, agent=dead) as earlier:
        earlier.add_run("r1", **NEW)
        earlier.append("r1", 1, log("r1", 1, b"seen"))
    with opened(tmp_path) as journal:
        journal.mark_lost()

        (failure,) = messages(journal, "r1", after=1000)

    assert isinstance(failure, Failure)
    assert failure.kind == "lost"
    assert "run it again" in failure.message


def test_a_machine_that_was_started_anew_is_named_as_the_reason(tmp_path: Path) -> None:
    host, _boot, pid, started = identity().split(".")
    with opened(tmp_path, agent=f"{host}.00000000.{pid}.{started}") as earlier:
        earlier.add_run("r1", **NEW)
    with opened(tmp_path) as journal:
        journal.mark_lost()
        run = journal.run("r1")

    assert run is not None
    assert run.state == "lost"
    assert run.error is not None
    assert "the machine was started anew before the run did; run it again" in run.error


def test_a_clock_that_jumps_loses_nothing(tmp_path: Path) -> None:
    """A laptop's is set when it wakes; a board without a battery starts in 1970."""
    moments = iter([2e9, 0.0, 1e9, 1e9, 0.0, 0.0, *[1e9] * 20])
    with opened(tmp_path, clock=lambda: next(moments)) as journal:
        for name in ("r1", "r2", "r3"):
            journal.add_run(name, **NEW)
        for name in ("r1", "r2", "r3"):
            journal.append(name, 1, log(name, 1, b"said"))
            journal.set_state(name, "done")
        journal.flush()

        assert journal.retain().runs == 0
        assert [run.run_id for run in journal.runs()] == ["r3", "r2", "r1"]
        assert [text_of(journal, name) for name in ("r1", "r2", "r3")] == [b"said"] * 3


def test_runs_of_another_host_that_shares_the_folder_are_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path, agent="elsewhere.12345678.1.1") as there:
        there.add_run("r1", **NEW)
    with opened(tmp_path) as journal:
        assert journal.mark_lost() == []
        assert [run.run_id for run in journal.unfinished("elsewhere.12345678.1.1")] == ["r1"]


def test_states_set_times_and_the_first_end_stays(tmp_path: Path) -> None:
    clock = iter(float(at) for at in range(100, 200))
    with opened(tmp_path, clock=lambda: next(clock)) as journal:
        journal.add_run("r1", **NEW)
        journal.set_state("r1", "building")
        journal.set_state("r1", "running")
        journal.append("r1", 7, log("r1", 7, b"x"))
        journal.set_state("r1", "failed", error="ValueError: no")
        journal.set_state("r1", "cancelled")

        run = journal.run("r1")

    assert run is not None
    assert (run.state, run.error) == ("failed", "ValueError: no")
    assert (run.submitted_at, run.started_at, run.finished_at) == (100.0, 102.0, 103.0)
    assert (run.last_seq, run.bytes) == (7, len(log("r1", 7, b"x")))


def test_runs_are_listed_newest_first_and_by_client(journal: Journal) -> None:
    for number in range(5):
        journal.add_run(f"r{number}", **{**NEW, "client_id": f"k{number % 2}"})

    assert [run.run_id for run in journal.runs(limit=2)] == ["r4", "r3"]
    assert [run.run_id for run in journal.runs(client_id="k0")] == ["r4", "r2", "r0"]
    assert journal.run("unknown") is None


@pytest.mark.parametrize("text", ["\ud800 half a pair", "nul \0 inside", "日本語"])
def test_any_text_may_be_a_label(journal: Journal, text: str) -> None:
    """A cell's first line may hold anything that Python reads."""
    journal.add_run("r1", **{**NEW, "label": text})
    journal.set_state("r1", "failed", error=text)

    assert journal.run("r1").state == "failed"


def test_misuse_is_refused(journal: Journal) -> None:
    with pytest.raises(ValueError, match="unknown state 'over'"):
        journal.set_state("r1", "over")
    for seq in (0, -1, 1 << 32):
        with pytest.raises(ValueError, match="event number"):
            journal.append("r1", seq, b"")


def test_the_queue_is_bounded_and_append_waits_for_room(journal: Journal) -> None:
    """Text printed faster than the disk takes it must not fill the memory."""
    journal.add_run("r1", **NEW)
    frame = log("r1", 1, b"x" * 500_000)
    with journal._lock:  # nothing can be written now
        seqs = iter(range(1, 100))
        thread = threading.Thread(target=lambda: [journal.append("r1", seq, frame) for seq in seqs])
        thread.start()
        wait_for(lambda: journal._queued > QUEUE_BYTES)
        time.sleep(0.1)
        assert journal._queued < QUEUE_BYTES + 2 * len(frame)
        assert thread.is_alive()
    thread.join(20)

    assert sum(1 for _ in journal.events("r1")) == 99


def test_a_long_run_loses_output_in_the_middle_only_and_says_so(tmp_path: Path) -> None:
    size = 1 << 20
    with opened(tmp_path, run_bytes=size) as journal:
        journal.add_run("r1", **NEW)
        for seq in range(1, 401):
            if seq % 100 == 50:
                journal.append("r1", seq, encode(Item("r1", [0], seq=seq), [b"value"]))
            else:
                journal.append("r1", seq, log("r1", seq, b"%06d" % seq + b"." * 10_000))
            if seq % 20 == 0:
                journal.flush()
        journal.append("r1", 401, encode(Result("r1", [0], seq=401), [b"end"]))
        journal.set_state("r1", "done")
        kept = messages(journal, "r1")
        run = journal.run("r1")
        text = text_of(journal, "r1")

    seqs = [message.seq for message in kept]
    notes = [message for message in kept if message.type == "log" and message.stream == "stderr"]
    dropped = set(range(1, 402)) - set(seqs)
    assert seqs == sorted(seqs)
    assert seqs[:20] == list(range(1, 21))
    assert seqs[-20:] == list(range(382, 402))
    assert len(notes) == 1
    assert notes[0].seq == max(dropped) + 1, "whoever saw part of what is gone still gets the note"
    assert [message.seq for message in kept if message.type == "item"] == [50, 150, 250, 350]
    assert run.bytes <= size + (1 << 18)
    gone = sum(len(log("r1", seq, b"." * 10_006)) for seq in [*dropped, notes[0].seq])
    assert f"{gone:,} bytes of output are left out".encode() in text


def test_values_are_never_dropped_however_many(tmp_path: Path) -> None:
    with opened(tmp_path, run_bytes=100_000) as journal:
        journal.add_run("r1", **NEW)
        for seq in range(1, 51):
            journal.append("r1", seq, encode(Item("r1", [0], seq=seq), [b"v" * 10_000]))
            journal.flush()

        assert [message.seq for message in messages(journal, "r1")] == list(range(1, 51))


def test_retain_drops_what_is_old_and_then_the_oldest_ended_runs(tmp_path: Path) -> None:
    now = [0.0]
    with opened(tmp_path, clock=lambda: now[0], steady=lambda: now[0]) as journal:
        for number in range(6):
            now[0] = number * 100.0
            journal.add_run(f"r{number}", **NEW)
            journal.append(f"r{number}", 1, log(f"r{number}", 1, b"x" * 10_000), blobs=[f"b{number}"])
            if number != 1:
                journal.set_state(f"r{number}", "done")
        journal.flush()

        by_age = journal.retain(max_age_seconds=250.0)
        by_size = journal.retain(max_age_seconds=1e9, max_bytes=25_000)
        left = journal.runs()
        events = [len(list(journal.events(f"r{number}"))) for number in range(6)]
        blobs = journal.blobs()

    assert (by_age.runs, sorted(by_age.blobs)) == (2, ["b0", "b2"])
    assert (by_size.runs, sorted(by_size.blobs)) == (2, ["b3", "b4"])
    assert [run.run_id for run in left] == ["r5", "r1"], "a run that goes on is kept"
    assert events == [0, 1, 0, 0, 0, 1]
    assert blobs == {"b1", "b5"}


def test_the_disk_gets_its_space_back(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.add_run("r1", **NEW)
        for seq in range(1, 61):
            journal.append("r1", seq, log("r1", seq, b"x" * 500_000))
        journal.set_state("r1", "done")
        journal.flush()
        journal.retain(max_bytes=0)

    assert journal.path.stat().st_size < 12 << 20


def test_the_write_ahead_log_stays_small_under_load(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.add_run("r1", **NEW)
        for seq in range(1, 201):
            journal.append("r1", seq, log("r1", seq, b"x" * 500_000))
        wait_for(lambda: not journal._queue)

        assert Path(f"{journal.path}-wal").stat().st_size < 20 << 20


def test_an_old_event_is_not_written_over(journal: Journal) -> None:
    journal.add_run("r1", **NEW)
    journal.append("r1", 1, log("r1", 1, b"first"))
    journal.append("r1", 1, log("r1", 1, b"second"))

    assert text_of(journal, "r1") == b"first"


# ---------------------------------------------------------------- trouble


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Make the kernel refuse writes beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_stops_no_call_and_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    with opened(tmp_path, on_error=said.append) as journal:
        journal.add_run("before", **NEW)
        with no_file_larger_than(600_000):
            for seq in range(1, 101):
                journal.append("before", seq, log("before", seq, b"x" * 100_000))
            wait_for(lambda: said)
            assert journal.add_run("during", **NEW)
            assert not journal.add_run("during", **NEW), "also then a run is not started twice"
            assert not journal.add_run("before", **NEW)
            for seq in range(1, 301):  # more than the queue holds: it must not wait
                journal.append("during", seq, log("during", seq, b"x" * 100_000))
            journal.set_state("during", "running")
            assert journal._queued < QUEUE_BYTES + (1 << 20)
            assert len(said) == 1
        wait_for(lambda: len(said) == 2)
        journal.append("during", 301, log("during", 301, b"after"))
        run = journal.run("during")

        assert run is not None
        assert run.state == "running"
        assert text_of(journal, "during").endswith(b"after")
    assert "free space" in said[0]
    assert "can be written again" in said[1]


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    """Never a crash loop: the agent starts with an empty journal and keeps the old file."""
    said: list[str] = []
    (tmp_path / "journal-1.sqlite3").write_bytes(b"not a database, but long enough to be one" * 100)

    with opened(tmp_path, on_error=said.append) as journal:
        assert journal.add_run("r1", **NEW)
        assert [run.run_id for run in journal.runs()] == ["r1"]

    (aside,) = tmp_path.glob("journal-1.sqlite3.damaged-*")
    assert aside.read_bytes().startswith(b"not a database")
    assert len(said) == 1
    assert str(aside) in said[0]


def test_damage_that_shows_while_it_is_used_is_survived(tmp_path: Path) -> None:
    said: list[str] = []
    with opened(tmp_path) as journal:
        for number in range(200):
            journal.add_run(f"r{number}", **NEW)
            journal.append(f"r{number}", 1, log(f"r{number}", 1, b"x" * 5_000))
    size = journal.path.stat().st_size
    with journal.path.open("r+b") as file:  # a disk's fault: all pages but the first two hold nonsense
        file.seek(8192)
        file.write(os.urandom(size - 8192))

    with opened(tmp_path, on_error=said.append) as journal:
        journal.runs()
        journal.run("r77")
        list(journal.events("r77"))
        assert journal.add_run("new", **NEW)
        journal.append("new", 1, log("new", 1, b"fine"))

        assert text_of(journal, "new") == b"fine"
        assert [run.run_id for run in journal.runs()] == ["new"]
    assert len(list(tmp_path.glob("*.damaged-*[0-9]"))) == 1
    assert len(said) == 1


def test_a_folder_that_cannot_be_written_stops_no_call(tmp_path: Path) -> None:
    """A file stands where the folder should be: nothing can be opened there, until it is gone."""
    said: list[str] = []
    folder = tmp_path / "root"
    folder.write_bytes(b"")
    with opened(folder, on_error=said.append) as journal:
        assert journal.add_run("r1", **NEW)
        assert not journal.add_run("r1", **NEW)
        journal.append("r1", 1, log("r1", 1, b"kept in the queue"))
        assert journal.runs() == []

        folder.unlink()
        wait_for(lambda: len(said) == 2)

        assert text_of(journal, "r1") == b"kept in the queue"
    assert "cannot be opened" in said[0]


def test_a_read_that_fails_is_an_error_and_not_an_empty_answer(tmp_path: Path) -> None:
    """Half of a run's output must not pass for all of it."""
    with opened(tmp_path) as journal:
        journal.add_run("r1", **NEW)
        journal._file._db.execute("ALTER TABLE events RENAME TO elsewhere")

        with pytest.raises(ResourceError, match="cannot be read"):
            list(journal.events("r1"))
        journal._file._db.execute("ALTER TABLE elsewhere RENAME TO events")


def test_the_files_are_the_users_alone(journal: Journal) -> None:
    journal.add_run("r1", **NEW)

    modes = {path.name: path.stat().st_mode & 0o777 for path in journal.path.parent.iterdir()}

    assert set(modes.values()) == {0o600}
    assert len(modes) == 3


def test_a_run_written_down_by_an_agent_that_was_killed_is_known_as_lost(tmp_path: Path) -> None:
    """The line survives a kill -9 that comes before the group commit; the run must never start twice."""
    path = tmp_path / "journal-1.sqlite3"
    script = (
        "import os, pathlib, sys\n"
        "from fal_agent.server.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "details = dict(client_id='c', label='f', kind='function', environment='[]')\n"
        "assert journal.add_run('r1', **details, again=False)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    [notes] = tmp_path.glob("*.intents")
    with notes.open("ab") as file:
        file.write(b'["r2", "c"')  # a second line, cut short

    journal = Journal(path)
    lost = journal.mark_lost()

    assert [run.run_id for run in lost] == ["r1"]
    assert not journal.add_run("r1", client_id="c", label="f", kind="function", environment="[]")
    assert not list(tmp_path.glob("*.intents"))
    journal.close()
