"""Links that the OpenSSH program carries, for what paramiko cannot do or where the user chose it.

Runs in the notebook; the only file that runs `ssh`. One `ssh` per link logs in and stays, as a ControlMaster
of ours alone: its socket is in a private folder, and it ends with this process however that ends.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fal_agent.errors import ConfigurationError, HostUnreachableError
from fal_notebook.hosts import openssh_mux as mux
from fal_notebook.hosts.askpass import Askpass
from fal_notebook.hosts.keeper import agent_environment, is_agent_ours, start_kept
from fal_notebook.hosts.openssh_errors import login_error
from fal_notebook.hosts.ssh_config_files import config_files, ssh_words
from fal_notebook.hosts.ssh_link import SSHLink
from fal_notebook.prompting import SilentPrompt, default_prompt

if TYPE_CHECKING:
    from fal_notebook.hosts.openssh_mux import MuxSession, MuxStream
    from fal_notebook.prompting import Prompt

__all__ = ["open_link"]

ALIVE_INTERVAL, ALIVE_COUNT = 5, 3  # seconds, and how many of them without a sign of life are the end
ANSWER_TIMEOUT = 180.0  # seconds in which a person may touch a key, or a server think
HELLO_TIMEOUT = 10.0  # seconds
_TICK = 0.01  # seconds between two looks at whether the login is done
_ENDING_SECONDS = 2.0
_MAX_FOLDER = 50  # bytes; a socket's path may have 107, and `ssh` adds 17 to it while it makes one


def open_link(
    name: str, *, prompt: Prompt | None = None, ssh_config: Path | None = None, timeout: float = 15.0
) -> SSHLink:
    """Connect by `ssh NAME`; arguments and errors as `fal_notebook.hosts.paramiko_link.open_link`."""
    return SSHLink(_connect(name, prompt or default_prompt(), config_files(ssh_config), timeout))


class _Master:
    """A running `ssh` that is logged in; what a link is carried by."""

    def __init__(
        self, name: str, label: str, process: subprocess.Popen[bytes], control: str, errors: IO[bytes]
    ) -> None:
        self.name, self.label = name, label
        self._process, self._control, self._errors = process, control, errors
        self._forwards = mux.Forwards(control, str(Path(control).parent), self._lost)
        self._closed_here = False
        self._last_words = ""

    def is_active(self) -> bool:
        """Whether the process lives; it ends with the connection."""
        return self._process.poll() is None

    def open_session(self, command: str, *, timeout: float) -> MuxSession:
        """Run a line in the user's login shell."""
        return mux.open_session(self._control, command, lost=self._lost, timeout=timeout)

    def open_unix(self, path: str, *, timeout: float) -> MuxStream:
        """Connect to a Unix socket of the machine."""
        return self._forwards.open(path, timeout)

    def why_lost(self) -> str:
        """Say in a few words how it ended."""
        if self._closed_here:
            return "the connection was closed here"
        said = self.words().splitlines()
        return f"the connection broke: {said[-1].rstrip('.')}" if said else "the connection broke"

    def words(self) -> str:
        """What `ssh` has written, the last 4 kB."""
        try:
            descriptor = self._errors.fileno()
        except ValueError:  # closed, perhaps just now by another thread
            return self._last_words
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, 4096, max(0, size - 4096)).decode("utf-8", "replace").strip()

    def close(self) -> None:
        """End the process, and with it everything opened through it."""
        self._closed_here = self._closed_here or self.is_active()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._process.stdin.close()
        try:
            self._process.wait(timeout=_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # the group is its own
            self._process.wait()
            shutil.rmtree(Path(self._control).parent, ignore_errors=True)
        self._last_words = self.words()
        self._errors.close()

    def status(self) -> int | None:
        """How the process ended; None while it lives."""
        return self._process.poll()

    def is_ready(self) -> bool:
        """Whether the login is done."""
        return Path(self._control).exists() and mux.is_served(self._control, HELLO_TIMEOUT)

    def _lost(self) -> str | None:
        if self.is_active() and mux.is_served(self._control, HELLO_TIMEOUT):
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it is stuck, which is as good as lost
            self._process.wait(timeout=_ENDING_SECONDS)
        return self.why_lost()


def _private_folder() -> Path:
    """Make a folder whose path is short enough for a socket in it, which `ssh` makes under a longer name."""
    base = tempfile.gettempdir()
    is_short = len(os.fsencode(base)) <= _MAX_FOLDER
    return Path(tempfile.mkdtemp(prefix="fal-ssh-", dir=base if is_short else "/tmp"))  # noqa: S108 - a new one


def _connect(name: str, prompt: Prompt, files: list[Path], timeout: float) -> _Master:
    label = repr(name)
    program = shutil.which("ssh")
    if program is None:
        raise ConfigurationError(f"{label}: there is no `ssh` program here. Install the OpenSSH client")
    words = ssh_words(name, files)
    folder = _private_folder()
    askpass = None if isinstance(prompt, SilentPrompt) else Askpass(folder, prompt)
    try:
        master = _start([program, *_options(folder, timeout, asking=askpass is not None), *words], folder,
                        askpass, (name, label))  # fmt: skip
        try:
            _log_in(master, askpass)
        except BaseException:  # also when the person interrupts a prompt
            master.close()
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if askpass is not None:
            askpass.close()
    status = master.status()
    if status is not None:
        master.close()
        raise login_error(label, name, shlex.join(["ssh", *words]), status, master.words())
    return master


def _options(folder: Path, timeout: float, *, asking: bool) -> list[str]:
    settings = {
        "AddKeysToAgent": "yes" if is_agent_ours() else None,
        "BatchMode": None if asking else "yes",
        "ClearAllForwardings": "yes",
        "ConnectTimeout": f"{max(timeout, 1):.0f}",
        "ControlMaster": "yes",
        "ControlPath": str(folder / "s"),
        "ControlPersist": "no",
        "ForwardAgent": "no",
        "LogLevel": "INFO",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "ServerAliveCountMax": str(ALIVE_COUNT),
        "ServerAliveInterval": str(ALIVE_INTERVAL),
    }
    return ["-N", "-T", "-x", *(f"-o{key}={value}" for key, value in settings.items() if value is not None)]


def _start(command: list[str], folder: Path, askpass: Askpass | None, names: tuple[str, str]) -> _Master:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    environment = {**agent_environment(), **(askpass.environment if askpass is not None else {})}
    process = start_kept(command, folder, environment, errors)
    return _Master(*names, process, str(folder / "s"), errors)


def _log_in(master: _Master, askpass: Askpass | None) -> None:
    """Answer what is asked until `ssh` is logged in or has ended."""
    deadline = time.monotonic() + ANSWER_TIMEOUT
    while master.status() is None and not master.is_ready():
        if askpass is None:
            time.sleep(_TICK)
        elif askpass.answer(_TICK):
            deadline = time.monotonic() + ANSWER_TIMEOUT
        if time.monotonic() > deadline:
            raise HostUnreachableError(
                f"{master.label}: ssh was not logged in after {ANSWER_TIMEOUT:g} s. The machine may be "
                "overloaded; try again"
            )
