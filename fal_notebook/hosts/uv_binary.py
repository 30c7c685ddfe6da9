"""Get the static uv program for another machine, from the package index this machine uses.

Runs in the notebook. The musl build is one static file that runs on any Linux of its architecture.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fal_agent.errors import HostUnreachableError

if TYPE_CHECKING:
    from fal_notebook.hosts.platforms import Platform

__all__ = ["can_bring", "uv_for"]

_TIMEOUT = 300.0  # seconds


def can_bring(system: str, machine: str) -> bool:
    """Whether there is a static uv for a platform, named as `uname -s` and `uname -m` do."""
    return system == "Linux" and machine in ("x86_64", "aarch64", "arm64")


def uv_for(host_name: str, target: Platform) -> bytes:
    """Give the program's bytes.

    Args:
        host_name: for messages.
        target: the host's platform.

    Raises:
        HostUnreachableError: it cannot be fetched.
    """
    import uv

    platform = target.uv_target
    version = subprocess.run(
        [uv.find_uv_bin(), "--version"], capture_output=True, text=True, timeout=_TIMEOUT, check=True
    ).stdout.split()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [uv.find_uv_bin(), "pip", "install", "--target", folder, "--python-platform", platform,
                   "--only-binary", ":all:", "--no-deps", "--quiet", f"uv=={version}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        program = Path(folder) / "bin" / "uv"
        if done.returncode != 0 or not program.is_file():
            raise HostUnreachableError(
                f"{host_name!r} has no uv, and its build for {platform} could not be fetched:\n"
                f"{done.stderr.strip()}\n"
                "Install uv there, or try again with the package index in reach"
            )
        return program.read_bytes()
