"""How much memory processes hold."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Watch", "resident"]


def resident(pid: int) -> int:
    """Bytes that a process holds in memory; 0 for one that has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


class Watch:
    """The most that some processes grow in the time of a block, in bytes."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before = {pid: resident(pid) for pid in pids}
        self.grown = dict.fromkeys(self._before, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            for pid, before in self._before.items():
                self.grown[pid] = max(self.grown[pid], resident(pid) - before)
