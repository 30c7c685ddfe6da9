"""Measure first contact with a host that has nothing on it, and coming back to it (`make bench-hosts`).

The host is sshd on loopback whose user is shut into a folder with busybox and the C library: no Python, no
uv, no package index in reach. Needs root. `--write FOLDER` puts tables into benchmarks.md there, and all
figures into benchmarks-hosts.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report

if TYPE_CHECKING:
    from collections.abc import Callable

    from timing import Figures

HERE = Path(__file__).parent
REQUIREMENTS = ["numpy", "pandas", "scikit-learn"]
TARGETS = [
    report.seconds("back to a prepared host, to the first result", "prepared host, first result", 1.0),
]


def main() -> int:
    """Be the command; gives its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="folder of benchmarks.md and the figures")
    arguments = parser.parse_args()
    sys.path.append(str(HERE.parent / "tests"))
    rounds = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
        with tempfile.TemporaryDirectory(prefix="fal-bench-") as folder:
            rounds.append(one_round(Path(folder), number))
    print("\n" + report.markdown(rounds, TARGETS))
    if arguments.write:
        report.write(arguments.write, "hosts", rounds, TARGETS)
    return 0


def one_round(folder: Path, number: int) -> Figures:
    """Meet two bare hosts, the first with nothing in the notebook's cache, and come back to the second."""
    from support.bare import bare_server

    os.environ.update(
        FAL_NOTEBOOK_HOME=str(folder / "root"),
        FAL_NOTEBOOK_CONFIG=str(folder / "config"),
        FAL_NOTEBOOK_CACHE=str(folder / "cache"),
    )
    figures: Figures = {}
    for which in ("first host", "second host"):
        name = f"bare-{number}-{which.split()[0]}"
        with bare_server(folder / name, name=name) as (server, _):
            os.environ["FAL_SSH_CONFIG"] = str(server.config_path)
            figures |= first_contact(name, which)
            if which == "second host":
                figures |= coming_back(name)
            host = host_named(name)
            host.ask("shutdown")
            host.close()
    return figures


def host_named(name: str) -> Any:
    """Give the host of a name."""
    from fal_notebook.hosts.registry import get_host

    return get_host(name)


def function_on(name: str) -> Callable[[], object]:
    """Give a function that needs all that was asked for."""
    import fal_notebook as fal

    @fal.function(host=name, requirements=REQUIREMENTS)
    def work() -> float:
        import numpy as np
        import pandas as pd
        import sklearn

        return float(pd.Series(np.arange(4)).sum()) + len(sklearn.__version__) * 0

    return work


def first_contact(name: str, which: str) -> Figures:
    """Time from nothing to a connection, and to the first result."""
    started = time.perf_counter()
    host_named(name).connect()
    connected = time.perf_counter() - started
    if function_on(name)() != 6.0:
        raise RuntimeError("the host gave another result")
    return {f"{which}: agent answers": connected, f"{which}: first result": time.perf_counter() - started}


def coming_back(name: str) -> Figures:
    """Time a new connection and a call, with the agent there and without."""
    figures: Figures = {}
    for title, goes in (("prepared host", False), ("prepared host without its agent", True)):
        host = host_named(name)
        if goes:
            host.ask("shutdown")
            time.sleep(1.0)
        host.close()
        started = time.perf_counter()
        host.connect()
        function_on(name)()
        figures[f"{title}, first result"] = time.perf_counter() - started
    return figures


if __name__ == "__main__":
    sys.exit(main())
