"""What handles do: bring their values, stand for them elsewhere, move and delete them.

Runs in the notebook. A value travels in pieces of a file that its session makes, so that memory stays
bounded and an interrupt is heard; on its way to another host it lies in a temporary file here.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import sys
import tempfile
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Protocol

from fal_agent import pickling
from fal_agent.errors import FalServerlessError
from fal_agent.namespaces import load_named
from fal_agent.references import open_reference, split_parts
from fal_notebook.exchange import Request
from fal_notebook.handles import Handle, bytes_as_text, gone_error
from fal_notebook.hosts.base import KeepsData

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import EnvironmentSpec
    from fal_notebook.hosts.base import Host
    from fal_notebook.names import SessionNames
    from fal_notebook.trips import Trip

__all__ = ["Keeper", "SessionOfHandles"]

_AT_ONCE = 16 << 20  # bytes that come in one answer
_TOLD = 64 << 20  # bytes above which it is shown how far a value is
_TELL_EVERY = 0.5  # seconds
_BLOB_SECONDS = 300.0  # in which a blob is taken to be there still; the agent keeps it for 600


class SessionOfHandles(Protocol):
    """What a keeper needs to know of its session."""

    host: Host
    name: str
    names: SessionNames

    def ask_with_data(
        self, request: Request, label: str, *, limit: int | None = None
    ) -> tuple[dict[str, Any], Sequence[Buffer]]:
        """Send a request that runs nothing; give the reply and the buffers beside it."""

    def user_names(self) -> dict[str, Any]:
        """The notebook's names."""

    def environment(self) -> EnvironmentSpec:
        """That the session runs in."""


class Keeper:
    """Looks after the handles of one session.

    Args:
        session: the session.
        other: gives the keeper of a session by its host and name, as `session_on` takes them.
    """

    def __init__(
        self, session: SessionOfHandles, other: Callable[[Host | str | None, str | None], Keeper]
    ) -> None:
        self.session, self._other = session, other
        self._blobs: dict[tuple[str, str], float] = {}  # (host, blob) -> when it was sent

    # ------------------------------------------------------------ here

    def get(self, handle: Handle) -> Any:
        """Bring a value into the notebook.

        Raises:
            FalServerlessError: it is gone, or cannot be pickled.
        """
        __tracebackhide__ = True
        request = self.session.names.request_of(handle)
        (name,) = request.content["wanted"]
        reply, buffers = self.session.ask_with_data(request, f"{handle.name}.get()", limit=_AT_ONCE)
        if reply["stale"] or reply["missing"]:
            raise gone_error([handle.name], handle.host)
        namespace = self.session.user_names()
        if name in reply["names"]:
            start, stop = reply["names"][name]
            value = load_named(buffers[start:stop], namespace)
        else:
            value = load_named(self._bring(handle), namespace)
        self.session.names.note_fetched(handle, value, namespace)
        return value

    def _bring(self, handle: Handle) -> list[Buffer]:
        """Bring the pickle of a large value, piece by piece."""
        path, size, problem = self._export(handle)
        if problem:
            raise FalServerlessError(
                f"{handle.name!r} on {handle.host!r} cannot be brought here: {problem}; use it in a %%fal "
                "cell, or bring what you need of it"
            )
        whole = memoryview(mmap.mmap(-1, size))
        start = 0
        for piece in self._pieces(handle, path, size, "to the notebook"):
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return split_parts(whole)

    # ------------------------------------------------------------ elsewhere

    def refer(self, handle: Handle, trip: Trip) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Give what a pickle says of a handle that travels; it is opened where the pickle is.

        Raises:
            FalServerlessError: it is gone, or cannot be pickled, and has to be.
        """
        session = self.session
        is_here = trip.host.name == session.host.name
        trip.note(handle, session.name if is_here else "", session.environment() if is_here else None)
        if is_here and trip.session == session.name:
            return open_reference, (session.name, handle.version, "", handle.name, "it is gone")
        if not isinstance(trip.host, KeepsData) or not hasattr(trip.host, "connect"):  # this very process
            return pickling.last_of, (self.get(handle),)
        path, size, problem = self._export(handle)
        if is_here:
            return open_reference, (session.name, handle.version, path, handle.name, problem)
        if problem:
            raise FalServerlessError(
                f"{handle.name!r} on {handle.host!r} cannot go to {trip.host.name!r}: {problem}"
            )
        blob = f"moved-{hashlib.blake2b(path.encode(), digest_size=16).hexdigest()}"
        trip.waiting.append(functools.partial(self._relay, handle, path, size, trip.host, blob))
        return open_reference, ("", handle.version, blob, handle.name, "")

    def move(self, handle: Handle, host: Host | str | None, session: str | None) -> Handle:
        """Copy a value to another session, and give a handle on it there."""
        there = self._other(host, session)
        target = there.session
        request = Request.make(wanted=[name := f"_moved_{uuid.uuid4().hex[:12]}"])
        trip = _trip(target)
        opened = self.refer(handle, trip)
        trip.bring()
        parts = pickling.dump_parts(_Reference(*opened))
        request.add(name, parts, version := uuid.uuid4().hex, sum(map(len, parts)))
        request.content["unwatched"] = [name]
        reply, _ = target.ask_with_data(request, f"{handle.name}.to({target.host.name!r})", limit=-1)
        if reply["stale"]:
            raise gone_error([handle.name], handle.host)
        return target.names.take_handle(handle.name, name, reply["handles"][name], version)

    def delete(self, handle: Handle) -> None:
        """Take a value out of its session, under all names that it has there."""
        names = self.session.names.names_of(handle)
        self.session.ask_with_data(Request.make(deleted=names), f"{handle.name}.delete()")
        self.session.names.drop(names)

    # ------------------------------------------------------------ files of a session

    def _export(self, handle: Handle) -> tuple[str, int, str]:
        """Have a value put into a file there: its path, bytes, and why it cannot be."""
        request = self.session.names.request_of(handle)
        (name,) = request.content.pop("wanted")
        request.content.update(wanted=[], exports=[name])
        reply, _ = self.session.ask_with_data(request, f"{handle.name} to a file")
        if reply["stale"] or name not in reply["exported"]:
            raise gone_error([handle.name], handle.host)
        path, size, problem = reply["exported"][name]
        return path, size, problem

    def _pieces(self, handle: Handle, path: str, size: int, where: str) -> Iterator[Buffer]:
        """Read such a file."""
        progress = _Progress(f"{handle.name} from {handle.host} {where}", size)
        for start in range(0, size, _AT_ONCE):
            request = Request.make(reads=[path, start, min(_AT_ONCE, size - start)])
            reply, buffers = self.session.ask_with_data(request, f"{handle.name}: {start >> 20} MiB")
            if not buffers or reply["stale"]:
                raise gone_error([handle.name], handle.host)
            progress.tell(start)
            yield buffers[0]
        progress.end()

    def _relay(self, handle: Handle, path: str, size: int, host: KeepsData, blob: str) -> None:
        """Send such a file to another host, where it becomes a blob, by way of the notebook."""
        sent_at = self._blobs.get((host.name, blob))
        if sent_at is not None and time.monotonic() - sent_at < _BLOB_SECONDS:
            return
        with tempfile.TemporaryFile() as file:
            for piece in self._pieces(handle, path, size, f"to {host.name}"):
                file.write(piece)
            file.flush()
            stop = threading.Event()
            whole = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            try:
                host.upload(blob, memoryview(whole), stop)
            except BaseException:
                stop.set()
                raise
        self._blobs[host.name, blob] = time.monotonic()


class _Reference:
    """Pickles as what `refer` gave."""

    def __init__(self, opener: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._reduced = opener, arguments

    def __reduce__(self) -> Any:
        return self._reduced


class _Progress:
    """One line on stderr for what takes long."""

    def __init__(self, what: str, size: int) -> None:
        self._what, self._size = what, size
        self._began = self._told = time.monotonic()
        self._has_told = False

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if self._size > _TOLD and now - self._told > _TELL_EVERY:
            rate = bytes_as_text(done / (now - self._began))
            sys.stderr.write(
                f"\r{self._what}: {done / self._size:.0%} of {bytes_as_text(self._size)}, {rate}/s "
            )
            sys.stderr.flush()
            self._told, self._has_told = now, True

    def end(self) -> None:
        if self._has_told:
            sys.stderr.write(f"\r{self._what}: {bytes_as_text(self._size)}, done{' ' * 20}\n")


def _trip(session: SessionOfHandles) -> Trip:
    from fal_notebook.trips import Trip

    return Trip(session.host, session.name)
