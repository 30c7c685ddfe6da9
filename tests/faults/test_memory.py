"""A call takes more memory than there is."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions
from fal_notebook.hosts.local import LocalHost

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 300_000_000  # bytes
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group whose processes may not take more than `LIMIT`."""
    parent, limit = (V1, "memory.limit_in_bytes") if V1.exists() else (V2, "memory.max")
    if not os.access(parent / "cgroup.procs", os.W_OK):
        pytest.skip("limiting memory needs root, and control groups that can be written")
    group = parent / f"fal-test-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    (group / limit).write_text(str(LIMIT))
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHost]:
    """This machine with an agent of its own, whose workers hold nothing of earlier tests."""
    monkeypatch.setenv("FAL_NOTEBOOK_HOME", str(tmp_path / "root"))
    made = LocalHost("fresh")
    yield made
    made.ask("shutdown")
    made.close()


def test_a_worker_that_takes_all_memory_is_named_with_what_it_took(
    small_group: Path, host: LocalHost
) -> None:
    @fal.function(host=host)
    def take(size: int) -> int:
        if size:
            (small_group / "cgroup.procs").write_text(str(os.getpid()))
        return len(bytearray(size).replace(b"\0", b"x"))

    with pytest.raises(exceptions.WorkerLostError, match=r"ran out of memory; it held up to 0\.[23]\d GB"):
        take(2 * LIMIT)

    assert take(0) == 0  # the agent was not touched
    assert (info := fal.runs(host, limit=2)[1]).state == "lost"
    assert "out of memory" in (info.error or "")
