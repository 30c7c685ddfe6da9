"""Where things lie on a host; the same for whoever looks.

Runs everywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

__all__ = ["code_folder", "default_root", "local_folder", "run_folder", "socket_path", "state_folder"]

_MAX_SOCKET_PATH = 100  # bytes; Linux allows 107
_LOCAL_PLACES = ("/var/tmp", "/tmp", "/dev/shm")  # noqa: S108 - the folder made there is checked to be ours
_NETWORKED = frozenset(
    (
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "lustre", "gpfs", "ceph", "glusterfs", "beegfs",
        "panfs", "wekafs", "9p", "virtiofs",
    )
)  # fmt: skip
_LOCAL_FUSE = frozenset(("fuse.fuse-overlayfs", "fuse.mergerfs"))


def default_root() -> Path:
    """Folder of everything that is kept on this host: $FAL_NOTEBOOK_HOME, else ~/.fal_notebook."""
    return Path(os.environ.get("FAL_NOTEBOOK_HOME") or Path.home() / ".fal_notebook").expanduser().absolute()


def code_folder(root: Path, digest: str) -> Path:
    """Where the sources of a digest are unpacked."""
    return root / "code" / digest


def state_folder(root: Path) -> Path:
    """Where this machine's agents keep what is theirs alone: sockets, locks, the journal.

    That is the root, unless it is on a network file system. There, other machines may have the same root,
    and their agents, the same locks; and many such file systems hold no sockets.
    """
    return local_folder() / _name_of(root) if is_networked(root) else root


def run_folder(root: Path, digest: str) -> Path:
    """Where the agent of a source digest has its lock and its log, and its socket if the path is short."""
    return state_folder(root) / "run" / digest[:16]


def socket_path(root: Path, digest: str) -> Path:
    """Where the agent of a source digest listens; beside the root's run folder if that path is too long."""
    path = run_folder(root, digest) / "agent.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    return local_folder() / f"{digest[:16]}-{_name_of(root)}.sock"  # another folder's agent is another one


def local_folder() -> Path:
    """A folder of this user on this machine's own disk; may not exist yet.

    It does not depend on the environment, so that whoever looks for an agent looks where it is.
    """
    place = next((p for p in _LOCAL_PLACES if os.access(p, os.W_OK | os.X_OK)), _LOCAL_PLACES[0])
    return Path(place, f"fal-notebook-{os.getuid()}")


def is_networked(path: Path) -> bool:
    """Whether a path, or what of it exists, is on a file system that other machines may have as well."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:  # not Linux
        return False
    kind = _file_system(mounts, os.path.realpath(path))
    return kind in _NETWORKED or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


def _file_system(mounts: str, path: str) -> str:
    """The type of the file system that a path is on, by the text of mountinfo; "" if it does not say."""
    longest, kind = "", ""
    for line in mounts.splitlines():
        before, found, after = line.partition(" - ")
        if not found:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split(" ")[4])
        folder = point if point.endswith("/") else point + "/"
        if (path + "/").startswith(folder) and len(point) >= len(longest):  # a later one covers an earlier
            longest, kind = point, after.split(" ")[0]
    return kind


def _name_of(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
