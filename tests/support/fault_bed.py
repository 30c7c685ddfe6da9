"""A host for the fault suite: a real sshd in a network of its own, its data on a small disk of its own.

What can be made depends on the machine: without /dev/net/tun the server listens on loopback and the network
cannot be cut; without the right to mount the data is on the common disk and cannot be full.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent.errors import LinkLostError
from fal_notebook.hosts.ssh import SSHHost
from support.shaped_link import ShapedLink
from support.sshd import start_sshd
from support.waiting import is_alive, until

if TYPE_CHECKING:
    from support.sshd import SSHServer

__all__ = ["FAR", "NEAR", "FaultBed"]

FAR, NEAR = "far-box", "near-box"  # the same host: over the network that has faults, and beside it
_DISK = 400 << 20  # bytes; blobs leave half of that free
_AGENT, _REAPER, _WORKER = b"fal_agent\0serve", b"fal_agent.server.reaper", b"fal_agent.worker"


class FaultBed:
    """The host, and what can befall it.

    Args:
        folder: for keys, logs and settings of ours.

    Attributes:
        host: leads there by the way that has no faults.
        environment: variables for the processes of notebooks.
        can: the faults that are possible here.
    """

    def __init__(self, folder: Path) -> None:
        self.link = ShapedLink() if ShapedLink.is_possible() else None
        self.shared = Path(tempfile.mkdtemp(prefix="fal-faults-"))
        self.shared.chmod(0o777)
        self.effects = self.shared / "effects"
        self.effects.touch()
        self.effects.chmod(0o666)
        self.far, self.near = self._servers(folder)
        self.root = self._disk()
        self._filling = self.root / ".filling"
        settings = folder / "config"
        settings.mkdir()
        (settings / "hosts.toml").write_text(
            "".join(f'[hosts.{name}]\nroot = "{self.root}"\n' for name in (FAR, NEAR))
        )
        config = folder / "ssh_config"
        config.write_text(self.far.host_block + self.near.host_block)
        self.environment = {"FAL_SSH_CONFIG": str(config), "FAL_NOTEBOOK_CONFIG": str(settings)}
        self._outside = {key: os.environ.get(key) for key in self.environment}
        os.environ.update(self.environment)
        self.host = SSHHost(NEAR)

    @property
    def can(self) -> list[str]:
        return [
            *("kernel", "link", "sshd", "agent", "worker"),
            *(("cut", "slow") if self.link is not None else ()),
            *(("disk",) if self.root.is_mount() else ()),
        ]

    def _servers(self, folder: Path) -> tuple[SSHServer, SSHServer]:
        address = self.link.there if self.link is not None else "127.0.0.1"
        prefix = tuple(self.link.prefix) if self.link is not None else ()
        far = start_sshd(folder / FAR, name=FAR, address=address, prefix=prefix)
        return far, start_sshd(folder / NEAR, name=NEAR)

    def _disk(self) -> Path:
        root = Path(tempfile.mkdtemp(prefix="fal-faults-root-"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "fal-faults", root]
        subprocess.run(mount, check=False, capture_output=True)
        shutil.chown(root, self.far.user)
        root.chmod(0o700)
        return root

    # ------------------------------------------------------------ what can befall it

    def break_link(self) -> None:
        """Both processes of each SSH connection die."""
        self.far.kill_connections()

    def kill_agent(self) -> bool:
        """Whether there was one."""
        killed = [_kill(pid) for pid in self.agents()]
        return any(killed)

    def kill_worker(self, token: str) -> bool:
        """Kill the processes that have run calls with a token; whether one lived."""
        killed = [_kill(pid) for pid in set(self.pids(token)) & set(self.processes())]
        return any(killed)

    def fill_disk(self) -> None:
        """Leave no byte free on the host's disk."""
        for size in (1 << 20, 1):
            with suppress(OSError), self._filling.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(size))

    def empty_disk(self) -> None:
        """Undo `fill_disk`."""
        self._filling.unlink()

    def heal(self) -> None:
        """Take every lasting fault away."""
        if self.link is not None:
            self.link.shape()

    # ------------------------------------------------------------ what is there

    def ask(self, question: str, **arguments: Any) -> Any:
        """Ask the agent, which may be killed just now."""
        try:
            return self.host.ask(question, **arguments)
        except LinkLostError:
            return self.host.ask(question, **arguments)

    def marks(self, token: str) -> list[str]:
        """What calls with a token left, one entry for each time that one ran."""
        found = (line.split() for line in self.effects.read_text().splitlines())
        return [words[1] for words in found if len(words) == 3 and words[0] == token]

    def pids(self, token: str) -> list[int]:
        """Workers that ran calls with a token."""
        found = (line.split() for line in self.effects.read_text().splitlines())
        return [int(words[2]) for words in found if len(words) == 3 and words[0] == token]

    def processes(self) -> list[int]:
        """Everything that runs for this host: the agent, its helpers, workers and their children."""
        mark = os.fsencode(self.root)
        found = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
        return [pid for pid in found if pid != os.getpid() and mark in _words(pid) and is_alive(pid)]

    def agents(self) -> list[int]:
        """Agents that live."""
        return [pid for pid in self.processes() if _AGENT in _command(pid)]

    def orphans(self) -> list[int]:
        """Processes that no agent knows of."""
        if not self.agents():
            return [pid for pid in self.processes() if _REAPER not in _command(pid)]
        workers = {worker["pid"] for worker in self.ask("status")["workers"]}
        known = (_AGENT, _REAPER, b"fal_agent\0dial", b"fal_agent\0start")
        return [
            pid
            for pid in self.processes()
            if pid not in workers and not any(word in _command(pid) for word in known)
        ]

    def agent_log(self) -> str:
        """The end of what the agents wrote."""
        return "\n".join(path.read_text()[-3000:] for path in self.root.glob("run/*/agent.log"))

    def close(self) -> None:
        """End the host; nothing of it may be left.

        Raises:
            AssertionError: a process goes on.
        """
        try:
            self.host.ask("shutdown")
            self.host.close()
            until(lambda: not self.processes())
        finally:
            for pid in self.processes():
                _kill(pid)
            for server in (self.far, self.near):
                server.stop()
            if self.link is not None:
                self.link.close()
            if self.root.is_mount():
                subprocess.run(["umount", "-l", self.root], check=True)
            for folder in (self.root, self.shared):
                shutil.rmtree(folder, ignore_errors=True)
            for name, value in self._outside.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    return True


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _words(pid: int) -> bytes:
    try:
        return _command(pid) + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
