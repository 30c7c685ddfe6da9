"""Programs that end with this process, however that ends; among them an agent for keys unlocked here.

Runs in the notebook; standard library only. The agent is for users who have none, so that `ssh` need not ask
for a passphrase again when a connection is made again; keys are in its memory alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

__all__ = ["agent_environment", "is_agent_ours", "start_kept"]

# Ends a program when this process is gone, which closes the standard input, and leaves no folder behind.
_KEEPER = """
folder=$1; shift
exec 3<&0
"$@" </dev/null 3<&- &
kept=$!
{ read -r _; kill "$kept"; } <&3 2>/dev/null &
watch=$!
exec 3<&-
wait "$kept"; status=$?
kill "$watch" 2>/dev/null
rm -rf "$folder"
exit "$status"
"""

_START_SECONDS = 5.0
_lock = threading.Lock()
_agent: tuple[subprocess.Popen[bytes], Path] | None = None


def start_kept(
    command: list[str], folder: Path, environment: dict[str, str], errors: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a program that ends with this process, or when the standard input given back is closed.

    Args:
        command: the program and its arguments.
        folder: a private one of the program's, which is removed after its end.
        environment: variables beside this process's own.
        errors: where its standard error goes.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "sh", str(folder), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={**os.environ, **environment},
        start_new_session=True,  # an interrupt in the terminal is not meant for it, nor is the terminal
    )


def is_agent_ours() -> bool:
    """Whether unlocked keys go to an agent of this process, because the user has none."""
    return "SSH_AUTH_SOCK" not in os.environ and shutil.which("ssh-agent") is not None


def agent_environment() -> dict[str, str]:
    """Give the variables by which `ssh` finds this process's agent, started if need be; none without."""
    global _agent  # noqa: PLW0603 - one per process
    if not is_agent_ours():
        return {}
    with _lock:
        if _agent is None or _agent[0].poll() is not None:
            folder = Path(tempfile.mkdtemp(prefix="fal-ssh-"))
            path = folder / "agent"
            process = start_kept(["ssh-agent", "-D", "-a", str(path)], folder, {}, subprocess.DEVNULL)
            deadline = time.monotonic() + _START_SECONDS
            while not path.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            _agent = process, path
        return {"SSH_AUTH_SOCK": str(_agent[1])}
