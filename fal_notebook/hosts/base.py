"""The two seams: a host takes a call and gives events; a link gives byte streams to a machine.

Runs in the notebook. Everything above these protocols is the same for all hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import threading

    from fal_agent.framing import Buffer
    from fal_agent.wire import Call, Data, Event

__all__ = [
    "ByteStream",
    "CompletedCommand",
    "EventSink",
    "Execution",
    "Host",
    "KeepsData",
    "Link",
    "Parcel",
    "Received",
    "ShowsRuns",
    "TellsSeen",
]


class ByteStream(Protocol):
    """A duplex stream of bytes, used by one reading and several writing threads."""

    def sendall(self, data: Buffer, /) -> None:
        """Send every byte, waiting as long as the other side's window asks; raises OSError when broken."""

    def recv(self, size: int, /) -> bytes:
        """Wait for bytes, at most `size`; b"" at the end of the stream; raises OSError when broken."""

    def close(self) -> None:
        """End the stream; a waiting `recv` returns or raises."""


@dataclass(frozen=True)
class CompletedCommand:
    """What a command on the machine gave: its exit status (-1: killed or unknown) and output."""

    status: int
    stdout: bytes
    stderr: bytes


class Link(Protocol):
    """A connection to a machine that can run commands and reach its Unix sockets."""

    def dial(self, socket_path: str) -> ByteStream:
        """Connect to a Unix socket of the machine.

        Raises:
            LinkLostError: the connection broke.
            ConnectionRefusedError: nothing listens there (or FileNotFoundError: no such socket).
        """

    def run(self, command: str, *, stdin: bytes = b"", timeout: float = 60.0) -> CompletedCommand:
        """Run a POSIX shell script on the machine, whatever the user's login shell is."""

    def upload(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """Put a file on the machine; it appears whole or not at all. Parent folders are made (0700)."""

    def close(self) -> None:
        """Close the connection and everything dialled through it."""


@dataclass(frozen=True)
class Parcel:
    """A call ready to travel: what to run, its arguments, the raw buffers they refer to, and blobs by name.

    Calls that are the very same object travel once per connection.
    """

    call: Call
    arguments: Data
    buffers: Sequence[Buffer] = ()
    blobs: dict[str, Buffer] = field(default_factory=dict)
    function_data: Sequence[Buffer] = ()  # pickle and buffers of the function, in case the host lacks them


@dataclass(frozen=True)
class Received:
    """An event as it arrived, with its data opened up: bytes for each item of `event.data`.

    For a `Log`, `data` holds the text's bytes. `error` is the very exception of a failure, where the
    call ran in this process.
    """

    event: Event
    data: Sequence[Buffer] = ()
    error: BaseException | None = None


EventSink = Callable[[Received], None]


@runtime_checkable
class Execution(Protocol):
    """One call in flight."""

    run_id: str

    def receive(self) -> Received | None:
        """Fetch the next event in this thread, where that is the quickest way; None: the sink gets it.

        May be called for attended calls only. A KeyboardInterrupt leaves the call as it is.
        """

    def acknowledge(self, received: Received) -> None:
        """Say that an event was dealt with, so that the worker may produce more."""

    def reply(self, number: int, text: str, error: str = "") -> None:
        """Answer the call's prompt of that number.

        Args:
            number: as in the event.
            text: what was typed.
            error: name of an exception to raise there instead, whose message `text` is.
        """

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in this call alone."""

    def cancel(self) -> None:
        """Take the call out of the queue, or interrupt it."""

    def kill(self) -> None:
        """End the worker that runs the call."""


@runtime_checkable
class TellsSeen(Protocol):
    """An execution on a host that wants to know whether anybody saw the end."""

    def seen(self) -> None:
        """Say that the outcome was shown."""


@runtime_checkable
class Host(Protocol):
    """Where calls run: call in, events out."""

    name: str

    def submit(
        self, parcel: Parcel, sink: EventSink, *, run_id: str | None = None, attended: bool = False
    ) -> Execution:
        """Start a call. `sink` gets its events in order, the last a `Result` or `Failure`.

        `attended` says that this thread will now wait for the call, asking `Execution.receive` before
        it waits for the sink.

        The sink is called from a thread of the host's; it must be quick and must not raise.
        Returns at once, before data has travelled.

        Raises:
            HostError: the machine cannot be reached.
        """

    def ask(self, question: str, *, timeout: float = 30.0, **arguments: Any) -> Any:
        """Ask the agent: "status", "environments", "runs", ... (see `fal_agent.server.service`)."""

    def close(self) -> None:
        """Let go of the connection. Runs go on for their lease; `close` stops nothing there."""


@runtime_checkable
class ShowsRuns(Protocol):
    """A host that keeps what runs say, so that they can be shown again."""

    name: str

    def attach(self, run_id: str, sink: EventSink) -> Execution:
        """Show a run: `sink` gets all its events from the first, and those to come, as for `Host.submit`.

        A run that the host does not know fails at once.

        Raises:
            HostError: the machine cannot be reached.
        """


@runtime_checkable
class KeepsData(Protocol):
    """A host with a data folder, which also answers the question "sync"."""

    name: str

    def upload(self, name: str, data: Buffer, stop: threading.Event) -> None:
        """Bring a blob to the host, where the next question "sync" finds it.

        Raises:
            HostError: the machine cannot be reached, or the connection broke.
            OSError: the disk fails, where it is this machine's.
        """

    def ask(self, question: str, *, timeout: float = 30.0, **arguments: Any) -> Any:
        """Ask, as any host."""
