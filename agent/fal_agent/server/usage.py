"""What a worker and the processes that it started use of the machine.

Runs in the agent, in a thread. Asked for only while somebody looks at a run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.server.gpus import list_gpus
from fal_agent.server.proc import processes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["usage_of"]

_TICKS = os.sysconf("SC_CLK_TCK")  # a second
_PAGE = os.sysconf("SC_PAGE_SIZE")


def usage_of(pid: int, devices: Optional[Sequence[int]] = None) -> dict[str, Any]:
    """Measure a worker.

    Args:
        pid: of the worker, which leads a process group.
        devices: indices of the GPUs that it has.

    Returns:
        `pid`; `at`, seconds of a clock that only runs forward; `cpu_seconds` used since it started, also by
        its processes that have ended; `memory`, resident bytes, what processes share counted for each;
        `gpus`: `index`, `used` and `total` bytes of each device.
    """
    members = [process.pid for process in processes() if process.group == pid]
    own = set(members)
    gpus = [
        {
            "index": gpu.index,
            "used": sum(used or 0 for number, used in gpu.processes if number in own),
            "total": gpu.memory_total,
        }
        for gpu in (list_gpus() if devices else ())
        if gpu.index in (devices or ())
    ]
    return {
        "pid": pid,
        "at": time.monotonic(),
        "cpu_seconds": sum(map(_cpu_seconds, members)),
        "memory": sum(map(_resident, members)),
        "gpus": gpus,
    }


def _cpu_seconds(pid: int) -> float:
    text = _read(pid, "stat")
    fields = text[text.rfind(")") + 2 :].split()
    return (
        sum(map(int, fields[11:15])) / _TICKS
    )  # its own and those of its ended children, as user and in the kernel


def _resident(pid: int) -> int:
    fields = _read(pid, "statm").split()
    return int(fields[1]) * _PAGE if fields else 0


def _read(pid: int, name: str) -> str:
    """A file of /proc; empty for a process that has just ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
