"""Where things lie on a host; the same for whoever looks.

Runs everywhere.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["code_folder", "default_root", "socket_path"]

_MAX_SOCKET_PATH = 100  # bytes; Linux allows 107


def default_root() -> Path:
    """Folder of everything that is kept on this host: $FAL_NOTEBOOK_HOME, else ~/.fal_notebook."""
    return Path(os.environ.get("FAL_NOTEBOOK_HOME") or Path.home() / ".fal_notebook").expanduser().absolute()


def code_folder(root: Path, digest: str) -> Path:
    """Where the sources of a digest are unpacked."""
    return root / "code" / digest


def socket_path(root: Path, digest: str) -> Path:
    """Where the agent of a source digest listens; beside the root's run folder if that path is too long."""
    path = root / "run" / digest[:16] / "agent.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    short = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/fal-notebook-{os.getuid()}")  # noqa: S108 - checked to be ours
    folder = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]  # another folder's agent is another one
    return short / f"{digest[:16]}-{folder}.sock"
