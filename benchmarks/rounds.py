"""Run the subjects of a benchmark in rounds, each in processes that are ended afterwards, and report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from timing import Figures

__all__ = ["run_rounds"]

HERE = Path(__file__).parent
DELAY = 50  # milliseconds each way
SUBJECT_SECONDS = 600


def run_rounds(
    about: str,
    subjects: dict[str, list[str]],
    targets: list[report.Target],
    *,
    by_ssh: dict[str, str],
    section: str,
) -> int:
    """Be the command of a benchmark; gives its exit status.

    Args:
        about: what it says of itself.
        subjects: name -> script of this folder and its arguments.
        targets: what is shown first.
        by_ssh: subjects that need an SSH server -> the way to it, "ssh" or "far"; left out without.
        section: where in benchmarks.md its tables stand.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=subjects, default=list(subjects))
    parser.add_argument("--write", type=Path, help="folder of benchmarks.md and the figures")
    arguments = parser.parse_args()
    rounds: list[Figures] = []
    home = tempfile.mkdtemp(prefix="fal-bench-")
    with tempfile.TemporaryDirectory() as folder, ssh_server(Path(folder)) as ways:
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
            figures: Figures = {}
            for name in arguments.only:
                way = by_ssh.get(name)
                if way is None or way in ways:
                    environment = {"FAL_NOTEBOOK_HOME": home, **ways.get(way or "", {})}
                    figures |= measure(name, subjects[name], environment)
            rounds.append(figures)
    shutil.rmtree(home, ignore_errors=True)  # the agent that still uses it ends when it is gone
    print("\n" + report.markdown(rounds, targets))
    if arguments.write:
        report.write(arguments.write, section, rounds, targets)
    return 0


def measure(name: str, command: list[str], environment: dict[str, str]) -> Figures:
    """Run one subject for one round: a script of this folder with its arguments.

    Gives nothing if it failed, after saying why.
    """
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=SUBJECT_SECONDS)
        except subprocess.TimeoutExpired:
            output, errors = "", f"{name} took longer than {SUBJECT_SECONDS} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing of the group is left: the usual case
                os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in output.splitlines() if line.startswith('{"figures"')]
    if not lines:
        print(f"  {name:14} failed:\n{errors[-3000:]}", flush=True)
        return {}
    print(f"  {name:14} {time.monotonic() - started:6.1f} s", flush=True)
    figures: Figures = json.loads(lines[-1])["figures"]
    return figures


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[dict[str, dict[str, str]]]:
    """An SSH server on loopback, near and behind a slow link: what each subject needs in its environment."""
    import pytest

    sys.path.append(str(HERE.parent / "tests"))
    from support.sshd import start_sshd

    try:
        server: Any = start_sshd(folder / "sshd", name="gpu-box")
    except pytest.skip.Exception as reason:
        print(f"  without SSH: {reason}", flush=True)
        yield {}
        return
    near = {"FAL_SSH_CONFIG": str(server.config_path), "BENCH_PUBLIC": str(server.public)}
    try:
        with slow_link(server, folder) as config:
            yield {"ssh": near, **({"far": {**near, "FAL_SSH_CONFIG": str(config)}} if config else {})}
    finally:
        server.stop()


@contextlib.contextmanager
def slow_link(server: Any, folder: Path) -> Iterator[Path | None]:
    """An SSH configuration that reaches the same server over a link with a delay; None if it cannot be."""
    command = [sys.executable, str(HERE / "slow_link.py"), str(DELAY), str(server.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as link:
        line = link.stdout.readline() if link.stdout else ""
        if not line:
            print("  without the slow link: it needs root, ip and /dev/net/tun", flush=True)
            yield None
            return
        address, port = line.split()
        known = folder / "far_known_hosts"
        known.write_text(f"[{address}]:{port} {server.host_key}\n")
        config = folder / "far_config"
        block = server.host_block.replace("127.0.0.1", address).replace(str(server.known_hosts), str(known))
        config.write_text(block.replace(f"Port {server.port}", f"Port {port}"))
        yield config
