"""The targets, and the tables of docs/benchmarks.md made from the rounds."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from timing import Figures

__all__ = ["APP_TARGETS", "CELL_TARGETS", "CONNECTING_TARGETS", "TARGETS", "Target", "markdown", "write"]


@dataclass(frozen=True)
class Target:
    """Something that was promised: `ratio` of one round's figures must be at most `limit`."""

    title: str
    needs: tuple[str, ...]  # names of figures
    ratio: Callable[[Figures], float]
    limit: float
    unit: str = "x"  # "x": a ratio; "ms": seconds, shown in milliseconds


def over(title: str, ours: str, theirs: str, limit: float) -> Target:
    """One figure divided by another."""
    return Target(title, (ours, theirs), lambda figures: figures[ours] / figures[theirs], limit)


def beyond(title: str, ours: str, theirs: str, limit: float) -> Target:
    """Seconds by which one figure is larger than another."""
    return Target(title, (ours, theirs), lambda figures: figures[ours] - figures[theirs], limit, "ms")


def seconds(title: str, ours: str, limit: float) -> Target:
    """A figure by itself."""
    return Target(title, (ours,), lambda figures: figures[ours], limit, "ms")


TARGETS = [
    over("warm no-op call, local host, over the floor", "local call p50", "floor p50", 4.0),
    over("... over a Ray actor call", "local call p50", "ray actor p50", 1.0),
    over("... over ipyparallel `apply_sync`", "local call p50", "ipyparallel apply_sync p50", 1.0),
    over("... over a Dask `submit`", "local call p50", "dask submit p50", 1.0),
    Target(
        "warm no-op call over SSH on loopback, over (2 x echo on the bare channel + local call)",
        ("ssh call p50", "ssh channel echo p50", "local call p50"),
        lambda f: f["ssh call p50"] / (2 * f["ssh channel echo p50"] + f["local call p50"]),
        1.0,
    ),
    over(
        "2,000 no-op calls by `.map`, over loky's `map`", "local map 2000 calls", "loky map 2000 calls", 1.0
    ),
    over(
        "call with 10 kB in its closure, over the no-op",
        "local call, 10 kB closure p50",
        "local call p50",
        1.3,
    ),
    over("256 MB array to a local worker, over loky", "local call 256 MB", "loky submit 256 MB", 1.0),
    over("256 MB array over SSH, over the bare channel", "ssh call 256 MB", "ssh channel 256 MB", 1.25),
    seconds("known environment", "environment known", 0.050),
    over("environment built, over uv by hand", "environment built", "uv by hand", 1.15),
    beyond("`import fal_notebook`, beyond bare python", "import fal_notebook", "bare python", 0.060),
    beyond("100 ms link: warm call, beyond one round trip", "far call p50", "far channel echo p50", 0.010),
    over("100 ms link: 100 calls at once, over one round trip", "far 100 calls", "far channel echo p50", 1.5),
]


CELL_TARGETS = [
    beyond("`%%fal` cell of `pass`, beyond a plain cell", "%%fal cell p50", "plain cell p50", 0.015),
    seconds("print to what a front end hears, local host", "print to front end p50", 0.050),
    seconds("100 MB printed in lines of 100 bytes (20 MB/s)", "%%fal cell prints 100 MB", 5.0),
    over("... over a plain cell", "%%fal cell prints 100 MB", "plain cell prints 100 MB", 1.0),
]


CONNECTING_TARGETS = [
    seconds(
        "prepared host on loopback, new process to the first result",
        "paramiko: import, connect, first result p50",
        1.0,
    ),
    seconds("... by the ssh program", "openssh: import, connect, first result p50", 1.0),
]


_LOAD = "5000 requests from 16 clients"
APP_TARGETS = [
    over("request over SSH, over uvicorn behind `ssh -L`", "ssh app request p50", "ssh -L request p50", 1.3),
    over("requests from 16 clients over SSH, over the same", f"ssh app {_LOAD}", f"ssh -L {_LOAD}", 1.25),
    over(
        "websocket echo of 1 kB over SSH, over the same",
        "ssh app websocket echo p50",
        "ssh -L websocket echo p50",
        1.3,
    ),
    over("the same on the local host, over Ray Serve", f"local app {_LOAD}", f"ray serve {_LOAD}", 1 / 3),
    over("... their 99th percentile", f"local app {_LOAD}: p99", f"ray serve {_LOAD}: p99", 1.0),
    over("... over SSH, over Ray Serve without", f"ssh app {_LOAD}", f"ray serve {_LOAD}", 1 / 3),
    over("... their 99th percentile over SSH", f"ssh app {_LOAD}: p99", f"ray serve {_LOAD}: p99", 1.0),
    seconds("cold spawn to the first answer, local host", "local app cold spawn", 1.5),
    seconds("... over SSH", "ssh app cold spawn", 1.5),
]


def machine() -> str:
    """The size of this machine, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GB of memory, "
        f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}"
    )


def markdown(rounds: list[Figures], targets: list[Target]) -> str:
    """Both tables: the targets, then every figure."""
    lines = [
        f"{len(rounds)} rounds on a machine with {machine()}. A ratio is the median of the rounds' ratios.",
        "",
        "| target | at most | measured | rounds | |",
        "|---|--:|--:|---|---|",
        *(_target_line(target, rounds) for target in targets),
        "",
        "| figure | median of the rounds | smallest | largest |",
        "|---|--:|--:|--:|",
    ]
    names = dict.fromkeys(name for figures in rounds for name in figures if not name.endswith(" round"))
    for name in names:
        values = [figures[name] for figures in rounds if name in figures]
        shown = (statistics.median(values), min(values), max(values))
        lines.append(f"| {name} | {' | '.join(map(_duration, shown))} |")
    return "\n".join(lines) + "\n"


def _target_line(target: Target, rounds: list[Figures]) -> str:
    values = [target.ratio(figures) for figures in rounds if set(target.needs) <= set(figures)]
    if not values:
        return f"| {target.title} | {_shown(target, target.limit)} | not measured | | |"
    measured = statistics.median(values)
    verdict = "met" if measured <= target.limit else "**missed**"
    spread = f"{_shown(target, min(values))} to {_shown(target, max(values))}"
    limit, shown = _shown(target, target.limit), _shown(target, measured)
    return f"| {target.title} | {limit} | {shown} | {spread} | {verdict} |"


def _shown(target: Target, value: float) -> str:
    return f"{value * 1000:.1f} ms" if target.unit == "ms" else f"{value:.2f} x"


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def write(folder: Path, section: str, rounds: list[Figures], targets: list[Target]) -> None:
    """Put the tables between the marks of a section of `folder`/benchmarks.md, and all figures beside it."""
    path = folder / "benchmarks.md"
    begin, end = f"<!-- figures of {section} -->\n", f"<!-- end of {section} -->\n"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}{markdown(rounds, targets)}{end}{after}", encoding="utf-8")
    content = {"machine": machine(), "rounds": rounds}
    (folder / f"benchmarks-{section}.json").write_text(json.dumps(content, indent=1) + "\n")
