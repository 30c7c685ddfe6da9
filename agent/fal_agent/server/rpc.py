"""One notebook's connection to the agent: frames in, frames out, blobs between them.

Runs in the agent, on its event loop. Events of one run leave in order; those of other runs may pass
while a large one is on its way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Optional, cast

from fal_agent.errors import FalServerlessException, ProtocolError
from fal_agent.framing import Buffer, FrameDecoder
from fal_agent.pace import LARGEST, Pace
from fal_agent.wire import PART_SIZE, BlobPart, Message, decode, encode

if TYPE_CHECKING:
    from fal_agent.server.prepared import Prepared

__all__ = ["Connection"]

_log = logging.getLogger(__name__)

# blob, part size, where to begin -> offset, size, data
ReadParts = Callable[[str, int, int], Iterator[tuple[int, int, bytes]]]


class Connection(asyncio.Protocol):
    """A connected notebook.

    Args:
        on_message: called with every message and its raw buffers.
        on_lost: called once when the connection is gone.
        read_parts: gives the pieces of a blob.

    Attributes:
        client_id: who is calling, once it has said so.
        templates: calls by the client's names for them.
        arrived: bytes that the client has of blobs already, by name.
        shares_files: the client reads and writes the blobs' files itself, being on this machine.
    """

    def __init__(
        self,
        on_message: Callable[[Connection, Message, list[bytes]], None],
        on_lost: Callable[[Connection], None],
        read_parts: ReadParts,
    ) -> None:
        self._on_message, self._on_lost, self._read_parts = on_message, on_lost, read_parts
        self._decoder = FrameDecoder()
        self._transport: Optional[asyncio.Transport] = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._queues: dict[str, deque[tuple[bytes, Sequence[str]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.client_id = ""
        self.templates: OrderedDict[str, Prepared] = OrderedDict()  # what its calls' templates stand for
        self.part_size = PART_SIZE
        self.arrived: dict[str, int] = {}
        self.shares_files = False
        self._heard = time.monotonic()

    @property
    def writer(self) -> str:
        """Who sends blobs on this connection, as `BlobStore` tells senders apart."""
        return f"{self.client_id}/{id(self)}"

    # ------------------------------------------------------------ what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=1 << 20)

    def data_received(self, data: bytes) -> None:
        """Hand on the messages that the bytes complete; nonsense ends the connection."""
        self._heard = time.monotonic()
        try:
            for frame in self._decoder.feed(data):
                self._on_message(self, decode(frame), frame.buffers)
        except ProtocolError as error:
            _log.warning("closing a connection: %s", error)
            self.close()

    def pause_writing(self) -> None:
        """The client reads slowly."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The client caught up."""
        self._writable.set()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """Stop sending."""
        if exc is not None:
            _log.info("connection of %s lost: %s", self.client_id, exc)
        self._transport = None
        self._writable.set()
        for task in self._tasks:
            task.cancel()
        self._on_lost(self)

    # ------------------------------------------------------------ what the agent calls

    @property
    def is_open(self) -> bool:
        """Whether something sent can still arrive."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def silence(self) -> float:
        """Seconds since something came; 0 if the other side is on this machine, whose end is told at once."""
        return 0.0 if self.shares_files else time.monotonic() - self._heard

    def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message at once."""
        if self._transport is not None:
            self._transport.write(encode(message, buffers))

    def deliver(self, run_id: str, frame: bytes, blobs: Sequence[str]) -> None:
        """Send an event of a run, its blobs before it, after the run's earlier events."""
        queue = self._queues.get(run_id)
        if queue is not None:
            queue.append((frame, blobs))
        elif blobs and not self.shares_files:
            self._queues[run_id] = deque([(frame, blobs)])
            task = asyncio.get_running_loop().create_task(self._drain(run_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif self._transport is not None:
            self._transport.write(frame)

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()

    async def _drain(self, run_id: str) -> None:
        queue = self._queues[run_id]
        try:
            while queue and self._transport is not None:
                frame, blobs = queue.popleft()
                for blob in () if self.shares_files else blobs:
                    await self._send_blob(blob)
                if self._transport is not None:
                    self._transport.write(frame)
        except (OSError, FalServerlessException):
            _log.exception("a result of run %s cannot be sent", run_id)
            self.close()
        finally:
            del self._queues[run_id]

    async def _send_blob(self, name: str) -> None:
        pace = Pace(self.part_size)
        for offset, size, data in self._read_parts(name, LARGEST, self.arrived.pop(name, 0)):
            view = memoryview(data)
            sent = 0
            while sent < len(view) or not size:
                started = time.monotonic()
                await self._writable.wait()
                if self._transport is None:
                    return
                part = view[sent : sent + pace.part_size]
                self._transport.write(encode(BlobPart(blob=name, offset=offset + sent, size=size), [part]))
                await asyncio.sleep(0)  # other runs' events may go in between
                pace.took(time.monotonic() - started)
                sent += len(part)
                if not size:
                    break
