"""Take times, and agree with the other processes of the benchmark on how to report them.

Every subject (the floor, a peer, fal_notebook) runs as a process of its own, measures one round and
prints one line of JSON: figure name -> value. `calls.py` starts them and puts the rounds together.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ARRAY_BYTES",
    "MAP_CALLS",
    "Figures",
    "bulk",
    "calls",
    "fresh_array",
    "many",
    "noop",
    "once",
    "p50",
    "p95",
    "report",
    "samples",
    "size_of",
]

Figures = dict[str, float]
ARRAY_BYTES = 256 << 20
MAP_CALLS = 2_000


def noop(value: int) -> int:
    """The smallest function."""
    return value


def fresh_array() -> Any:
    """256 MiB of noise, which nothing can have seen before, compress or recognise."""
    import numpy as np

    return np.random.default_rng().random(ARRAY_BYTES // 8)


def size_of(array: Any) -> int:
    """Touch both ends of an array, so that it has to be there, and give its bytes."""
    return int(array.nbytes) + int(array[0]) + int(array[-1])  # noise is below 1: both add 0


def samples(call: Callable[[], object], *, count: int, warm_up: int = 30) -> list[float]:
    """Seconds of each of `count` calls, after `warm_up` calls that nobody times."""
    for _ in range(warm_up):
        call()
    return [once(call) for _ in range(count)]


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def p50(taken: list[float]) -> float:
    """The median."""
    return statistics.median(taken)


def p95(taken: list[float]) -> float:
    """The value that 95 of 100 do not pass."""
    return sorted(taken)[max(0, round(len(taken) * 0.95) - 1)]


def calls(name: str, call: Callable[[], object], *, count: int) -> Figures:
    """The figures of a warm call, in seconds."""
    taken = samples(call, count=count)
    return {f"{name} p50": p50(taken), f"{name} p95": p95(taken)}


def many(name: str, run: Callable[[range], list[int]]) -> Figures:
    """Seconds for many small calls, workers warm."""
    run(range(50))
    result: list[int] = []
    seconds = once(lambda: result.extend(run(range(MAP_CALLS))))
    if result != list(range(MAP_CALLS)):
        raise AssertionError(f"{name} lost calls")
    return {f"{name} {MAP_CALLS} calls": seconds}


def bulk(name: str, run: Callable[[Any], object]) -> Figures:
    """Seconds to get an array to a worker: the best of three, since memory has to be found first."""
    taken = []
    for _ in range(3):
        array = fresh_array()
        taken.append(once(partial(run, array)))
    return {f"{name} 256 MB": min(taken)}


def report(figures: Figures) -> None:
    """Hand the figures of this process to `calls.py`."""
    sys.stdout.write("\n" + json.dumps({"figures": figures}) + "\n")
    sys.stdout.flush()
