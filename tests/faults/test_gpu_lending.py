"""GPUs of a host are lent to workers, one to each, and given back however a worker ends.

The devices are those of a program that answers as `nvidia-smi` does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.faults.conftest import Bed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="agents need Linux")

NVIDIA_SMI = """#!/bin/sh
case "$1" in --query-gpu=*) printf '0, GPU-a, NVIDIA L4, 24000, 0\\n1, GPU-b, NVIDIA L4, 24000, 0\\n' ;; esac
"""


@pytest.fixture
def host(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host with two devices."""
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return bed.host()


@pytest.fixture
def device(host: Any) -> Callable[[str, Path], Any]:
    """Begin a call that writes its process down, ends when a file is there, and gives its device."""

    @fal.function(host=host, num_gpus=1, machine_type="GPU", keep_alive=0)
    def device(begun: Path, go: Path) -> str:
        begun.write_text(str(os.getpid()))
        while not go.exists():
            time.sleep(0.01)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    return lambda name, folder: device.submit(folder / name, folder / "go")


def pid_in(file: Path) -> int:
    """What a call has written; 0 before."""
    return int((file.exists() and file.read_text()) or 0)


def test_each_call_has_a_device_of_its_own_and_one_more_waits(
    device: Callable[[str, Path], Any], tmp_path: Path
) -> None:
    runs = [device(name, tmp_path) for name in ("a", "b")]
    until(lambda: all(pid_in(tmp_path / name) for name in ("a", "b")))
    third = device("c", tmp_path)
    time.sleep(0.5)
    assert not (tmp_path / "c").exists()
    (tmp_path / "go").touch()

    assert {run.result(timeout=60) for run in runs} == {"0", "1"}
    assert third.result(timeout=60) in {"0", "1"}


def test_a_killed_worker_gives_its_device_back(device: Callable[[str, Path], Any], tmp_path: Path) -> None:
    runs = [device(name, tmp_path) for name in ("a", "b")]
    until(lambda: all(pid_in(tmp_path / name) for name in ("a", "b")))
    third = device("c", tmp_path)

    os.kill(pid_in(tmp_path / "a"), signal.SIGKILL)

    until((tmp_path / "c").exists)
    (tmp_path / "go").touch()
    with pytest.raises(exceptions.WorkerLostError):
        runs[0].result(timeout=60)
    assert {runs[1].result(timeout=60), third.result(timeout=60)} == {"0", "1"}


def test_a_disk_that_holds_no_locks_is_told_at_once(
    bed: Bed, host: Any, device: Callable[[str, Path], Any], tmp_path: Path
) -> None:
    host.connect()
    locks = [bed.root / "locks" / f"GPU-{name}.lock" for name in ("a", "b")]
    for lock in locks:
        lock.mkdir(parents=True)  # where a file should be
    (tmp_path / "go").touch()

    with pytest.raises(exceptions.WorkerLostError, match="no GPU can be locked"):
        device("a", tmp_path).result(timeout=60)

    for lock in locks:
        lock.rmdir()
    assert device("b", tmp_path).result(timeout=60) in {"0", "1"}
