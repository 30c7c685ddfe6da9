"""What a worker and its children use, as the agent measures it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from support.waiting import until

from fal_agent.server import usage
from fal_agent.server.gpus import Gpu

if TYPE_CHECKING:
    import pytest

PARENT = """
import subprocess, sys
ballast = b"x" * 30_000_000
child = subprocess.Popen([sys.executable, "-c", "ballast = b'x' * 40_000_000\\nwhile True: pass"])
print(child.pid, flush=True)
child.wait()
"""


def test_children_count_and_devices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        processes = ((child, 3 << 30), (1, 5 << 30))
        gpus = [Gpu(0, "a", "A10G", 24 << 30, 8 << 30, processes), Gpu(1, "b", "A10G", 24 << 30, 0)]
        monkeypatch.setattr(usage, "list_gpus", lambda: gpus)
        try:
            until(lambda: usage.usage_of(parent.pid)["memory"] > 70_000_000)
            first = usage.usage_of(parent.pid, [0])
            until(lambda: usage.usage_of(parent.pid)["cpu_seconds"] > first["cpu_seconds"])
        finally:
            subprocess.run(["kill", "-9", str(child)], check=True)

    assert first["gpus"] == [{"index": 0, "used": 3 << 30, "total": 24 << 30}]
    assert usage.usage_of(parent.pid)["memory"] == 0
