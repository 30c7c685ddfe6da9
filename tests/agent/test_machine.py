"""A call gets the first alternative that fits; else it is told everything that did not."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import ResourceError
from fal_agent.server import machine
from fal_agent.server.gpus import Gpu
from fal_agent.server.machine import MachineFacts, Match, machine_facts, match
from fal_agent.wire import Resources

if TYPE_CHECKING:
    from pathlib import Path

GB = 10**9


def facts(
    cores: int = 8, memory: int = 32 * GB, free: int | None = None, gpus: tuple[str, ...] = ()
) -> MachineFacts:
    return MachineFacts(
        hostname="lab1",
        platform="linux-x86_64",
        python="3.11.7",
        cores=cores,
        memory=memory,
        memory_free=memory if free is None else free,
        disk_free=GB,
        gpus=tuple(Gpu(index, f"GPU-{index}", name, 80 * GB, 0) for index, name in enumerate(gpus)),
    )


@pytest.mark.parametrize(
    ("name", "cores", "memory"),
    [("XS", 1, 512 * 10**6), ("S", 1, GB), ("M", 2, 2 * GB), ("L", 4, 15 * GB), ("XL", 8, 30 * GB)],
)
def test_a_size_asks_for_so_many_cores_and_so_much_memory(name: str, cores: int, memory: int) -> None:
    assert match(Resources([name]), facts(cores, memory)) == Match(name)
    with pytest.raises(ResourceError, match=r"GB of memory, and it has|MB"):
        match(Resources([name]), facts(cores, memory - 1))
    if cores > 1:
        with pytest.raises(ResourceError, match=f"{cores} cores, and it has {cores - 1}"):
            match(Resources([name]), facts(cores - 1, memory))


def test_a_call_that_asks_for_nothing_runs_everywhere() -> None:
    assert match(Resources(), facts(1, 600 * 10**6)) == Match("XS")


def test_alternatives_are_tried_in_order() -> None:
    there = facts(4, 16 * GB, gpus=("NVIDIA L4",))

    assert match(Resources(["XL", "GPU-H100", "GPU-L4", "L"]), there) == Match("GPU-L4", 1, "L4")
    assert match(Resources(["L", "GPU-L4"]), there) == Match("L")


@pytest.mark.parametrize(
    ("machine_type", "num_gpus", "expected"),
    [
        ("GPU", None, Match("GPU", 1)),
        ("GPU", 2, Match("GPU", 2)),
        ("GPU", 0, Match("GPU", 0)),
        ("GPU-H100", None, Match("GPU-H100", 1, "H100")),
        ("GPU-h100", 2, Match("GPU-h100", 2, "h100")),
        ("gpu-H100", 1, Match("gpu-H100", 1, "H100")),
        ("M", 3, Match("M", 3)),
        ("M", None, Match("M", 0)),
        ("s", None, Match("s", 0)),
    ],
)
def test_devices_are_counted_by_type_unless_said(
    machine_type: str, num_gpus: int | None, expected: Match
) -> None:
    there = facts(gpus=("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "NVIDIA A10G"))

    assert match(Resources([machine_type], num_gpus), there) == expected


def test_more_devices_than_there_are_is_an_error_that_counts_them() -> None:
    there = facts(gpus=("NVIDIA H100", "NVIDIA A10G"))

    with pytest.raises(ResourceError, match=re.escape("GPU-H100: needs 2 of its H100 GPUs, and it has 1")):
        match(Resources(["GPU-H100"], 2), there)
    with pytest.raises(ResourceError, match=re.escape("GPU: needs 3 of its GPUs, and it has 2")):
        match(Resources(["GPU"], 3), there)
    with pytest.raises(ResourceError, match="num_gpus must be 0 or more, not -1"):
        match(Resources(["GPU"], -1), there)


def test_a_word_of_ones_own_is_a_label() -> None:
    assert match(Resources(["Big-Box"], 1), facts(gpus=("L4",)), ["lab", "big-box"]) == Match("Big-Box", 1)


def test_a_region_is_a_label() -> None:
    assert match(Resources(regions=["attic", "Cellar"]), facts(), ["cellar"]) == Match("XS")
    with pytest.raises(ResourceError, match=r"in none of the regions attic, roof.*the labels cellar"):
        match(Resources(regions=["attic", "roof"]), facts(), ["cellar"])
    assert match(Resources(regions=[]), facts()) == Match("XS")


def test_a_refusal_names_each_alternative_and_what_there_is() -> None:
    there = facts(2, 8 * GB, gpus=("NVIDIA L4",))

    with pytest.raises(ResourceError) as refusal:
        match(Resources(["XL", "GPU-H100", "palace"]), there, ["lab"])

    assert str(refusal.value) == (
        "lab1 cannot run this call: "
        "XL: needs 8 cores, and it has 2; and 30 GB of memory, and it has 8 GB; "
        "GPU-H100: needs 1 of its H100 GPUs, and it has none; "
        "palace: neither a label of this machine nor one of XS, S, M, L, XL, GPU and GPU-<MODEL>. "
        "It has 2 cores, 8 GB of memory, GPU 0 NVIDIA L4, and the labels lab. "
        "Ask for another machine_type, or run the call on another host"
    )


def test_no_alternative_at_all_is_refused() -> None:
    with pytest.raises(ResourceError, match="no machine_type was given"):
        match(Resources([]), facts())


def test_memory_that_others_use_now_is_remarked_and_not_refused() -> None:
    """A browser that is closed in a minute must not make a workstation useless."""
    found = match(Resources(["L"]), facts(8, 32 * GB, free=3 * GB))

    assert found.machine_type == "L"
    assert found.remark == "L asks for 15 GB of memory, and only 3 GB are free now"


def test_this_machine_is_described(tmp_path: Path) -> None:
    found = machine_facts(tmp_path / "not" / "yet", gpus=[])

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 <= found.cores <= len(os.sched_getaffinity(0))
    assert 0 < found.memory_free <= found.memory <= pages
    assert found.disk_free > 0
    assert found.platform == f"linux-{os.uname().machine}"
    assert found.hostname == os.uname().nodename
    assert found.gpus == ()


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_control_groups_count_also_those_further_up(tmp_path: Path) -> None:
    """A container, or a batch system's job, has less than its machine."""
    membership, mount = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("0::/job.slice/run.scope\n")
    write(
        mount / "job.slice", memory__max=str(64 << 20), memory__current=str(60 << 20), cpu__max="50000 100000"
    )
    write(mount / "job.slice" / "run.scope", memory__max="max", memory__current="4096", cpu__max="max 100000")

    groups = list(machine._cgroups(membership, mount))

    assert groups == [mount / "job.slice" / "run.scope", mount / "job.slice", mount]
    assert machine._memory(groups) == (64 << 20, 4 << 20)
    assert machine._cores(groups) == 1


def test_limits_of_the_older_control_groups_count(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("4:memory:/box\n1:cpu,cpuacct:/box\n9:name=systemd:/\n0::/\n")
    write(mount / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
    write(mount / "memory" / "box", memory__limit_in_bytes=str(1 << 30), memory__usage_in_bytes=str(1 << 31))
    write(mount / "cpu,cpuacct" / "box", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")

    groups = list(machine._cgroups(membership, mount))

    assert machine._memory(groups) == (1 << 30, 0)
    assert machine._cores(groups) == 1


def test_a_kernel_without_control_groups_limits_nothing(tmp_path: Path) -> None:
    groups = list(machine._cgroups(tmp_path / "none", tmp_path))

    assert groups == []
    assert machine._cores(groups) == len(os.sched_getaffinity(0))
