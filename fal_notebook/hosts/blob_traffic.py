"""Large data on its way between the notebook and an agent.

Runs in the notebook. Data has a name, and goes once: what the agent has is known until it says otherwise. An
agent on this machine shares its folder of blobs, and then nothing travels; else it goes in parts beside
everything else, and after a break on from what has arrived.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import uuid
from typing import TYPE_CHECKING

from fal_agent.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from fal_agent.duplex import Duplex
    from fal_agent.errors import LinkLostError
    from fal_agent.framing import Buffer
    from fal_agent.wire import BlobPart

__all__ = ["BlobTraffic"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PIECE = 64 << 20  # bytes written at once
_LARGE = 4 << 20  # bytes from which it is worth a round trip to ask how much of a blob the agent has


class BlobTraffic:
    """The blobs of one connection, in both directions.

    Args:
        duplex: the connection.
        part_size: bytes of one part of a blob that is sent.
        folder: where the agent keeps blobs, if this process can read and write there.
        arrived: asks the agent how many bytes it has of a blob, by its name and size.
        broken: makes the error to raise when the connection takes no bytes.

    Attributes:
        known: names that the agent has.
    """

    def __init__(
        self,
        duplex: Duplex,
        *,
        part_size: int,
        folder: Path | None,
        arrived: Callable[[str, int], int],
        broken: Callable[[OSError], LinkLostError],
    ) -> None:
        self.known: set[str] = set()
        self._duplex, self._part_size, self._folder, self._broken = duplex, part_size, folder, broken
        self._arrived = arrived
        self._incoming: dict[str, tuple[bytearray, int]] = {}  # what has come of a blob, and its size
        self._turns: dict[str, threading.Lock] = {}  # by blob
        self._naming = threading.Lock()
        self._bringing = threading.Lock()  # held while a blob travels that no call names

    # ------------------------------------------------------------ to the agent

    def send_once(
        self, name: str, data: Buffer, stop: Callable[[], bool], sent: Callable[[int], None]
    ) -> None:
        """Send a blob that the agent has not got; of two calls with the same data the second waits.

        Args:
            name: of the blob.
            data: all of it.
            stop: whether to give up, asked between two parts.
            sent: told how many bytes have gone, part by part; first of all those that were there.

        Raises:
            LinkLostError: the connection broke.
            OSError: the disk fails, where the agent is on this machine.
        """
        with self._naming:
            turn = self._turns.setdefault(name, threading.Lock())
        with turn:
            if name not in self.known:
                self._send(name, data, stop, sent)
                if not stop():
                    self.known.add(name)

    def bring(self, name: str, data: Buffer, stop: Callable[[], bool]) -> None:
        """Send a blob that no call names, one after the other; arguments and errors as `send_once`."""
        with self._bringing:
            self._send(name, data, stop, None)

    def _send(
        self, name: str, data: Buffer, stop: Callable[[], bool], sent: Callable[[int], None] | None
    ) -> None:
        if self._folder is not None:
            _write(self._folder, name, data)
            return
        size = memoryview(data).nbytes
        start = self._arrived(name, size) if size >= _LARGE else 0
        if start and sent is not None:
            sent(start)
        try:
            self._duplex.send_blob(name, data, part_size=self._part_size, start=start, stop=stop, sent=sent)
        except OSError as error:
            raise self._broken(error) from None

    # ------------------------------------------------------------ from the agent, in the reading thread

    def take_part(self, message: BlobPart, buffers: list[bytes]) -> None:
        """Keep a part of a blob that an event will refer to.

        Raises:
            ProtocolError: it does not continue what has come.
        """
        data = buffers[0] if buffers else b""
        if message.offset == 0:
            self._incoming[message.blob] = bytearray(), message.size
        whole, size = self._incoming.get(message.blob, (bytearray(), -1))
        if message.offset != len(whole) or size != message.size or len(whole) + len(data) > size:
            raise ProtocolError("data came out of order, or more of it than was announced")
        whole += data  # what was announced but does not come takes no memory

    def take_over(self, earlier: BlobTraffic) -> dict[str, int]:
        """Keep what came of blobs on an earlier connection of ours, which has broken.

        Returns:
            Bytes of each that are new here, by name: the agent is to send what follows.
        """
        if earlier is self or not earlier._duplex.has_ended:  # then more of them may come there
            return {}
        taken, earlier._incoming = earlier._incoming, {}
        self._incoming.update(taken)
        return {name: len(whole) for name, (whole, _) in taken.items()}

    def parts(self, refs: Iterable[int | str], buffers: list[bytes]) -> list[Buffer]:
        """Give what an event refers to: buffers beside it by their index, blobs by their name.

        Raises:
            ProtocolError: there is no such thing.
            OSError: a blob cannot be read, where the agent is on this machine.
        """
        return [self._part(ref, buffers) for ref in refs]

    def _part(self, ref: int | str, buffers: list[bytes]) -> Buffer:
        if isinstance(ref, int):
            if not 0 <= ref < len(buffers):
                raise ProtocolError(f"an event refers to buffer {ref} of {len(buffers)}")
            return buffers[ref]
        if self._folder is None:
            whole, size = self._incoming.pop(ref, (b"", -1))
            if len(whole) != size:
                raise ProtocolError("an event refers to data that did not come, or not all of it")
            return whole
        if not _NAME.fullmatch(ref):
            raise ProtocolError(f"{ref!r:.80} names no data")
        with (self._folder / ref).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) if size else b""


def _write(folder: Path, name: str, data: Buffer) -> None:
    """Put a blob where the agent of this machine keeps them; it appears whole or not at all."""
    target = folder / name
    if target.exists():
        return
    beside = folder / f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view[:_PIECE]) :]
        finally:
            os.close(fd)
        beside.rename(target)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
