"""Describe this machine, and match what a call asks for against it.

Runs in the agent. A machine type is a request, not a reservation: it asks for a machine that is large
enough. "XS" to "XL" ask for cores and memory, "GPU" and "GPU-<MODEL>" for devices, any other word for
a label that the machine carries.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.errors import ResourceError
from fal_agent.server.gpus import Gpu, list_gpus, matches_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fal_agent.wire import Resources

__all__ = ["SIZES", "MachineFacts", "Match", "machine_facts", "match"]

SIZES = {  # cores, bytes of memory
    "XS": (0.5, 512 * 10**6),
    "S": (1, 10**9),
    "M": (2, 2 * 10**9),
    "L": (4, 15 * 10**9),
    "XL": (8, 30 * 10**9),
}
_UNLIMITED = 1 << 60  # cgroups without a limit show a number beyond this, or "max"


@dataclass(frozen=True)
class MachineFacts:
    """What this machine has for us, limits of the container we may be in included. Sizes are in bytes."""

    hostname: str
    platform: str  # "linux-x86_64"
    python: str  # "X.Y.Z" of the agent
    cores: int  # that this process may use, at least 1
    memory: int
    memory_free: int  # that can be had without swapping
    disk_free: int  # where the agent keeps its files
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Match:
    """What a call gets.

    Attributes:
        machine_type: the first of its alternatives that fits.
        gpus: devices it needs.
        gpu_model: part of their name; None for any.
        remark: what a person should know, such as little free memory; "" for nothing.
    """

    machine_type: str
    gpus: int = 0
    gpu_model: Optional[str] = None
    remark: str = ""


def machine_facts(root: Path, gpus: Optional[Sequence[Gpu]] = None) -> MachineFacts:
    """Look at this machine.

    Args:
        root: folder whose disk counts; it, or one above it, exists.
        gpus: its devices; None to ask the driver, which may take seconds.
    """
    groups = list(_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    total, free = _memory(groups)
    while not root.exists():
        root = root.parent
    return MachineFacts(
        hostname=socket.gethostname(),
        platform=f"{platform.system().lower()}-{platform.machine()}",
        python=platform.python_version(),
        cores=_cores(groups),
        memory=total,
        memory_free=free,
        disk_free=shutil.disk_usage(root).free,
        gpus=tuple(list_gpus() if gpus is None else gpus),
    )


def match(resources: Resources, facts: MachineFacts, labels: Sequence[str] = ()) -> Match:
    """Choose the first alternative that this machine can give.

    Args:
        resources: what the call asks for.
        facts: what there is.
        labels: names that the machine carries, for `regions` and machine types of one's own.

    Raises:
        ResourceError: nothing fits; the message tells why for each alternative, and what there is.
    """
    known = {label.lower() for label in labels}
    regions = resources.regions
    if regions and not known & {region.lower() for region in regions}:
        raise ResourceError(_refusal(facts, labels, [f"it is in none of the regions {', '.join(regions)}"]))
    if resources.num_gpus is not None and resources.num_gpus < 0:
        raise ResourceError(f"num_gpus must be 0 or more, not {resources.num_gpus}")
    problems = []
    for machine_type in resources.machine_types:
        found = _try(machine_type, resources.num_gpus, facts, known)
        if isinstance(found, Match):
            return found
        problems.append(f"{machine_type}: {found}")
    raise ResourceError(_refusal(facts, labels, problems or ["no machine_type was given"]))


def _try(machine_type: str, num_gpus: Optional[int], facts: MachineFacts, labels: set[str]) -> Match | str:
    """The match of one machine type, or why there is none."""
    name = machine_type.upper()
    model = None
    remark = ""
    if name in SIZES:
        problem, remark = _size_problem(name, facts)
        if problem:
            return problem
        count = num_gpus or 0
    elif name == "GPU" or name.startswith("GPU-"):
        model = machine_type[len("GPU-") :] or None
        count = 1 if num_gpus is None else num_gpus
    elif machine_type.lower() in labels:
        count = num_gpus or 0
    else:
        return f"neither a label of this machine nor one of {', '.join(SIZES)}, GPU and GPU-<MODEL>"
    there = [gpu for gpu in facts.gpus if model is None or matches_model(gpu.name, model)]
    if len(there) < count:
        kind = "GPUs" if model is None else f"{model} GPUs"
        return f"needs {count} of its {kind}, and it has {len(there) or 'none'}"
    return Match(machine_type, count, model, remark)


def _size_problem(name: str, facts: MachineFacts) -> tuple[str, str]:
    """Why the machine is too small, and what to remark if it is not."""
    cores, memory = SIZES[name]
    lacking = []
    if facts.cores < cores:
        lacking.append(f"{cores:g} cores, and it has {facts.cores}")
    if facts.memory < memory:
        lacking.append(f"{_gb(memory)} of memory, and it has {_gb(facts.memory)}")
    if lacking:
        return "needs " + "; and ".join(lacking), ""
    if facts.memory_free < memory:
        return "", f"{name} asks for {_gb(memory)} of memory, and only {_gb(facts.memory_free)} are free now"
    return "", ""


def _refusal(facts: MachineFacts, labels: Sequence[str], problems: Sequence[str]) -> str:
    devices = ", ".join(f"GPU {gpu.index} {gpu.name}" for gpu in facts.gpus) or "no GPU"
    return (
        f"{facts.hostname} cannot run this call: {'; '.join(problems)}. "
        f"It has {facts.cores} cores, {_gb(facts.memory)} of memory, {devices}, and "
        f"{'the labels ' + ', '.join(labels) if labels else 'no labels'}. "
        "Ask for another machine_type, or run the call on another host"
    )


def _gb(size: float) -> str:
    return f"{size / 10**9:.3g} GB"


# ---------------------------------------------------------------- what the kernel tells


def _memory(groups: Sequence[Path]) -> tuple[int, int]:
    """Bytes of memory in all, and free."""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = values["MemTotal"], values.get("MemAvailable", values["MemFree"])
    for group in groups:
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(group / limit_file), _number(group / usage_file)
            if limit is not None:
                total = min(total, limit)
                free = min(free, max(0, limit - (usage or 0)))
    return total, free


def _cores(groups: Sequence[Path]) -> int:
    """Cores that this process may keep busy, rounded up."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in groups:
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is None:
            quota, period = _quota(group / "cpu.max")
        if quota is not None and period:
            cores = min(cores, quota / period)
    return max(1, math.ceil(cores))


def _cgroups(membership: Path, mount: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, and of all groups around them."""
    try:
        lines = membership.read_text("utf-8").splitlines()
    except FileNotFoundError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = mount / controllers.replace("name=", "") if controllers else mount
        group = top / path.lstrip("/")
        while True:
            if group.is_dir():
                yield group
            if group == top or top not in group.parents:
                break
            group = group.parent


def _number(path: Path) -> Optional[int]:
    """The limit in a control file; None if there is none."""
    try:
        text = path.read_text("ascii").strip()
    except OSError:  # the group has no such controller
        return None
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _quota(path: Path) -> tuple[Optional[int], Optional[int]]:
    try:
        quota, period = path.read_text("ascii").split()
    except (OSError, ValueError):  # the group has no such controller
        return None, None
    return (int(quota), int(period)) if quota.isdigit() else (None, None)
