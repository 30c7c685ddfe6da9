"""Real processes that are killed: notebooks, agents and links, each with a host folder of its own."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.fault_scenario import COUNTS
from support.sshd import SSHServer, start_sshd
from support.waiting import until

from fal_notebook.hosts.local import LocalHost
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED = os.environ.get("FAL_FAULT_SEED", "1")  # of the scripted runs
IDLE = "1"  # seconds after which an agent of these tests ends


class Kernel:
    """A notebook's process, whose output is read all the time."""

    def __init__(self, source: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self._lines.put(line)

    def says(self, word: str, *, timeout: float = 30.0) -> str:
        """Wait for a line that begins with a word; gives its rest."""
        while not (line := self._lines.get(timeout=timeout)).startswith(f"{word} "):
            pass
        return line.removeprefix(f"{word} ").rstrip()

    def kill(self) -> None:
        """End it as the OOM killer does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=20)
        self._reader.join(timeout=20)


@dataclass
class Bed:
    """A folder that holds one host's everything, and the processes that belong to it."""

    root: Path
    kernels: list[Kernel] = field(default_factory=list)
    hosts: list[LocalHost] = field(default_factory=list)

    def host(self) -> LocalHost:
        """A connection of this process to the host, which starts its agent when asked."""
        host = LocalHost("bench")
        self.hosts.append(host)
        return host

    def kernel(self, source: str) -> Kernel:
        """Start a notebook's process that runs a script."""
        kernel = Kernel(source)
        self.kernels.append(kernel)
        return kernel

    def processes(self) -> list[int]:
        """The agent, its helpers, the workers and their children that are alive."""
        mark = os.fsencode(self.root)
        ours = {os.getpid(), *(kernel.process.pid for kernel in self.kernels)}
        return [pid for pid in _pids() if pid not in ours and mark in _words(pid)]

    def clear(self) -> None:
        """End everything that is left; tests end their own."""
        for kernel in self.kernels:
            kernel.kill()
        for host in self.hosts:
            host.close()
        for pid in self.processes():
            with suppress(ProcessLookupError):  # it may end by itself in this very moment
                os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def _words(pid: int) -> bytes:
    """Command line and environment of a process; nothing of one that is dead or another user's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    """A host folder of the test's own; afterwards none of its processes may be left."""
    root = Path(tempfile.mkdtemp(prefix="fal-faults-")) / "root"
    monkeypatch.setenv("FAL_NOTEBOOK_HOME", str(root))
    monkeypatch.setenv("FAL_NOTEBOOK_IDLE", IDLE)
    bed = Bed(root)
    yield bed
    bed.clear()
    shutil.rmtree(root.parent, ignore_errors=True)


@pytest.fixture
def nothing_is_left(bed: Bed) -> Callable[[], None]:
    """Wait until no process of the host is alive; fails if one stays."""

    def check() -> None:
        for host in bed.hosts:
            host.close()
        until(lambda: not bed.processes())

    return check


@pytest.fixture(scope="module")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    """An OpenSSH server of this module's own, whose connections may be broken."""
    server = start_sshd(tmp_path_factory.mktemp("sshd"), name="far-box")
    root = server.home / ".fal_notebook" / f"faults-{os.getpid()}"  # other tests have theirs
    settings = tmp_path_factory.mktemp("config")
    (settings / "hosts.toml").write_text(f'[hosts.far-box]\nroot = "~/.fal_notebook/{root.name}"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_SSH_CONFIG", str(server.config_path))
        patch.setenv("FAL_NOTEBOOK_CONFIG", str(settings))
        yield server
        host = SSHHost("far-box")
        host.ask("shutdown")
        host.close()
    server.stop()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user of this machine can write to."""
    folder = Path(tempfile.mkdtemp(prefix="fal-shared-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the scripted runs came to."""
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    counts = [dict(report.user_properties)["faults"] for report in reports if report.user_properties]
    if counts:
        found = [name for names in counts for name in names]
        told = ", ".join(f"{name} {found.count(name)}" for name in COUNTS)
        terminalreporter.write_line(f"{len(counts)} scripted runs, seed {SEED}: {told}")
