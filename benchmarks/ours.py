"""fal_notebook itself: `ours.py local|ssh|environments|imports` measures one round.

`ssh` and `far` take the configuration of an SSH server (`FAL_SSH_CONFIG`) from their environment;
`far` is the same server behind a link with a delay.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timing import (
    ARRAY_BYTES,
    Figures,
    bulk,
    calls,
    fresh_array,
    many,
    noop,
    once,
    p50,
    report,
    samples,
    size_of,
)
from uv import find_uv_bin

if TYPE_CHECKING:
    from collections.abc import Callable

BUILD = ["numpy", "pandas", "scikit-learn"]
PIECE = 1 << 20


def functions(host: Any) -> tuple[Any, Any, Any]:
    """A no-op, the same with 10 kB in its closure, and one that takes an array; all warm afterwards."""
    import fal_notebook as fal

    luggage = os.urandom(10_000)

    def with_closure(value: int) -> int:
        return value if luggage else 0

    plain = fal.function(host=host)(noop)
    heavy = fal.function(host=host)(with_closure)
    bulky = fal.function(host=host, requirements=[f"numpy=={version('numpy')}"])(size_of)
    plain(1)
    heavy(1)
    return plain, heavy, bulky


def measure_local() -> Figures:
    """The embedded local host: an agent and workers on this machine."""
    import fal_notebook as fal

    plain, heavy, bulky = functions(fal.local)
    return {
        **calls("local call", lambda: plain(1), count=2_000),
        **calls("local call, 10 kB closure", lambda: heavy(1), count=2_000),
        **many("local map", lambda values: list(plain.map(values))),
        **bulk("local call", bulky),
    }


def measure_ssh() -> Figures:
    """An SSH host on loopback, and what its bare channel does."""
    import fal_notebook as fal

    host = fal.SSHHost("gpu-box")
    plain, _, bulky = functions(host)
    return {
        **channel_echo("ssh channel", count=1_000),
        **calls("ssh call", lambda: plain(1), count=1_000),
        **many("ssh map", lambda values: list(plain.map(values))),
        **channel_bulk("ssh channel"),
        **bulk("ssh call", bulky),
    }


def measure_far() -> Figures:
    """The SSH host behind a link with a delay."""
    import fal_notebook as fal

    host = fal.SSHHost("gpu-box")
    plain = fal.function(host=host)(noop)
    plain(1)

    def hundred() -> None:
        runs = [plain.submit(value) for value in range(100)]
        if [run.result(timeout=60) for run in runs] != list(range(100)):
            raise AssertionError("calls were lost")

    hundred()
    return {
        **channel_echo("far channel", count=20),
        "far call p50": p50(samples(lambda: plain(1), count=20, warm_up=2)),
        "far 100 calls": p50([once(hundred) for _ in range(5)]),
    }


def with_channel(measure: Callable[[Any], Figures], mode: str) -> Figures:
    """Give a bare stream-local channel to a process that echoes or swallows, on the SSH server's side."""
    from fal_notebook.hosts.paramiko_link import open_link

    path = Path(os.environ["BENCH_PUBLIC"]) / f"{mode}.sock"
    command = [sys.executable, str(Path(__file__).with_name("peer_socket.py")), mode, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        if not other.stdout or not other.stdout.read(1):
            raise RuntimeError("the other end did not start")
        link = open_link("gpu-box")
        try:
            return measure(link.dial(str(path)))
        finally:
            link.close()
            other.kill()


def channel_echo(name: str, *, count: int) -> Figures:
    """Seconds for 100 bytes there and back on a bare channel."""

    def measure(stream: Any) -> Figures:
        def echo() -> None:
            stream.sendall(b"x" * 100)
            missing = 100
            while missing:
                missing -= len(stream.recv(missing))

        return calls(f"{name} echo", echo, count=count)

    return with_channel(measure, "echo")


def channel_bulk(name: str) -> Figures:
    """Seconds for as many bytes as the array has, up a bare channel, until the other end has seen them."""

    def measure(stream: Any) -> Figures:
        noise = memoryview(fresh_array()).cast("B")

        def upload() -> None:
            for start in range(0, ARRAY_BYTES, PIECE):
                stream.sendall(noise[start : start + PIECE])
            stream.recv(1)

        return {f"{name} 256 MB": min(once(upload) for _ in range(3))}

    return with_channel(measure, "sink")


def measure_environments() -> Figures:
    """Build one with a warm package cache, beside uv called by hand; then ask for it again."""
    from fal_agent.server.environments.cache import EnvironmentCache
    from fal_agent.server.environments.uv import Uv
    from fal_agent.wire import EnvironmentSpec

    spec = EnvironmentSpec(f"{sys.version_info[0]}.{sys.version_info[1]}", [BUILD])
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        root = Path(folder)
        uv = Uv.find(root)
        by_hand(root / "warm-up")
        plain = once(lambda: by_hand(root / "by-hand"))
        cache = EnvironmentCache(root / "home", lambda: uv)
        never = threading.Event()

        def build() -> None:
            cache.build(spec, stage=lambda *_: None, log=lambda _: None, cancelled=never)

        ours = once(build)
        known = p50(samples(lambda: EnvironmentCache(root / "home", lambda: uv).find(spec), count=50))
        return {"uv by hand": plain, "environment built": ours, "environment known": known}


def by_hand(folder: Path) -> None:
    """What a person would type: a virtual environment, a lock, an installation from it."""
    folder.mkdir()
    (folder / "in.txt").write_text("\n".join(BUILD))
    python = sys.executable
    for command in (
        ["uv", "venv", "--quiet", "--python", python, str(folder / "venv")],
        [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--python",
            python,
            "-o",
            str(folder / "lock"),
            str(folder / "in.txt"),
        ],
        ["uv", "pip", "install", "--quiet", "--python", str(folder / "venv"), "-r", str(folder / "lock")],
    ):
        subprocess.run([find_uv_bin(), *command[1:]], check=True)


def measure_imports() -> Figures:
    """Python with and without `import fal_notebook`, alternating."""
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(20):
        for taken, code in ((bare, "pass"), (ours, "import fal_notebook")):
            command = [sys.executable, "-I", "-c", code]
            taken.append(once(partial(subprocess.run, command, check=True)))
    return {"bare python": p50(bare), "import fal_notebook": p50(ours)}


SUBJECTS: dict[str, Callable[[], Figures]] = {
    "local": measure_local,
    "ssh": measure_ssh,
    "far": measure_far,
    "environments": measure_environments,
    "imports": measure_imports,
}

if __name__ == "__main__":
    report(SUBJECTS[sys.argv[1]]())
