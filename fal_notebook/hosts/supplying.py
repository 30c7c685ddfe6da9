"""Bring a host the wheels and the Python that it cannot download, when its agent asks for them.

Runs in the notebook, in a thread for each request. What travels goes in pieces that are kept on the host, so
that after a broken connection only the missing ones are sent.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

from fal_agent.errors import FalServerlessException, LinkLostError
from fal_notebook.hosts.bringing import megabytes
from fal_notebook.hosts.platforms import Platform
from fal_notebook.hosts.python_archive import python_for
from fal_notebook.hosts.wheels import chosen_wheels, downloaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_agent.framing import Buffer
    from fal_agent.wire import Want
    from fal_notebook.hosts.client import AgentClient

__all__ = ["in_background"]

_PIECE = 8 << 20  # bytes
_ANSWER = 120.0  # seconds for the agent to put together what has come


def supply(client: AgentClient, want: Want) -> None:
    """Answer what an agent wants; returns when that is done, or the connection broke."""
    try:
        files = list(_Delivery(client, want).files())
        error = ""
    except LinkLostError:
        return  # asked again when it is connected again
    except Exception as problem:  # noqa: BLE001 - whatever it is, a build over there waits for the answer
        files, error = [], str(problem) or type(problem).__name__
    try:
        client.ask("supply", _ANSWER, request=want.request_id, files=files, error=error)
    except LinkLostError:
        return
    except FalServerlessException as problem:  # it arrived damaged, or there is no room
        client.tell("supply", request=want.request_id, files=[], error=str(problem))


class _Delivery:
    """One request being answered."""

    def __init__(self, client: AgentClient, want: Want) -> None:
        self._client, self._want = client, want
        self._target = Platform.of(client.host_name, system="Linux", machine=want.machine, libc=want.libc)
        self._stop = threading.Event()

    def files(self) -> Iterator[list[object]]:
        """Bring the files; gives name, SHA-256 and pieces of each."""
        if self._want.wants_python:
            self._say(f"packing a Python for {self._target}")
            packed = python_for(self._client.host_name, self._target)
            self._say(f"sending Python, {megabytes(len(packed.data))}")
            yield self._bring(f"{packed.name}.tar.gz", hashlib.sha256(packed.data).hexdigest(), packed.data)
            return
        self._say("no package index in reach of the host: the notebook looks for wheels")
        wheels = chosen_wheels(self._want.layers, python=self._want.python, target=self._target)
        lacking = [wheel for wheel in wheels if wheel.name not in self._want.have]
        total, done = sum(wheel.size for wheel in lacking), 0
        for wheel in lacking:
            self._say(f"sending {len(lacking)} packages, {megabytes(done)} of {megabytes(total)}")
            data = downloaded(wheel, stop=self._is_over).read_bytes()
            yield self._bring(wheel.name, wheel.sha256, data)
            done += wheel.size

    def _bring(self, name: str, digest: str, data: bytes) -> list[object]:
        view = memoryview(data)
        pieces: dict[str, Buffer] = {
            f"whl-{digest}-{number}": view[start : start + _PIECE]
            for number, start in enumerate(range(0, len(data), _PIECE))
        }
        missing = self._client.ask("missing", _ANSWER, blobs=list(pieces))
        for piece in missing:
            self._client.upload(piece, pieces[piece], self._stop)
        return [name, digest, list(pieces)]

    def _say(self, text: str) -> None:
        self._client.tell("supplying", request=self._want.request_id, text=text)

    def _is_over(self) -> bool:
        return not self._client.is_open


def in_background(client: AgentClient, want: Want) -> None:
    """Answer in a thread of its own."""
    threading.Thread(target=supply, args=(client, want), name="fal-supply", daemon=True).start()
