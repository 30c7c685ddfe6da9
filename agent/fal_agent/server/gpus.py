"""Find the machine's GPUs, and lend those that nobody else uses.

Runs in the agent; the only file that asks NVIDIA's library or `nvidia-smi`. Asking takes from a few
milliseconds to seconds: call from a thread. A device is lent to one worker at a time, also when
several agents of the machine lend; one that another process occupies is left alone.
"""

from __future__ import annotations

import csv
import fcntl
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.server.proc import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Gpu", "GpuLender", "list_gpus", "matches_model"]

FOREIGN_BYTES = 100 << 20  # that others may use of a device that is lent; a bare CUDA context takes more
HIDDEN_BYTES = 1 << 30  # that may be in use without a process to it: drivers keep some hundred MiB

_GPU_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used")
_APP_FIELDS = ("gpu_uuid", "pid", "used_memory")
_PLACES = ("/usr/bin", "/usr/local/bin", "/usr/lib/wsl/lib", "/opt/bin")  # where an SSH session may not look


@dataclass(frozen=True)
class Gpu:
    """A device as its driver describes it. Memory is in bytes."""

    index: int  # by PCI bus, as `nvidia-smi` counts
    uuid: str
    name: str
    memory_total: int
    memory_used: int
    processes: tuple[tuple[int, Optional[int]], ...] = ()  # number and memory, None where it is not told


def list_gpus(timeout: float = 5.0) -> list[Gpu]:
    """The devices that this process may use, in the order of their indices; [] without a driver.

    Where CUDA_VISIBLE_DEVICES is set, as a batch system does, only the devices in it.

    Args:
        timeout: seconds to wait for `nvidia-smi`; a driver that hangs counts as none.
    """
    gpus = _ask_library()
    if gpus is None:
        gpus = _ask_program(timeout)
    return _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def matches_model(name: str, model: str) -> bool:
    """Whether a device's name holds a model's name: "A100" is in "NVIDIA A100-SXM4-80GB", not in "RTX A1000".

    Case does not count, nor do spaces and hyphens between words and numbers ("RTX4090", "RTX 4090").
    """
    words = re.findall(r"[a-z]+|\d+", model.lower())
    if not words:
        return False
    before = r"(?<!\d)" if words[0].isdigit() else r"(?<![a-z])"
    after = r"(?!\d)" if words[-1].isdigit() else r"(?![a-z])"
    return re.search(before + r"[\W_]*".join(words) + after, name.lower()) is not None


class GpuLender:
    """The machine's devices, lent by number.

    Args:
        read: gives the devices as they are now.
        locks: folder shared with the other agents of the machine; a device that is lent is locked there
            for as long as its lender lives.

    Attributes:
        reason: why the last `lend` gave nothing.
    """

    def __init__(self, read: Callable[[], list[Gpu]] = list_gpus, *, locks: Optional[Path] = None) -> None:
        self._read, self._locks = read, locks
        self._lent: dict[int, int] = {}  # device -> descriptor of its lock, -1 without
        self._turn = threading.Lock()
        self.reason = ""

    def lend(
        self, count: int, model: Optional[str] = None, own_pids: Iterable[int] = ()
    ) -> Optional[list[int]]:
        """Lend devices, those with the least memory in use first.

        Args:
            count: how many.
            model: see `matches_model`; None for any.
            own_pids: our workers, whose leftovers on a device are not somebody else's.

        Returns:
            Indices in ascending order, to be given back to `release`; None when fewer than `count` are
            free, and then `reason` tells a person why.

        Raises:
            OSError: the disk holds no locks.
        """
        own = frozenset(own_pids)
        with self._turn:
            gpus = [gpu for gpu in self._read() if model is None or matches_model(gpu.name, model)]
            taken: list[int] = []
            refusals: list[str] = []
            for gpu in sorted(gpus, key=lambda gpu: (gpu.memory_used, gpu.index)):
                try:
                    refusal = self._take(gpu, own)
                except OSError:
                    self._give_back(taken)
                    raise
                if refusal is not None:
                    refusals.append(refusal)
                else:
                    taken.append(gpu.index)
                if len(taken) == count:
                    self.reason = ""
                    return sorted(taken)
            self._give_back(taken)
            self.reason = _reason(count, model, len(gpus), refusals)
            return None

    def release(self, devices: Sequence[int]) -> None:
        """Take lent devices back."""
        with self._turn:
            self._give_back(devices)

    def _take(self, gpu: Gpu, own: frozenset[int]) -> Optional[str]:
        """Lend one device, or say why not."""
        if gpu.index in self._lent:
            return f"GPU {gpu.index} is lent to a worker"
        occupant = _occupant(gpu, own)
        if occupant is not None:
            return f"GPU {gpu.index} is used by {occupant}"
        lock = self._lock(gpu)
        if lock is None:
            return f"GPU {gpu.index} is lent by another agent"
        self._lent[gpu.index] = lock
        return None

    def _lock(self, gpu: Gpu) -> Optional[int]:
        if self._locks is None:
            return -1
        self._locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9-]", "_", gpu.uuid)
        fd = os.open(
            self._locks / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _give_back(self, devices: Sequence[int]) -> None:
        for index in devices:
            lock = self._lent.pop(index, -1)
            if lock >= 0:
                os.close(lock)


# ---------------------------------------------------------------- who uses a device


def _occupant(gpu: Gpu, own: frozenset[int]) -> Optional[str]:
    """Who else occupies a device, in words; None if nobody does."""
    foreign = [(pid, used) for pid, used in gpu.processes if not _is_own(pid, own)]
    known = sum(used or 0 for _, used in gpu.processes)
    if sum(used if used is not None else FOREIGN_BYTES + 1 for _, used in foreign) > FOREIGN_BYTES:
        pid, used = max(foreign, key=lambda item: item[1] or 0)
        text = f"process {pid}{_owner(pid)}"
        return text if used is None else f"{text} with {_gib(used)}"
    if not gpu.processes and gpu.memory_used - known > HIDDEN_BYTES:
        return f"processes that are not visible from here, with {_gib(gpu.memory_used)}"
    return None


def _is_own(pid: int, own: frozenset[int]) -> bool:
    """A worker leads its session: what it starts belongs to it."""
    if pid in own:
        return True
    found = process(pid)
    return found is not None and (found.session in own or found.group in own)


def _owner(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
        return f" ({command} of {Path(f'/proc/{pid}').owner()})"
    except (OSError, KeyError):  # gone, hidden, or of a user without a name
        return ""


def _reason(count: int, model: Optional[str], found: int, refusals: Sequence[str]) -> str:
    kind = f"{'' if model is None else model + ' '}GPU{'s' * (count > 1)}"
    if found < count:
        have = "has none" if found == 0 else f"has {found}"
        return f"{count} {kind} were asked for, and this machine {have}"
    free = found - len(refusals)
    return f"waiting for {count} {kind}, {free} of {found} free: {'; '.join(sorted(refusals))}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _visible(gpus: Sequence[Gpu], variable: Optional[str]) -> list[Gpu]:
    """The devices that CUDA_VISIBLE_DEVICES names, by index or by the beginning of an UUID."""
    if variable is None:
        return list(gpus)
    names = [name.strip() for name in variable.split(",") if name.strip()]
    return [gpu for gpu in gpus if any(name == str(gpu.index) or _names(name, gpu.uuid) for name in names)]


def _names(name: str, uuid: str) -> bool:
    return name.upper().startswith("GPU-") and uuid.upper().startswith(name.upper())


# ---------------------------------------------------------------- NVIDIA's library, where it is installed


def _ask_library() -> Optional[list[Gpu]]:
    """The devices through nvidia-ml-py; None where that, or the driver, does not answer."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return [_device(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # `nvidia-smi` may tell more, or the same
        return None


def _device(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    users = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return Gpu(
        index=index,
        uuid=_string(nvml.nvmlDeviceGetUUID(handle)),
        name=_string(nvml.nvmlDeviceGetName(handle)),
        memory_total=int(memory.total),
        memory_used=int(memory.used),
        processes=tuple((int(user.pid), user.usedGpuMemory) for user in users),
    )


def _string(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# ---------------------------------------------------------------- nvidia-smi


def _ask_program(timeout: float) -> list[Gpu]:
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=os.pathsep.join(_PLACES))
    if program is None:
        return []
    rows = _query(program, "gpu", _GPU_FIELDS, timeout)
    if not rows:
        return []
    users: dict[str, list[tuple[int, Optional[int]]]] = {}
    for uuid, pid, used in _query(program, "compute-apps", _APP_FIELDS, timeout):
        if pid.isdigit():
            users.setdefault(uuid, []).append((int(pid), _mib(used)))
    return [
        Gpu(int(index), uuid, name, _mib(total) or 0, _mib(used) or 0, tuple(users.get(uuid, ())))
        for index, uuid, name, total, used in rows
        if index.isdigit()
    ]


def _query(program: str, what: str, fields: Sequence[str], timeout: float) -> list[list[str]]:
    """Rows of one query; none when the program fails, hangs, or says something else."""
    command = [program, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    rows = [[field.strip() for field in row] for row in csv.reader(lines, skipinitialspace=True)]
    return [row for row in rows if len(row) == len(fields)]


def _mib(text: str) -> Optional[int]:
    """Bytes of a number of MiB; None where the driver does not tell ("[N/A]")."""
    return int(text) << 20 if text.isdigit() else None
