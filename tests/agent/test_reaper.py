"""Nothing of a worker outlives its agent, and nothing else is ever killed. All with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.server.proc import environment_of, process
from fal_agent.server.reaper import MARK, Reaper, end_worker, marked_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AGENT = Path(__file__).parents[2] / "agent"

# A worker with a child in its group, one in a session of its own, and one that lost the mark as well.
# All ignore SIGTERM if told to. Prints the numbers of all four when they are ready.
WORKER = """
import os, subprocess, sys, time
code = 'import signal, sys, time\\n'
if 'stubborn' in sys.argv: code += 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n'
exec(code)
run = [sys.executable, '-S', '-c', code + 'print("up", flush=True); time.sleep(300)']
children = [
    subprocess.Popen(run, stdout=subprocess.PIPE),
    subprocess.Popen(run, stdout=subprocess.PIPE, start_new_session=True),
    subprocess.Popen(run, stdout=subprocess.PIPE, start_new_session=True, env={}),
]
for child in children: child.stdout.readline()
if 'clobber' in sys.argv:  # as programs do that set their own title: their variables are gone
    os.execve(sys.executable, [sys.executable, '-S', '-c',
        f'import time; print(*{[os.getpid()] + [c.pid for c in children]}, flush=True); time.sleep(300)'], {})
print(os.getpid(), *[child.pid for child in children], flush=True)
if 'leave' in sys.argv: os._exit(0)
time.sleep(300)
"""

# An agent with a reaper and two workers, one of them forgotten again.
AGENT_SCRIPT = """
import subprocess, sys, time
from fal_agent.server.reaper import Reaper
reaper = Reaper(); reaper.start()
def worker(name):
    import os
    process = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'FAL_NOTEBOOK_WORKER': name}, start_new_session=True)
    reaper.watch(process.pid, name)
    return process
kept, forgotten = worker('w-kept-' + sys.argv[2]), worker('w-forgotten-' + sys.argv[2])
print(kept.stdout.readline().strip(), flush=True)
print(forgotten.stdout.readline().strip(), flush=True)
reaper.forget(forgotten.pid)
print(reaper.pid, flush=True)
if 'close' in sys.argv: sys.stdin.readline(); reaper.close(); print('closed', flush=True)
time.sleep(300)
"""


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Process numbers to be ended when the test is over, however it went."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if process(pid) is not None:
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any], what: str = "it did not happen") -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if process(pid) is not None]


def start_worker(started: list[int], worker_id: str, *how: str) -> tuple[subprocess.Popen[str], list[int]]:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, *how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: worker_id},
        start_new_session=True,
    )
    assert worker.stdout is not None
    pids = [int(pid) for pid in worker.stdout.readline().split()]
    assert len(pids) == 4
    started += pids
    return worker, pids


def start_agent(started: list[int], *how: str) -> tuple[subprocess.Popen[str], list[int], list[int], int]:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT_SCRIPT, WORKER, str(os.getpid()), *how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(AGENT)},
    )
    assert agent.stdout is not None
    kept, forgotten, (reaper,) = ([int(pid) for pid in agent.stdout.readline().split()] for _ in range(3))
    started += [agent.pid, *kept, *forgotten, reaper]
    return agent, kept, forgotten, reaper


def finish(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_nothing_of_a_worker_outlives_an_agent_that_is_killed(started: list[int]) -> None:
    """Neither its children, nor one in a session of its own, nor one that lost the mark as well."""
    agent, kept, forgotten, reaper = start_agent(started)
    assert len(alive(kept)) == 4

    finish(agent)

    wait_for(lambda: not alive(kept), f"{alive(kept)} of {kept} live on")
    wait_for(lambda: not alive([reaper]), "the reaper lives on")
    assert len(alive(forgotten)) == 4, "a worker that was forgotten is none of its business"


def test_a_reaper_that_is_killed_comes_back_and_knows_its_workers(started: list[int]) -> None:
    agent, kept, forgotten, reaper = start_agent(started)
    os.kill(reaper, signal.SIGKILL)
    wait_for(lambda: alive([reaper]) == [])
    wait_for(lambda: reapers_of(agent.pid), "no other reaper came")
    started += reapers_of(agent.pid)

    finish(agent)

    wait_for(lambda: not alive(kept), f"{alive(kept)} of {kept} live on")
    assert len(alive(forgotten)) == 4


def reapers_of(agent: int) -> list[int]:
    """Children of the agent that have no mark and run the module."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    children += [
        pid
        for task in Path(f"/proc/{agent}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    return [
        int(pid)
        for pid in set(children)
        if b"fal_agent.server.reaper" in Path(f"/proc/{pid}/cmdline").read_bytes() and process(int(pid))
    ]


def test_a_reaper_cannot_be_stopped_by_what_stops_the_agent(started: list[int]) -> None:
    """Logging out, or Ctrl-C in a terminal, reaches both; the reaper has work left."""
    agent, kept, _, reaper = start_agent(started)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(reaper, number)
    time.sleep(0.2)
    assert alive([reaper]) == [reaper]

    finish(agent)

    wait_for(lambda: not alive(kept))


def test_closing_the_reaper_ends_what_is_still_watched(started: list[int]) -> None:
    agent, kept, forgotten, reaper = start_agent(started, "close")
    assert agent.stdin is not None
    assert agent.stdout is not None

    agent.stdin.write("\n")
    agent.stdin.flush()
    assert agent.stdout.readline() == "closed\n"

    assert alive(kept) == []
    assert alive([reaper]) == []
    assert len(alive(forgotten)) == 4
    finish(agent)


def test_a_reaper_that_never_stays_is_reported_and_not_restarted_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "executable", "/bin/false")
    reaper = Reaper(on_error=said.append)
    reaper.start()

    wait_for(lambda: said)
    reaper.watch(os.getpid(), "w1")
    reaper.forget(os.getpid())
    reaper.close()

    assert "does not stay (exit status 1)" in said[0]
    assert reaper.pid is None


def test_watching_after_the_end_is_harmless() -> None:
    reaper = Reaper()
    reaper.start()
    reaper.close()

    reaper.watch(1, "w1")
    reaper.forget(1)
    reaper.close()


# ---------------------------------------------------------------- ending one worker


def test_a_worker_ends_politely_if_it_can(started: list[int]) -> None:
    """SIGTERM lets it write what it has to; who left the group is killed."""
    worker, pids = start_worker(started, "w1")

    assert end_worker(worker.pid, "w1", 20.0)

    assert worker.wait() == -signal.SIGTERM
    assert alive(pids) == []
    worker.communicate()


@pytest.mark.parametrize("grace", [0.0, 0.3])
def test_a_worker_that_will_not_end_is_killed(started: list[int], grace: float) -> None:
    worker, pids = start_worker(started, "w1", "stubborn")

    assert end_worker(worker.pid, "w1", grace)

    assert alive(pids) == []
    assert worker.wait() == -signal.SIGKILL
    worker.communicate()


def test_what_a_worker_left_behind_is_found_when_it_is_gone(started: list[int]) -> None:
    """Its number is free then, and may be somebody else's: the mark tells."""
    worker, pids = start_worker(started, "w1", "leave")
    worker.communicate()
    assert alive(pids) == pids[1:]

    assert end_worker(worker.pid, "w1", 0.0)

    assert alive(pids[:3]) == []
    assert alive(pids[3:]) == pids[3:], "no mark, no group, no parent: nothing tells whose it is"


def test_a_worker_that_wrote_over_its_variables_is_still_ours(started: list[int]) -> None:
    worker, pids = start_worker(started, "w1", "clobber")
    assert MARK.encode() not in environment_of(worker.pid)

    assert end_worker(worker.pid, "w1", 0.0)

    assert alive(pids) == []
    worker.communicate()


def test_a_group_of_the_same_number_that_came_later_is_left_alone(started: list[int]) -> None:
    """Numbers come round again: what has them now may be anything of the user's."""
    stranger = subprocess.Popen(["sleep", "300"], env={MARK: "w2"}, start_new_session=True)
    started.append(stranger.pid)
    wait_for(lambda: environment_of(stranger.pid) == f"{MARK}=w2".encode() + b"\0")
    began = process(stranger.pid).started

    assert end_worker(stranger.pid, "w1", 0.1), "by the mark"
    assert end_worker(stranger.pid, "w1", 0.1, started=began - 1), "by the start time"
    assert alive([stranger.pid])

    assert end_worker(stranger.pid, "w1", 0.1, started=began)
    assert stranger.wait() == -signal.SIGTERM


def test_a_worker_whose_mark_begins_the_same_is_another(started: list[int]) -> None:
    _, first = start_worker(started, "w1")
    _, other = start_worker(started, "w11")

    end_worker(first[0], "w1", 0.0)

    assert alive(first) == []
    assert alive(other) == other


def test_ending_what_never_was_returns_at_once() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()

    assert end_worker(gone.pid, "w-none", 10.0)


def test_marked_processes_are_listed_by_worker(started: list[int]) -> None:
    """A new agent sees which workers of an earlier one go on."""
    worker_id = f"w-listed-{os.getpid()}"
    _, pids = start_worker(started, worker_id)

    assert sorted(marked_workers()[worker_id]) == sorted(pids[:3])
