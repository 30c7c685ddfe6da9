"""Bring large files to a machine that has a shell and little else; what was cut off goes on where it was.

Runs in the notebook. A file gathers beside its place under a name made of its hash, so that it is found
again after the connection broke. Its hash is compared on the machine before it takes its place.
"""

from __future__ import annotations

import hashlib
import shlex
from typing import TYPE_CHECKING

from fal_agent.errors import HostError
from fal_notebook.hosts import steps

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Link

__all__ = ["bring", "megabytes", "tool_script", "unpack"]

_PIECE = 8 << 20  # bytes sent by one command, so that much has arrived for certain when it ends
_SLOWEST = 20_000  # bytes per second
_QUICK, _LONG = 60.0, 600.0  # seconds that a command may take
_TRIES = 2  # for a file that arrived damaged

_SIZE = "umask 077; mkdir -p {folder} && wc -c < {part} 2>/dev/null || echo 0"
_APPEND = "umask 077; cat >> {part}"
# Prints the SHA-256 by whichever program there is.
_FINISH = """
sum=$( (sha256sum {part} || busybox sha256sum {part} || openssl dgst -sha256 -r {part}) 2>/dev/null |
  cut -c1-64)
if [ "${{sum:-{digest}}}" != {digest} ]; then rm -f {part}; echo "it arrived damaged" >&2; exit 3; fi
chmod {mode:o} {part} && mv -f {part} {path}
"""
_DAMAGED = 3
_UNPACK = """
umask 077
beside={folder}.$$
mkdir -p "$beside" || exit 1
{gunzip} < {archive} | tar -xf - -C "$beside" || {{ rm -rf "$beside"; exit 1; }}
[ -d {folder} ] || mv "$beside" {folder}
rm -rf "$beside" {archive}
"""


def bring(link: Link, path: str, data: bytes, *, what: str, mode: int = 0o600) -> None:
    """Put a file on the machine, whole or not at all.

    Args:
        link: leads there.
        path: where it goes; its folder is made.
        data: its content.
        what: its name for people.
        mode: permissions.

    Raises:
        HostError: it cannot be written there, or arrives damaged time and again.
    """
    digest = hashlib.sha256(data).hexdigest()
    folder, part = path.rpartition("/")[0], f"{path}.{digest[:16]}.part"
    places = {"folder": shlex.quote(folder), "part": shlex.quote(part), "path": shlex.quote(path)}
    for _ in range(_TRIES):
        _send(link, places, data, what=what)
        finish = _FINISH.format(**places, digest=digest, mode=mode)
        done = link.run(finish, timeout=_LONG)
        if done.status == 0:
            return
        if done.status != _DAMAGED:
            break
    raise HostError(f"{what} could not be put into {path}: {_said(done.stderr)}")


def _send(link: Link, places: dict[str, str], data: bytes, *, what: str) -> None:
    offset = _arrived(link, places, len(data))
    if offset:
        steps.tell(f"sending {what}: going on at {megabytes(offset)} of {megabytes(len(data))}")
    while offset < len(data):
        piece = data[offset : offset + _PIECE]
        timeout = _QUICK + len(piece) / _SLOWEST
        done = link.run(_APPEND.format(**places), stdin=piece, timeout=timeout)
        if done.status != 0:
            raise HostError(f"{what} could not be put into {places['path']}: {_said(done.stderr)}")
        offset += len(piece)
        steps.tell(f"sending {what}: {megabytes(offset)} of {megabytes(len(data))}")


def _arrived(link: Link, places: dict[str, str], size: int) -> int:
    """How many bytes of a file are there already."""
    done = link.run(_SIZE.format(**places), timeout=_QUICK)
    text = done.stdout.decode("ascii", "replace").strip()
    if done.status != 0 or not text.isdecimal():
        raise HostError(f"{places['folder']} cannot be written to: {_said(done.stderr)}")
    if int(text) <= size:
        return int(text)
    link.run(f"rm -f {places['part']}", timeout=_QUICK)
    return 0


def unpack(link: Link, archive: str, folder: str, *, gunzip: bool) -> None:
    """Unpack a tar file on the machine into a folder that appears whole; the file is removed.

    Args:
        link: leads there.
        archive: the file.
        folder: the new folder; one that is there stays.
        gunzip: the file is compressed.

    Raises:
        HostError: that failed.
    """
    script = _UNPACK.format(
        folder=shlex.quote(folder), archive=shlex.quote(archive), gunzip="gzip -dc" if gunzip else "cat"
    )
    done = link.run(script, timeout=_LONG)
    if done.status != 0:
        raise HostError(f"{archive} could not be unpacked: {_said(done.stderr)}")


def tool_script(*tools: str) -> str:
    """Give a script that prints the names of those programs that a machine has."""
    return f"for tool in {' '.join(tools)}; do command -v $tool >/dev/null 2>&1 && echo $tool; done; :"


def megabytes(size: int) -> str:
    """Give a size for people: "19.3 MB"."""
    return f"{size / 1e6:.1f} MB"


def _said(stderr: bytes) -> str:
    return stderr.decode("utf-8", "replace").strip()[-500:] or "it does not say why"
