"""This machine as a host: the same agent, workers and environments, without a network.

Runs in the notebook.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

from fal_agent.errors import HostError, HostUnreachableError
from fal_agent.folders import appearing_whole
from fal_agent.paths import code_folder, default_root, socket_path
from fal_notebook import config
from fal_notebook.hosts.agent_host import AgentHost, agent_answer, agent_options
from fal_notebook.hosts.archive import Archive, source_archive
from fal_notebook.hosts.client import AgentClient

__all__ = ["LocalHost"]

_START_TIMEOUT = 60.0  # seconds
_PART_SIZE = 1 << 20


class LocalHost(AgentHost):
    """This machine: calls run in environments and workers of their own, under the user's agent.

    Args:
        name: how messages call it.
    """

    def __init__(self, name: str = "local") -> None:
        super().__init__(name)

    @property
    def working_folder(self) -> str | None:
        """The notebook's own working folder, so that relative paths mean the same."""
        try:
            return os.getcwd()  # noqa: PTH109 - asked for each call, and Path.cwd() takes ten times as long
        except FileNotFoundError:  # somebody removed it
            return None

    def _connect(self) -> AgentClient:
        root, archive = default_root(), source_archive()
        path = socket_path(root, archive.digest)
        stream = _dial(path)
        if stream is not None:
            with contextlib.suppress(HostError):  # it was about to end, and is started anew
                return self._greet(stream, root)
        code = _unpack(root, archive)
        path = Path(_start(self.name, root, archive.digest, code))
        stream = _dial(path)
        if stream is None:
            raise HostUnreachableError(
                f"the agent of this machine started, but {path} cannot be connected to"
            )
        return self._greet(stream, root)

    def _greet(self, stream: socket.socket, root: Path) -> AgentClient:
        return AgentClient(
            stream, host_name=self.name, part_size=_PART_SIZE, dial=_connect_to, blob_folder=root / "blobs"
        )


class _Stream(socket.socket):
    """A socket whose `close` ends the connection even while another thread waits for bytes."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it never was connected, or is not any more
            self.shutdown(socket.SHUT_RDWR)
        super().close()


def _dial(path: Path) -> socket.socket | None:
    try:
        return _connect_to(str(path))
    except OSError:
        return None


def _connect_to(path: str) -> socket.socket:
    stream = _Stream(socket.AF_UNIX)
    try:
        stream.connect(path)
        _refuse_others(stream, path)
    except OSError:
        stream.close()
        raise
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return stream


def _refuse_others(stream: socket.socket, path: str) -> None:
    """Make sure that it is this user who listens: a folder that all may write to is in some sockets' paths.

    Raises:
        ConnectionRefusedError: it is another one.
    """
    if not hasattr(socket, "SO_PEERCRED"):  # not Linux
        return
    _pid, uid, _gid = struct.unpack("3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (os.getuid(), 0):  # root may be anybody anyway
        raise ConnectionRefusedError(f"another user (number {uid}) listens at {path}")


def _unpack(root: Path, archive: Archive) -> Path:
    """Put the sources where the agent and its workers import them from; whole or not at all."""
    folder = code_folder(root, archive.digest)
    if folder.is_dir():
        return folder
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with appearing_whole(folder) as beside:
        for name, content in archive.files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_bytes(content)
    return folder


def _start(name: str, root: Path, digest: str, code: Path) -> str:
    base_python = getattr(sys, "_base_executable", None) or sys.executable
    variables = {**os.environ, "PYTHONPATH": str(code), "FAL_NOTEBOOK_PYTHON": base_python}
    command = [sys.executable, "-m", "fal_agent", "start", "--root", str(root), "--digest", digest]
    try:
        done = subprocess.run(
            [*command, *agent_options(config.load().host(name))],
            env=variables,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_START_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HostUnreachableError(
            f"the agent of this machine did not start within {_START_TIMEOUT:g} s"
        ) from None
    return str(agent_answer(name, done.stdout, done.stderr)["socket"])
