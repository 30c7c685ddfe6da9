"""New processes that connect to a host which others have used, one after the other, and call a function."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import Figures, once, p50, report

TIMES = 7
CONNECTING = """
import time
began = time.perf_counter()
import fal_notebook as fal
host = fal.connect("gpu-box")
connected = time.perf_counter()

@fal.function(host=host)
def noop(value):
    return value

assert noop(1) == 1
ended = time.perf_counter()
print(connected - began, ended - began)
"""


def measure(link: str) -> Figures:
    """Connect by `link`: once to prepare the host, then from new processes; and again after a break."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hosts.toml").write_text(f'[hosts.gpu-box]\nlink = "{link}"\n')
        environment = {**os.environ, "FAL_NOTEBOOK_CONFIG": folder}
        connect(environment)  # prepares the host
        rows = [connect(environment) for _ in range(TIMES)]
    words = ["ssh", "-F", os.environ["FAL_SSH_CONFIG"], "gpu-box", "true"]
    by_hand = [
        once(lambda: subprocess.run(words, check=True, stdin=subprocess.DEVNULL)) for _ in range(TIMES)
    ]
    return {
        f"{link}: import and connect p50": p50([row[0] for row in rows]),
        f"{link}: import, connect, first result p50": p50([row[1] for row in rows]),
        "ssh HOST true p50": p50(by_hand),
    }


def connect(environment: dict[str, str]) -> tuple[float, float]:
    """Seconds to a connection and to the first result, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECTING], env=environment, capture_output=True, text=True, check=True
    )
    connected, ended = map(float, done.stdout.split()[-2:])
    time.sleep(0.2)  # what the process before left is cleared away
    return connected, ended


if __name__ == "__main__":
    report(measure(sys.argv[1]))
