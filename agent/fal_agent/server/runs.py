"""One run as the agent keeps it: its events numbered, journaled and sent on.

Runs in the agent, on its event loop. An event is put in the journal before it is sent, and a run
whose notebook is away goes on: the agent acknowledges in the notebook's stead.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.framing import Buffer, encode_frame
from fal_agent.server.spool import ending
from fal_agent.wire import Ack, Call, Data, Event, Failure, Log, Result, Serve, Stage, header, lasting

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from fal_agent.server.journal import Journal
    from fal_agent.server.prepared import Prepared
    from fal_agent.server.rpc import Connection

__all__ = ["FINISHED", "Run"]

_NOT_KEPT = (
    "its value held a secret, and so is not kept for later: only the notebook that was connected when it "
    "ended got it. Return what does not hold the secret"
)
FINISHED = frozenset({"done", "failed", "cancelled", "lost", "lease"})


class Run:
    """A call in flight.

    Attributes:
        run_id: the client's name for it.
        prepared: what was asked, and what is known of it.
        arguments, buffers: raw buffers of the submit; let go when the call has been handed to a worker.
        client_id: whose run it is.
        attended: a thread of the notebook waits for it.
        state: "building", "queued", "running", or one of `FINISHED`.
        worker: the process that runs it (`fal_agent.server.pool.Worker`).
        timers: what must be cancelled when it ends.

    Args:
        journal: keeps what it says; None for what is not worth keeping.
    """

    def __init__(
        self,
        run_id: str,
        *,
        prepared: Prepared,
        arguments: Data,
        buffers: list[bytes],
        client_id: str,
        connection: Optional[Connection],
        journal: Optional[Journal],
        attended: bool = False,
    ) -> None:
        self.run_id, self.prepared, self.arguments, self.buffers = run_id, prepared, arguments, buffers
        self.client_id, self.attended = client_id, attended
        self.connection = connection  # that acknowledges its events
        self.watchers: list[Connection] = []  # that see them as well
        self.state = "building"
        self.worker: Any = None
        self.serve: Optional[Serve] = None  # runners of apps
        self.queued_at = time.monotonic()
        self.told_to_wait = False
        self.ended_by: Optional[Failure] = None  # what an interrupt or a kill on our part will be reported as
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.on_finish: list[Callable[[Run], None]] = []
        self._journal = journal
        self._seq = 0
        self._is_recorded = False

    @property
    def call(self) -> Call:
        """What was asked."""
        return self.prepared.call

    @property
    def is_finished(self) -> bool:
        """Whether its last event has been made."""
        return self.state in FINISHED

    @property
    def was_silent(self) -> bool:
        """Whether its outcome was its only event."""
        return self.is_finished and self._seq == 1

    @property
    def blobs(self) -> set[str]:
        """Names of the blobs that the call's data needs."""
        refs = [*self.arguments, *(item[1] for item in self.call.files)]
        return {ref for ref in refs if isinstance(ref, str)}

    def emit(self, event: Event, buffers: Sequence[Buffer] = ()) -> None:
        """Number an event, journal it, and send it on."""
        if self.is_finished:
            return
        self._seq += 1
        content = header(event)
        content["seq"] = self._seq
        frame = encode_frame(content, buffers)
        blobs = [ref for ref in getattr(event, "data", ()) if isinstance(ref, str)]
        if self._journal is None:
            pass
        elif getattr(event, "private", False):
            self._journal.append(self.run_id, self._seq, _without_secret(event, self._seq), [])
        else:
            kept = lasting(content, buffers)
            whole = frame if kept[0] is content else encode_frame(*kept)
            self._journal.append(self.run_id, self._seq, whole, blobs)
        if self.connection is not None:
            self.connection.deliver(self.run_id, frame, blobs)
        elif event.cost:
            self._acknowledge(event.cost)
        for watcher in self.watchers:
            watcher.deliver(self.run_id, frame, blobs)
        if isinstance(event, (Result, Failure)):
            self._finish(event)

    def stage(self, phase: str, text: str = "") -> None:
        """Say that the run entered a phase."""
        self.emit(Stage(self.run_id, phase, text, sent_at=time.time()))

    def tell_running(self) -> None:
        """Say that the user's code begins, if something was said of what came before."""
        if self._seq:
            self.stage("run")

    def builder_log(self, text: str) -> None:
        """Pass on what uv says."""
        self.emit(
            Log(self.run_id, "stderr", "builder", sent_at=time.time()), [text.encode("utf-8", "replace")]
        )

    def fail(self, kind: str, message: str, **detail: Any) -> None:
        """End the run with a failure that is not the user's code's."""
        self.emit(Failure(self.run_id, kind, message, detail=detail, sent_at=time.time()))

    def set_state(self, state: str) -> None:
        """Enter a state that is not final."""
        self.state = state
        self._record(state)

    def record_running(self) -> None:
        """Put into the journal that the run is running: worth it only for one that takes a while."""
        if self.state == "running" and not self._is_recorded:
            self._is_recorded = True
            self._record("running")

    def detach(self) -> None:
        """The notebook is away: acknowledge in its stead from here on."""
        self.connection = None
        self._acknowledge(1 << 40)

    def attach(self, connection: Connection, *, resumes: bool) -> None:
        """Show what comes from now on to a notebook.

        Args:
            connection: to the notebook.
            resumes: it is the one that had the run, whose connection broke, which we may not know yet.
        """
        held = self.connection
        if resumes or held is None or not held.is_open:
            self.connection = connection
            self._acknowledge(1 << 40)  # what was on its way to the connection before is not acknowledged
        elif connection is not held and connection not in self.watchers:
            self.watchers.append(connection)

    def leave(self, connection: Connection) -> None:
        """A notebook has gone; one that watches takes its place, if there is one."""
        if connection in self.watchers:
            self.watchers.remove(connection)
        elif connection is self.connection:
            self.detach()
            if self.watchers:
                self.connection = self.watchers.pop(0)

    def _record(self, state: str, error: Optional[str] = None) -> None:
        if self._journal is not None:
            self._journal.set_state(self.run_id, state, error=error)

    def _acknowledge(self, credit: int) -> None:
        if self.worker is not None:
            self.worker.send(Ack(self.run_id, self._seq, credit))

    def _finish(self, event: Event) -> None:
        self.state, error = ending(event)
        self._record(self.state, error)
        for timer in self.timers.values():
            timer.cancel()
        self.timers.clear()
        self.buffers = []
        for callback in self.on_finish:
            callback(self)


def _without_secret(event: Event, seq: int) -> bytes:
    """Make what the journal keeps in place of an event that holds a secret."""
    if isinstance(event, Result):
        told: Event = Failure(event.run_id, "lost", _NOT_KEPT, seq=seq, sent_at=event.sent_at)
        return encode_frame(header(told))
    told = Log(event.run_id, "stderr", "builder", seq=seq, sent_at=event.sent_at)
    return encode_frame(header(told), [b"an item that held a secret was not kept\n"])
