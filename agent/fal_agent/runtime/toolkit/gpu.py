"""`get_gpu_type`: which GPU this process has.

Runs wherever user code runs; standard library only. It asks the driver's own files, so it starts no
process and loads no library.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["get_gpu_type"]

UNKNOWN = "UNKNOWN"

_DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder per device, named by its place on the bus
_MODEL = re.compile(r"^Model:\s*(.+?)\s*$", re.MULTILINE)
_UUID = re.compile(r"^GPU UUID:\s*(\S+)", re.MULTILINE)
_MAKER = re.compile(
    r"\b(?:NVIDIA|GeForce|Quadro|Tesla|RTX(?= A\d)|Graphics|Device|Laptop GPU)\b\s*", re.IGNORECASE
)
_DATA_CENTRE = re.compile(r"\b(?:GH|GB|[ABHLTVP])\d{1,4}[A-Z]?\b")  # A100, H100, L40S, GB200
_CARD = re.compile(r"\b(?:RTX|GTX) ?(?:PRO )?\d{3,4}(?: (?:Ti|SUPER|Ada))*\b", re.IGNORECASE)


def get_gpu_type() -> str:
    """Name the model of this process's first GPU: "H100", "RTX4090"; "UNKNOWN" without one."""
    devices = _devices()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0].strip()
        if first.isascii() and first.isdigit():  # counted along the bus, as workers are told to
            devices = devices[int(first) :]
        else:
            devices = [text for text in devices if first and _uuid(text).startswith(first)]
    match = _MODEL.search(devices[0]) if devices else None
    return _short(match[1]) if match else UNKNOWN


def _devices() -> list[str]:
    """What the driver says about each device, in the order of the bus."""
    try:
        return [(folder / "information").read_text(errors="replace") for folder in sorted(_DRIVER.iterdir())]
    except OSError:  # no driver, or one that does not tell
        return []


def _uuid(text: str) -> str:
    match = _UUID.search(text)
    return match[1] if match else ""


def _short(model: str) -> str:
    found = _CARD.search(model) or _DATA_CENTRE.search(model)
    name = found[0] if found else _MAKER.sub("", model)
    return re.sub(r"[^A-Za-z0-9_-]+", "", name) or UNKNOWN
