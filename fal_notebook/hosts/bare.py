"""Bring uv and a Python to a machine that lacks them, after saying how much that is.

Runs in the notebook. A machine that reaches the internet downloads its Python itself; otherwise one is
sent. Nothing is sent to a machine that it would not run on.
"""

from __future__ import annotations

import gzip
import hashlib
import platform
import re
import shlex
from typing import TYPE_CHECKING

from fal_agent.errors import HostUnreachableError
from fal_notebook.hosts import steps
from fal_notebook.hosts.bringing import bring, megabytes, tool_script, unpack
from fal_notebook.hosts.platforms import Platform
from fal_notebook.hosts.python_archive import COMPILERS_LIBRARIES, python_for
from fal_notebook.hosts.uv_binary import uv_for

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Link

__all__ = ["LIBC_SCRIPT", "provide"]

_QUICK, _DOWNLOAD, _UNPACK = 60.0, 600.0, 300.0  # seconds that a command may take

# Prints "glibc 2.36" or "musl 1.2.3", or nothing if that cannot be found out.
LIBC_SCRIPT = r"""
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || libc=
for loader in /lib/ld-musl-*.so.1; do
  [ -n "$libc" ] || [ ! -e "$loader" ] || libc="musl $("$loader" 2>&1 | sed -n 's/^Version //p')"
done
for loader in /lib64/ld-linux*.so.2 /lib/ld-linux*.so.? /lib/*/ld-linux*.so.?; do
  [ -n "$libc" ] || [ ! -e "$loader" ] ||
    libc="glibc $("$loader" --version 2>/dev/null | sed -n '1s/.* \([0-9.]*[0-9]\)\.*$/\1/p')"
done
echo "$libc"
"""
# Has the machine's uv download a Python; fails within seconds where there is no internet.
_OWN_DOWNLOAD = """
export UV_PYTHON_INSTALL_DIR={pythons} UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
export UV_PYTHON_INSTALL_BIN=0 UV_NO_PROGRESS=1 NO_COLOR=1
{uv} python install cpython@{version} >&2 && {uv} python find --managed-python cpython@{version}
"""
# Where a machine has libraries that we brought, its own are better: they fit its drivers.
_OWN_LIBRARIES = """
for name in {names}; do
  for own in /lib/$name /usr/lib/$name /lib64/$name /usr/lib64/$name /lib/*/$name /usr/lib/*/$name; do
    [ ! -e "$own" ] || rm -f {folder}/lib/$name
  done
done
"""
_CUT_OFF = "umask 077; mkdir -p {root}/wheels && : > {root}/wheels/.cut-off"
_WORKS = "{python} -c 'import sys, sqlite3, fcntl, ssl, ctypes; print(sys.version_info[:2] >= (3, 9))'"


def provide(link: Link, host_name: str, facts: dict[str, str]) -> None:
    """Bring what a machine lacks.

    Args:
        link: leads there.
        host_name: for messages.
        facts: as the probe gives them; "python" and "uv" are set to what is there afterwards.

    Raises:
        HostUnreachableError: nothing we have would run there, or it cannot be had here.
        HostError: it cannot be put there, or the connection broke: the next try goes on where this one was.
    """
    libc = link.run(LIBC_SCRIPT, timeout=_QUICK).stdout.decode("utf-8", "replace").strip()[:40]
    target = Platform.of(host_name, system=facts["system"], machine=facts["machine"], libc=libc)
    tools = link.run(tool_script("tar", "gzip"), timeout=_QUICK).stdout.decode().split()
    root = facts["root"]
    if not facts["uv"]:
        facts["uv"] = _bring_uv(link, host_name, target, root, can_unzip="gzip" in tools)
    if not facts["python"]:
        found = _download_there(link, facts["uv"], root)
        facts["python"] = found or _bring_python(link, host_name, target, root, tools)


def _bring_uv(link: Link, host_name: str, target: Platform, root: str, *, can_unzip: bool) -> str:
    program = uv_for(host_name, target)
    place = f"{root}/bin/uv"
    if can_unzip:
        packed = gzip.compress(program, compresslevel=4, mtime=0)
        steps.tell(f"it has no uv: sending one, {megabytes(len(packed))}")
        bring(link, f"{place}.gz", packed, what="uv")
        quoted = shlex.quote(place)
        script = (
            f"umask 077; gzip -dc < {quoted}.gz > {quoted}.$$ && chmod 700 {quoted}.$$ && "
            f"mv -f {quoted}.$$ {quoted} && rm -f {quoted}.gz"
        )
        if link.run(script, timeout=_UNPACK).status == 0:
            return place
    steps.tell(f"it has no uv: sending one, {megabytes(len(program))}")
    bring(link, place, program, what="uv", mode=0o700)
    return place


def _download_there(link: Link, uv: str, root: str) -> str:
    """Let the machine's own uv download a Python; empty if it cannot."""
    version = ".".join(platform.python_version_tuple()[:2])
    steps.tell(f"it has no Python: its uv tries to download {version}")
    script = _OWN_DOWNLOAD.format(pythons=shlex.quote(f"{root}/pythons"), uv=shlex.quote(uv), version=version)
    done = link.run(script, timeout=_DOWNLOAD)
    if done.status != 0:  # the agent need not find out again
        link.run(_CUT_OFF.format(root=shlex.quote(root)), timeout=_QUICK)
    found = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return found[-1] if done.status == 0 and found else ""


def _bring_python(link: Link, host_name: str, target: Platform, root: str, tools: list[str]) -> str:
    if "tar" not in tools:
        raise HostUnreachableError(
            f"{host_name!r} has no Python, cannot download one, and has no tar to unpack one with; install "
            "Python 3.9 or newer, or tar, there"
        )
    packed = python_for(host_name, target)
    data = packed.data if "gzip" in tools else gzip.decompress(packed.data)
    version = re.sub(r"cpython-([\d.]+)-.*", r"\1", packed.name)
    size = megabytes(len(data))
    steps.tell(f"sending Python {version} ({packed.source}), {size}")
    folder = f"{root}/pythons/{packed.name}-{hashlib.sha256(data).hexdigest()[:8]}"
    bring(link, f"{folder}.tar", data, what=f"Python {version}")
    unpack(link, f"{folder}.tar", folder, gunzip="gzip" in tools)
    link.run(_OWN_LIBRARIES.format(folder=shlex.quote(folder), names=" ".join(COMPILERS_LIBRARIES)))
    python = f"{folder}/bin/python3"
    done = link.run(_WORKS.format(python=shlex.quote(python)), timeout=_QUICK)
    if done.stdout.strip() != b"True":
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        link.run(f"rm -rf {shlex.quote(folder)}", timeout=_QUICK)
        raise HostUnreachableError(
            f"the Python that was brought to {host_name!r} ({target}) does not run there: {said}. "
            "Install Python 3.9 or newer there"
        )
    return python
