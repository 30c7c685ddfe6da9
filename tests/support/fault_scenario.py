"""Scripted runs of the fault suite: drawn from a seed, played on a `FaultBed`, and judged.

What may not happen has six names: a run is `lost` (nothing is known of it, or it failed without a fault
that explains it), a result is `wrong`, a call ran `twice`, `events` are missing or repeated, a process is an
`orphan`, something `hangs`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import support
from support.fault_bed import FAR, NEAR
from support.fault_client import KINDS, expected_text, expected_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.fault_bed import FaultBed

__all__ = ["COUNTS", "Scenario", "draw", "play", "prepare"]

COUNTS = ("lost", "wrong", "twice", "events", "orphan", "hang")

_SINGLE = ("lines", "burst", "items", "large", "cell")  # kinds that are one run, which one may come back to
_ENDINGS = ("agent", "worker")  # faults after which a run may be told to be lost
_PATIENCE = 100.0  # seconds after the last fault in which everything must have come to its end
_SIZES = {  # of each kind: how much, and at what pace in seconds
    "lines": (60, 0.03),
    "burst": (20_000, 1.0),
    "items": (60, 0.03),
    "large": (20, 0.05),
    "cell": (60, 0.03),
    "brief": (300, 0.0),
    "map": (24, 0.0),
}


@dataclass(frozen=True)
class Fault:
    """One fault: what, when, and for how long.

    Attributes:
        what: see `FaultBed.can`.
        at: seconds after the calls have begun, or after the notebook was started.
        lasts: seconds.
        early: the time counts from the start of the notebook.
    """

    what: str
    at: float
    lasts: float
    early: bool


@dataclass
class Scenario:
    """A scripted run.

    Attributes:
        token: marks its calls.
        waits: the notebook waits for the call in its main thread.
    """

    token: str
    kind: str
    waits: bool
    faults: list[Fault]
    found: list[tuple[str, str]] = field(default_factory=list)  # which count, and what was seen

    def blame(self, count: str, what: str) -> None:
        self.found.append((count, what))

    @property
    def has(self) -> set[str]:
        """The faults' names."""
        return {fault.what for fault in self.faults}


def draw(seed: str, can: list[str], *, longest_cut: float) -> Scenario:
    """Make the script that a seed stands for.

    Args:
        seed: also marks the calls.
        can: faults that are possible.
        longest_cut: seconds for which the network may be gone.
    """
    chance = random.Random(seed)
    kind = chance.choice(KINDS)
    possible = [what for what in can if what != "kernel" or kind in (*_SINGLE, "map", "brief")]
    faults = []
    for what in sorted(chance.sample(possible, chance.choice((1, 1, 1, 2, 2, 3)))):
        lasts = {
            "cut": chance.uniform(1, longest_cut),
            "sshd": chance.uniform(0.1, 3),
            "disk": chance.uniform(0.5, 4),
        }.get(what, 0.0)
        faults.append(Fault(what, chance.uniform(0, 2.0), lasts, early=chance.random() < 0.2))
    token = "t" + "".join(c if c.isalnum() else "_" for c in seed)
    return Scenario(token, kind, chance.random() < 0.5, sorted(faults, key=lambda fault: fault.at))


def prepare(bed: FaultBed, folder: Path) -> None:
    """Build the environments of all kinds of calls, by the way without faults: the other has no internet."""
    for kind in ("lines", "cell"):
        plan = {"kind": kind, "token": f"prepare_{kind}", "count": 1, "pause": 0.0, "waits": True}
        notebook = _Notebook(bed, folder, {**plan, "host": NEAR, "effects": str(bed.effects)}, kind)
        assert notebook.waited(_PATIENCE)
        assert notebook.report[0][:2] == ["value", "run"], notebook.report


def play(bed: FaultBed, scenario: Scenario, folder: Path) -> None:
    """Play a script and judge it; what should not be is in `scenario.found` afterwards."""
    _Play(bed, scenario, folder).go()


class _Notebook:
    """A client process with its files."""

    def __init__(self, bed: FaultBed, folder: Path, plan: dict[str, Any], name: str) -> None:
        self.text_path, self.report_path = folder / f"{name}.out", folder / f"{name}.report"
        self.report_path.touch()
        plan = {**plan, "report": str(self.report_path)}
        variables = os.environ | bed.environment
        variables["PYTHONPATH"] = os.pathsep.join(
            [str(Path(support.__path__[0]).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        with self.text_path.open("wb") as out, (folder / f"{name}.err").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "support.fault_client", json.dumps(plan)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=variables,
            )

    @property
    def text(self) -> str:
        return self.text_path.read_text()

    @property
    def report(self) -> list[list[str]]:
        lines = self.report_path.read_text().splitlines(keepends=True)
        return [line.rstrip("\n").split(" ", 2) for line in lines if line.endswith("\n")]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def waited(self, seconds: float) -> bool:
        """Whether it ended in time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


class _Play:
    def __init__(self, bed: FaultBed, scenario: Scenario, folder: Path) -> None:
        self.bed, self.scenario, self.folder = bed, scenario, folder
        self.hit: set[str] = set()  # faults that met something
        self.was_killed = False

    def go(self) -> None:
        scenario = self.scenario
        count, pause = _SIZES[scenario.kind]
        self.plan = {
            "kind": scenario.kind,
            "token": scenario.token,
            "count": count,
            "pause": pause,
            "effects": str(self.bed.effects),
            "host": FAR,
            "waits": scenario.waits,
        }
        if "slow" in scenario.has and self.bed.link is not None:
            self.bed.link.shape(delay=0.02, loss=0.05)
        first = _Notebook(self.bed, self.folder, self.plan, "first")
        try:
            self.befall(first)
            self.end(first)
        finally:
            if first.process.poll() is None:
                first.kill()
            self.bed.heal()
        self.judge_processes()

    # ------------------------------------------------------------ the faults

    def befall(self, notebook: _Notebook) -> None:
        """Let the faults happen, and end, each at its time; all in this thread, whose end would end sshd."""
        started = now = time.monotonic()
        agenda: list[tuple[float, Callable[[], object]]] = []
        late = [fault for fault in self.scenario.faults if not fault.early]
        for fault in (fault for fault in self.scenario.faults if fault.early):
            agenda += self.acts(fault, notebook, started)
        while agenda or late:
            now = time.monotonic()
            if late and (self.bed.marks(self.scenario.token) or notebook.process.poll() is not None):
                for fault in late if notebook.process.poll() is None else ():
                    agenda += self.acts(fault, notebook, now)
                late = []
            due = [act for act in agenda if act[0] <= now]
            agenda = [act for act in agenda if act[0] > now]
            for _, do in sorted(due, key=lambda act: act[0]):
                do()
            if now > started + 2 * _PATIENCE:
                self.scenario.blame("hang", "the calls never began")
                return
            time.sleep(0.01)

    def acts(
        self, fault: Fault, notebook: _Notebook, start: float
    ) -> list[tuple[float, Callable[[], object]]]:
        """What a fault does, and when."""
        bed, begin, end = self.bed, start + fault.at, start + fault.at + fault.lasts
        slow = {"delay": 0.02, "loss": 0.05} if "slow" in self.scenario.has else {}
        if fault.what == "sshd":
            return [(begin, bed.far.stop_listening), (end, partial(bed.far.restart, wait=False))]
        if fault.what == "cut":
            assert bed.link is not None
            shape = bed.link.shape
            return [(begin, partial(shape, **slow, cut=True)), (end, partial(shape, **slow))]
        if fault.what == "disk":
            return [(begin, bed.fill_disk), (begin, partial(self.hit.add, "disk")), (end, bed.empty_disk)]
        do = {
            "kernel": partial(self.kill_kernel, notebook),
            "link": bed.break_link,
            "agent": self.kill_agent,
            "worker": self.kill_worker,
        }
        return [(begin, do[fault.what])] if fault.what in do else []

    def kill_kernel(self, notebook: _Notebook) -> None:
        if notebook.process.poll() is None:
            self.was_killed = True
            notebook.kill()

    def kill_agent(self) -> None:
        if self.bed.kill_agent():
            self.hit.add("agent")

    def kill_worker(self) -> None:
        if self.bed.kill_worker(self.scenario.token):
            self.hit.add("worker")

    # ------------------------------------------------------------ the ends

    def end(self, first: _Notebook) -> None:
        """Wait for what the notebook, or the one after it, gets to see, and judge it."""
        if not self.was_killed:
            if not first.waited(_PATIENCE):
                self.blame_hang(first)
                return
            self.judge(first, first.report)
            return
        records = self.settled()
        if self.scenario.kind not in _SINGLE:
            self.judge_effects(first.report)
            return
        if not records:
            if self.bed.marks(self.scenario.token):
                self.scenario.blame("lost", "it ran, and the host knows nothing of it")
            return
        again = _Notebook(self.bed, self.folder, {**self.plan, "run_id": records[0]["run_id"]}, "again")
        if not again.waited(_PATIENCE):
            again.kill()
            self.blame_hang(again)
            return
        self.judge(again, again.report)

    def blame_hang(self, notebook: _Notebook) -> None:
        """Say where a notebook stands."""
        stacks = notebook.text_path.with_suffix(".err").read_text()
        what = f"{notebook.text_path.stem}: reported {notebook.report[-3:]}, printed {notebook.text[-80:]!r}"
        self.scenario.blame("hang", f"{what}; {self.records()};\n{stacks}\n{self.bed.agent_log()}")

    def records(self) -> list[dict[str, Any]]:
        """What the host knows of the calls."""
        labels = (self.scenario.token, f"token = '{self.scenario.token}'")
        return [run for run in self.bed.ask("runs", limit=1000) if run["label"] in labels]

    def settled(self) -> list[dict[str, Any]]:
        """The same, when all have come to their ends."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            records = self.records()
            going_on = [run for run in records if run["finished_at"] is None]
            if not going_on:
                return records
            if time.monotonic() > deadline:
                self.scenario.blame("hang", f"runs go on: {going_on}")
                return records
            time.sleep(0.1)

    # ------------------------------------------------------------ the judgement

    def judge(self, notebook: _Notebook, report: list[list[str]]) -> None:
        """Look at what a notebook that was not killed saw."""
        if not report or report[-1] != ["end"]:
            errors = notebook.text_path.with_suffix(".err").read_text()
            self.scenario.blame("lost", f"the notebook ended by itself: {errors[-1500:]}")
            return
        failed = self.judge_values(report)
        self.judge_effects(report)
        wanted = expected_text(self.scenario.kind, self.scenario.token, self.plan["count"])
        text = notebook.text
        if failed and not wanted.startswith(text.rstrip("\n") if failed else text):
            self.scenario.blame("events", f"output before the end: {_difference(text, wanted)}")
        elif not failed and text != wanted:
            self.scenario.blame("events", _difference(text, wanted))

    def judge_values(self, report: list[list[str]]) -> bool:
        """Compare values; whether a call failed that was allowed to."""
        wanted = expected_values(self.scenario.kind, self.scenario.token, self.plan["count"])
        values = {words[1]: words[2] for words in report if words[0] == "value"}
        errors = {words[1]: words[2] for words in report if words[0] == "error"}
        for key, value in values.items():
            if wanted.get(key) != value:
                self.scenario.blame("wrong", f"{key}: {value!r} instead of {wanted.get(key)!r}")
        for key, error in errors.items():
            if not self.is_explained(error):
                self.scenario.blame("lost", f"{key}: {error}")
        missing = set(wanted) - set(values) - set(errors)
        if missing and not ("run" in errors and self.scenario.kind == "items"):
            self.scenario.blame("lost", f"nothing was told of {sorted(missing)[:5]}")
        repeated = [words[1] for words in report if words[0] == "value"]
        if len(repeated) != len(set(repeated)):
            self.scenario.blame("events", "an item came twice")
        return bool(errors)

    def is_explained(self, error: str) -> bool:
        """Whether a fault accounts for an error."""
        kind = error.split(" ", 1)[0]
        if kind == "WorkerLostError":
            return bool(self.hit & set(_ENDINGS))
        if kind == "HostUnreachableError":  # there was no connection yet
            return any(fault.early for fault in self.scenario.faults)
        return "disk" in self.hit and ("No space left" in error or "there is room for" in error)

    def judge_effects(self, report: list[list[str]]) -> None:
        """Nothing ran twice, what gave a value ran, and the host's record agrees."""
        marks = self.bed.marks(self.scenario.token)
        for key in set(marks):
            if marks.count(key) > 1:
                self.scenario.blame("twice", f"{key} ran {marks.count(key)} times")
        values = {words[1] for words in report if words[0] == "value"}
        ran = {"run"} & values if self.scenario.kind in _SINGLE else values
        if not ran <= set(marks):
            self.scenario.blame("wrong", f"values of {sorted(ran - set(marks))[:5]}, which never ran")
        records = self.settled()
        done = [run for run in records if run["state"] == "done"]
        if len(done) < len(ran) and "agent" not in self.hit:  # it had told, and not recorded yet
            self.scenario.blame("lost", f"{len(ran)} values, {len(done)} runs that are recorded as done")
        odd = [run for run in records if run["state"] not in ("done", "lost", "failed")]
        unexplained = [
            run
            for run in records
            if run["state"] in ("lost", "failed") and not self.hit & {*_ENDINGS, "disk"}
        ]
        if odd or unexplained:
            self.scenario.blame("lost", f"recorded as {(odd + unexplained)[0]}")

    def judge_processes(self) -> None:
        """Wait until only the agent and idle workers that it knows are left."""
        deadline = time.monotonic() + 20
        while orphans := self.bed.orphans():
            if time.monotonic() > deadline:
                words = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in orphans]
                self.scenario.blame("orphan", str(words))
                return
            time.sleep(0.1)


def _difference(text: str, wanted: str) -> str:
    lines, right = text.splitlines(), wanted.splitlines()
    pairs = enumerate(zip(lines, right, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(lines), len(right)))
    there, due = lines[at : at + 3], right[at : at + 3]
    return f"line {at}: {there} instead of {due}; {len(lines)} lines of {len(right)}"
