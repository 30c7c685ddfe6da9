"""Devices are read as the driver tells them, and lent only when nobody else is on them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fal_agent.server import gpus as gpus_module
from fal_agent.server.gpus import Gpu, GpuLender, list_gpus, matches_model

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
AGENT = Path(__file__).parents[2] / "agent"

# A program that answers like nvidia-smi, from two files beside it: devices and the processes on them.
PROGRAM = """#!/bin/sh
folder=$(dirname "$0")
case "$1" in
  --query-gpu=index,uuid,name,memory.total,memory.used) cat "$folder/gpus" ;;
  --query-compute-apps=gpu_uuid,pid,used_memory) cat "$folder/apps" ;;
  *) echo "unknown query $1" >&2; exit 2 ;;
esac
[ "$2" = --format=csv,noheader,nounits ]
"""


class Driver:
    """The fake program's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "nvidia-smi"
        self.program.write_text(PROGRAM)
        self.program.chmod(0o755)
        self.set("", "")

    def set(self, gpus: str, apps: str = "") -> None:
        (self.folder / "gpus").write_text(gpus)
        (self.folder / "apps").write_text(apps)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Driver(tmp_path)


def gpu(index: int, name: str = "NVIDIA A100", used: int = 0, processes: tuple = ()) -> Gpu:
    return Gpu(index, f"GPU-{index:04d}", name, 80 * GIB, used, processes)


@pytest.fixture
def stranger() -> Iterator[int]:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield child.pid
    child.kill()
    child.wait()


def test_without_a_driver_there_are_no_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus_module, "_PLACES", ())

    assert list_gpus() == []


def test_devices_and_the_processes_on_them_are_read(driver: Driver) -> None:
    driver.set(
        "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 2000\n1, GPU-bb, NVIDIA A10G, 23028, 0\n",
        "GPU-aa, 4242, 1500\nGPU-aa, 4243, [N/A]\n",
    )

    assert list_gpus() == [
        Gpu(
            0, "GPU-aa", "NVIDIA H100 80GB HBM3", 81559 << 20, 2000 << 20, ((4242, 1500 << 20), (4243, None))
        ),
        Gpu(1, "GPU-bb", "NVIDIA A10G", 23028 << 20, 0, ()),
    ]


@pytest.mark.parametrize(
    "answer",
    ["No devices were found\n", "", "0, GPU-aa\n", "[Unknown Error], x, y, z, 0\n", "\xff\n"],
)
def test_nonsense_from_the_driver_gives_no_devices(driver: Driver, answer: str) -> None:
    driver.set(answer)

    assert list_gpus() == []


def test_a_driver_that_fails_or_hangs_gives_no_devices(driver: Driver) -> None:
    driver.program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    assert list_gpus() == []

    driver.program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert list_gpus(timeout=0.2) == []


def test_a_driver_that_hides_memory_is_survived(driver: Driver) -> None:
    driver.set("0, GPU-aa, NVIDIA GB10, [N/A], [N/A]\n")

    assert list_gpus() == [Gpu(0, "GPU-aa", "NVIDIA GB10", 0, 0)]


def test_only_the_devices_that_a_batch_system_gave_are_used(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.set("".join(f"{index}, GPU-{index}f00, NVIDIA A100, 81559, 0\n" for index in range(4)))

    for variable, expected in [("1,3", [1, 3]), ("GPU-2f", [2]), ("", []), ("NoDevFiles", []), ("-1", [])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert [gpu.index for gpu in list_gpus()] == expected, variable


@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA RTX A1000", "A100", False),
        ("NVIDIA RTX A6000", "A6000", True),
        ("NVIDIA RTX 6000 Ada Generation", "A6000", False),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA H100 80GB HBM3", "h100-80gb", True),
        ("NVIDIA H200", "H100", False),
        ("NVIDIA GeForce RTX 4090", "RTX4090", True),
        ("NVIDIA GeForce RTX 4090", "4090", True),
        ("NVIDIA L40S", "L40", True),
        ("NVIDIA A10G", "A10", True),
        ("NVIDIA L40S", "L40S", True),
        ("NVIDIA L40", "L40", True),
        ("NVIDIA L40", "L4", False),
        ("NVIDIA B200", "B200", True),
        ("Tesla T4", "T4", True),
        ("Tesla T4", "-", False),
    ],
)
def test_a_model_is_a_word_of_the_name(name: str, model: str, expected: bool) -> None:
    """A call for an L4 must not get an L40, nor one for an A100 an A1000."""
    assert matches_model(name, model) is expected


def test_devices_are_lent_once_and_come_back() -> None:
    lender = GpuLender(lambda: [gpu(0), gpu(1), gpu(2)])

    assert lender.lend(2) == [0, 1]
    assert lender.lend(2) is None
    assert lender.reason == (
        "waiting for 2 GPUs, 1 of 3 free: GPU 0 is lent to a worker; GPU 1 is lent to a worker"
    )
    assert lender.lend(1) == [2], "a refused request keeps nothing"
    lender.release([0, 1])
    assert lender.lend(2) == [0, 1]
    assert lender.reason == ""


def test_the_least_used_device_is_lent_first() -> None:
    lender = GpuLender(lambda: [gpu(0, used=900 << 20), gpu(1, used=10 << 20), gpu(2, used=500 << 20)])

    assert lender.lend(1) == [1]
    assert lender.lend(2) == [0, 2]


def test_only_devices_of_the_model_are_lent() -> None:
    lender = GpuLender(lambda: [gpu(0, "NVIDIA L4"), gpu(1, "NVIDIA H100")])

    assert lender.lend(1, "H100") == [1]
    assert lender.lend(1, "H100") is None
    assert lender.reason == "waiting for 1 H100 GPU, 0 of 1 free: GPU 1 is lent to a worker"
    assert lender.lend(2, "L4") is None
    assert lender.reason == "2 L4 GPUs were asked for, and this machine has 1"


def test_a_device_that_somebody_uses_is_left_alone_until_it_is_free(stranger: int) -> None:
    busy = gpu(0, used=2 * GIB, processes=((stranger, 2 * GIB),))
    devices = [busy]
    lender = GpuLender(lambda: devices)

    assert lender.lend(1) is None
    assert f"GPU 0 is used by process {stranger} (sleep of " in lender.reason
    assert "with 2.0 GiB" in lender.reason

    devices[0] = gpu(0)
    assert lender.lend(1) == [0]


def test_a_process_whose_memory_is_not_told_occupies_its_device(stranger: int) -> None:
    lender = GpuLender(lambda: [gpu(0, processes=((stranger, None),))])

    assert lender.lend(1) is None


def test_a_display_server_does_not_occupy_a_device(stranger: int) -> None:
    lender = GpuLender(lambda: [gpu(0, used=60 << 20, processes=((stranger, 50 << 20),))])

    assert lender.lend(1) == [0]


def test_much_memory_without_a_process_means_somebody_out_of_sight() -> None:
    """In a container the processes of other containers are not listed."""
    lender = GpuLender(lambda: [gpu(0, used=5 * GIB)])

    assert lender.lend(1) is None
    assert "not visible from here" in lender.reason


def test_what_our_own_workers_and_their_children_use_is_not_foreign(stranger: int) -> None:
    """A worker that ended a moment ago, or a child of one that goes on, may still hold memory."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess as s; p = s.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()",
        ],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        grandchild = int(child.stdout.readline())
        lender = GpuLender(
            lambda: [gpu(0, processes=((child.pid, GIB),)), gpu(1, processes=((grandchild, GIB),))]
        )

        assert lender.lend(2, own_pids=[stranger]) is None
        assert lender.lend(2, own_pids=[child.pid]) == [0, 1]
    finally:
        os.killpg(child.pid, 9)
        child.communicate()


def test_agents_of_one_machine_do_not_lend_the_same_device(tmp_path: Path) -> None:
    """Two versions of our code have an agent each; a worker without any memory yet shows nowhere."""
    first, second = (GpuLender(lambda: [gpu(0)], locks=tmp_path / "locks") for _ in range(2))

    assert first.lend(1) == [0]
    assert second.lend(1) is None
    assert second.reason == "waiting for 1 GPU, 0 of 1 free: GPU 0 is lent by another agent"
    first.release([0])
    assert second.lend(1) == [0]


def test_a_killed_agent_gives_its_devices_back(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fal_agent.server.gpus import Gpu, GpuLender\n"
        "l = GpuLender(lambda: [Gpu(0, 'GPU-0000', 'A100', 1, 0)], locks=Path(sys.argv[1]))\n"
        "print(l.lend(1), flush=True); input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(AGENT)},
    )
    assert other.stdout.readline() == b"[0]\n"
    lender = GpuLender(lambda: [gpu(0)], locks=tmp_path)
    assert lender.lend(1) is None

    other.kill()
    other.communicate()

    assert lender.lend(1) == [0]


def test_the_library_is_asked_first_where_it_is_installed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same devices by the library's own words; what the program says is not needed then."""
    (driver.folder / "pynvml.py").write_text(
        "from types import SimpleNamespace as S\n"
        "class NVMLError(Exception): pass\n"
        "def nvmlInit(): pass\n"
        "def nvmlShutdown(): pass\n"
        "def nvmlDeviceGetCount(): return 2\n"
        "def nvmlDeviceGetHandleByIndex(i): return i\n"
        "def nvmlDeviceGetUUID(h): return f'GPU-{h}'\n"
        "def nvmlDeviceGetName(h): return b'NVIDIA L4'\n"
        "def nvmlDeviceGetMemoryInfo(h): return S(total=24 << 30, used=h << 30)\n"
        "def nvmlDeviceGetComputeRunningProcesses(h): return [S(pid=7, usedGpuMemory=None)] * h\n"
    )
    monkeypatch.syspath_prepend(driver.folder)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    found = list_gpus()
    sys.modules.pop("pynvml")

    first = Gpu(0, "GPU-0", "NVIDIA L4", 24 * GIB, 0)
    assert found == [first, replace(first, index=1, uuid="GPU-1", memory_used=GIB, processes=((7, None),))]


def test_a_library_without_a_driver_leaves_the_question_to_the_program(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    (driver.folder / "pynvml.py").write_text(
        "class NVMLError(Exception): pass\ndef nvmlInit(): raise NVMLError(9)\n"
    )
    monkeypatch.syspath_prepend(driver.folder)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    driver.set("0, GPU-aa, NVIDIA A10G, 23028, 0\n")

    found = list_gpus()
    sys.modules.pop("pynvml")

    assert [gpu.name for gpu in found] == ["NVIDIA A10G"]
