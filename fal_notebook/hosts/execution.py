"""One call in flight over a connection to an agent, which may be another one later.

Runs in the notebook. A call belongs to one connection at a time; between two it is adrift, and whoever brings
it back says where it belongs.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from fal_agent.wire import Ack, Cancel, Failure, Interrupt, Item, Kill, Message, Progress, Reply, Seen
from fal_notebook.hosts.base import EventSink, Parcel, Received
from fal_notebook.hosts.steps import UPLOAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.hosts.client import AgentClient
    from fal_notebook.hosts.lane import OpenLane

__all__ = ["AgentExecution", "UploadProgress"]

_TELL_SECONDS = 0.2  # between two words on how much of a call's data has been sent
_ACK_EVERY = 128 << 10  # bytes of events after which the worker is told that they were dealt with


class AgentExecution:
    """One call in flight over an `AgentClient`."""

    def __init__(
        self, client: AgentClient, run_id: str, parcel: Parcel | None, sink: EventSink, *, attended: bool
    ) -> None:
        self.run_id, self.attended = run_id, attended
        self.parcel: Parcel | None = parcel  # until the agent is known to have it
        self.sink = sink
        self.last_seq = 0
        self.sent = False  # the agent has it, as far as we know
        self.was_sent = False  # it may have it
        self.withdrawn = False
        self.wish: Message | None = None  # to end it, which the agent may never have got
        self.turn = threading.Lock()  # held while it is decided whether the call is sent or withdrawn
        self.lane: OpenLane | None = None  # that it is in
        self.outcome: Received | None = None  # that came through it
        self.template = ""  # our name for the call, if it is in a lane
        self.client = client  # the connection that it belongs to
        self.let_go: Callable[[AgentExecution], bool] | None = None  # while it belongs to none, see `drift`
        self.copies: list[AgentExecution] = []  # who attached to the same run over the same connection
        self.original: AgentExecution | None = None  # whose copy it is
        self.shown_first = 0  # events after this number are passed over until one up to it has come
        self._owed = 0
        self._last_reply: tuple[Reply, bytes] | None = None

    def receive(self) -> Received | None:
        """Fetch the outcome of a call that is in a lane; None: it comes from the agent."""
        if self.outcome is None and self.lane is not None:
            self.client.go_through_lane(self)
        return self.outcome

    def acknowledge(self, received: Received) -> None:
        """Say that an event was dealt with, so that the worker may produce more."""
        event = received.event
        if self.original is not None:
            return
        self._owed += event.cost
        if self._owed >= _ACK_EVERY or (isinstance(event, Item) and self._owed >= _ACK_EVERY // 4):
            owed, self._owed = self._owed, 0
            self.client.send_if_open(Ack(self.run_id, event.seq, owed))

    def reply(self, number: int, text: str, error: str = "") -> None:
        """Answer a prompt of the call; see `wire.Reply`."""
        if self.original is None:  # whoever started the call answers
            self._last_reply = Reply(self.run_id, number, error), text.encode("utf-8", "replace")
            self.repeat_reply()

    def repeat_reply(self) -> None:
        """Send the last answer, which may have been lost; one that arrived changes nothing."""
        if self._last_reply is not None:
            message, text = self._last_reply
            self.client.send_if_open(message, [text])

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in this call alone."""
        if not self._withdraw("interrupted", "KeyboardInterrupt"):
            self._tell(Interrupt(self.run_id))

    def cancel(self) -> None:
        """Take the call out of the queue, or interrupt it."""
        if not self._withdraw("cancelled", "the call was cancelled"):
            self._tell(Cancel(self.run_id))

    def kill(self) -> None:
        """End the worker that runs the call."""
        if not self._withdraw("cancelled", "the call was cancelled"):
            self._tell(Kill(self.run_id))

    def seen(self) -> None:
        """Say that the outcome was shown; see `fal_agent.wire.Seen`."""
        self.client.send_if_open(Seen(self.run_id))

    def _withdraw(self, kind: str, message: str) -> bool:
        """End a call whose data is still on its way, so that it is never sent; False if it has been."""
        with self.turn:
            if self.sent:
                return False
            self.withdrawn = True
        if self.let_go is None:
            self.client.give_up(self, kind, message)
        elif self.let_go(self):
            self.fail(kind, message)
        return True

    def _tell(self, message: Message) -> None:
        if self.original is not None:
            self.original._tell(message)  # noqa: SLF001 - one of its own kind
        elif self.let_go is not None and self.let_go(self):
            self.fail_adrift(f"{self.client.host_name!r} cannot be reached to stop the call")
        else:
            self.wish = message
            if self.client.send_if_open(message) and isinstance(message, Interrupt):
                self.wish = None  # said twice, it would be another one

    def watchers_of(self, seq: int) -> list[AgentExecution]:
        """Who of those that watch the run gets an event now: it is new to them, and none before it is due."""
        seeing = []
        for one in (self, *self.copies):
            if one.shown_first and seq <= one.shown_first:
                one.shown_first = 0  # what it was to be shown first has begun to come
            if not one.shown_first and seq > one.last_seq:
                seeing.append(one)
        return seeing

    def join(self, other: AgentExecution) -> None:
        """Let another that watches the same run see what this one gets."""
        joining = [other, *other.copies]
        for one in joining:
            one.original = self
        other.copies = []
        self.copies += joining

    def part(self, other: AgentExecution) -> None:
        """Undo `join`."""
        other.original = None
        self.copies = [copy for copy in self.copies if copy is not other]

    def drift(self, let_go: Callable[[AgentExecution], bool]) -> None:
        """Belong to no connection; `let_go` ends the waiting for one, and says whether there was any."""
        self.let_go = let_go

    def fail_adrift(self, problem: str) -> None:
        """End the call here, since no connection is to be had; one that was sent goes on over there."""
        name = self.client.host_name
        if not self.was_sent:
            self.fail(
                "unreachable", f"{name!r} cannot be reached any more, and the call did not begin: {problem}"
            )
            return
        self.fail(
            "link",
            f"the connection to {name!r} broke: {problem}. If the call had begun it goes on there for its "
            f"lease: fal.attach({self.run_id!r}, host={name!r}) shows it",
        )

    def fail(self, kind: str, message: str) -> None:
        """End the call from this side, as a failure of the given kind."""
        self.withdrawn = True
        for execution in (self, *self.copies):
            seq = execution.last_seq + 1
            execution.sink(Received(Failure(self.run_id, kind, message, seq=seq, sent_at=time.time())))


class UploadProgress:
    """Tells a call's run how much of its data has been sent, a few times a second."""

    def __init__(self, execution: AgentExecution, total: int) -> None:
        self._execution, self._total = execution, total
        self._done, self._told_at = 0, time.monotonic()

    def sent(self, count: int) -> None:
        """So many more bytes were sent."""
        self._done += count
        now = time.monotonic()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            event = Progress(self._execution.run_id, UPLOAD, self._done, self._total, sent_at=time.time())
            self._execution.sink(Received(event))
