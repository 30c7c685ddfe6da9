"""The notebook's end of a connection to an agent: calls out, events in.

Runs in the notebook. One thread reads; calls are sent by the thread that makes them, or, when data
has to be uploaded first, by a thread of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from fal_agent.duplex import Duplex, uninterrupted
from fal_agent.errors import (
    FalServerlessError,
    HostError,
    HostUnreachableError,
    LinkLostError,
    ProtocolError,
)
from fal_agent.wire import (
    Answer,
    Arrived,
    Ask,
    Attach,
    BlobPart,
    Execute,
    Failure,
    Hello,
    Interrupt,
    Lane,
    LaneClosed,
    Log,
    Message,
    Need,
    Ping,
    Result,
    Want,
    Welcome,
)  # fmt: skip
from fal_notebook.hosts.base import ByteStream, EventSink, Parcel, Received
from fal_notebook.hosts.blob_traffic import BlobTraffic
from fal_notebook.hosts.execution import AgentExecution
from fal_notebook.hosts.lane import Lanes
from fal_notebook.hosts.submissions import Submissions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fal_agent.framing import Buffer
    from fal_notebook.hosts.lane import OpenLane

__all__ = ["AgentClient", "client_id"]

_KERNEL = uuid.uuid4().hex

_GREETING_TIMEOUT = 20.0  # seconds
_ANSWER_TIMEOUT = 60.0  # seconds: a slow line is busy with what else is sent
_PING_EVERY = 3.0  # seconds without a word after which the agent is asked whether it is there
_SILENCE_LIMIT = 12.0  # seconds without a word after which the connection counts as lost


def client_id() -> str:
    """Who this process is to agents: a kernel, or a forked child of one, which has connections of its own."""
    return f"{_KERNEL}-{os.getpid()}"


class AgentClient:
    """A connection to an agent.

    Args:
        stream: leads to the agent's socket.
        host_name: for messages.
        part_size: bytes of one part of a blob, in both directions.
        dial: connects to a Unix socket of the machine.
        blob_folder: where the agent keeps blobs, if this process can read and write there.
        heartbeat: whether to watch that the other side answers.

    Attributes:
        blobs: what travels beside messages.
        lanes: ways straight to workers that the agent has lent us.
        on_lost: gets the calls that were going on when the connection broke, and why it did; None: they fail.

    Raises:
        HostUnreachableError: the agent did not greet back in time.
        LinkLostError: the connection ended before it did.
    """

    def __init__(
        self,
        stream: ByteStream,
        *,
        host_name: str,
        part_size: int,
        dial: Callable[[str], ByteStream],
        blob_folder: Path | None = None,
        heartbeat: bool = False,
    ) -> None:
        self.host_name = host_name
        self._dial = dial
        self._executions: dict[str, AgentExecution] = {}
        self._answers: dict[str, queue.SimpleQueue[Answer | None]] = {}
        self._sharing = threading.Lock()  # held while it is decided who sees the events of a run
        self._greeted = threading.Event()
        self._problem: str | None = None
        self._closed = threading.Event()
        self._heard = time.monotonic()
        self._is_closed_here = self._is_nonsense = False
        self.on_lost: Callable[[list[AgentExecution], str], None] | None = None
        self.welcome: Welcome | None = None
        self._duplex = Duplex(stream, self._on_message, self._on_close, name=f"fal-{host_name}")
        self.blobs = BlobTraffic(
            self._duplex,
            part_size=part_size,
            folder=blob_folder,
            arrived=lambda name, size: int(self.ask("arrived", _ANSWER_TIMEOUT, name=name, size=size)),
            broken=self._broken,
        )
        self._submissions = Submissions(self._send, self.blobs, self._give_up_unsent)
        self.lanes = Lanes(dial)
        self._duplex.start()
        self._send(Hello(client_id(), part_size, shares_files=blob_folder is not None))
        self._await_welcome()
        if heartbeat:
            threading.Thread(target=self._watch, name=f"fal-heartbeat-{host_name}", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether the connection works, as far as is known."""
        return not self._closed.is_set()

    def submit(
        self, parcel: Parcel, sink: EventSink, run_id: str, *, attended: bool = False
    ) -> AgentExecution:
        """Send a call; its data travels in the background if there is much of it.

        Raises:
            LinkLostError: the connection was broken before; the call belongs to nobody.
        """
        execution = AgentExecution(self, run_id, parcel, sink, attended=attended)
        self._executions[run_id] = execution
        template = self._submissions.template_of(parcel.call) if attended and not parcel.blobs else None
        if template is not None and self.lanes.take(execution, template):
            return execution  # `receive` sends it: an interrupt is dealt with there
        if self._closed.is_set():
            if self._executions.pop(run_id, None) is not None:
                raise self._lost_error()
            return execution  # whoever found the end of the connection has it brought back
        try:
            self._submissions.send(execution)
        except LinkLostError:  # the agent may have it
            self._hand_over([execution])
        return execution

    def resume(self, execution: AgentExecution) -> None:
        """Take over a call whose connection broke: it goes on after the last event that arrived.

        Raises:
            LinkLostError: this connection has broken too; the call does not belong to it.
        """
        if self._closed.is_set():
            raise self._lost_error()
        earlier, execution.client, execution.let_go = execution.client, self, None
        with self._sharing:
            other = self._executions.get(execution.run_id)  # that somebody here attached meanwhile
            if other is not None and other is not execution:
                execution.join(other)
                if execution.last_seq < other.last_seq:  # what comes now may be later than what it lacks
                    execution.shown_first = other.last_seq
            self._executions[execution.run_id] = execution
        try:
            arrived = self.blobs.take_over(earlier.blobs)
            if arrived:
                self._send(Arrived(arrived))
            parcel, wish = execution.parcel, execution.wish
            if parcel is None or wish is not None:
                seen = min(e.last_seq for e in (execution, *execution.copies))
                self._send(Attach(execution.run_id, seen, resumes=True))
                execution.repeat_reply()
                if wish is not None:
                    self._send(wish)
                    if parcel is not None:  # it may never have begun, and then nothing would come
                        self._give_up_as_wished(execution, wish)
            else:
                execution.sent = False
                self._submissions.send(execution)
        except LinkLostError:
            if self._executions.pop(execution.run_id, None) is not None:
                raise  # else it has been handed over by the reading thread

    def attach(self, run_id: str, sink: EventSink) -> AgentExecution:
        """Show a run that was started elsewhere, or before: all its events, and those to come."""
        execution = AgentExecution(self, run_id, None, sink, attended=False)
        execution.sent = execution.was_sent = True
        with self._sharing:
            original = self._executions.get(run_id)
            if original is None:
                self._executions[run_id] = execution
            else:
                original.join(execution)
                execution.shown_first = original.last_seq
        try:
            self._send(Attach(run_id))
        except LinkLostError:
            if original is None:
                self._hand_over([execution])
            else:
                original.part(execution)
                self._lose([execution])
        return execution

    def go_through_lane(self, execution: AgentExecution) -> None:
        """Send a call through its lane and wait for its outcome, unless that will come from the agent.

        An interrupt may cut the call or its answer in two at any point: then the agent is asked what
        became of it, and it knows.
        """
        lane, parcel = execution.lane, execution.parcel
        assert lane is not None
        try:
            if parcel is not None and not execution.withdrawn:  # else it was interrupted before it was sent
                self._ask_lane(execution, lane, parcel)
        except BaseException:
            if execution.outcome is None:
                self._leave_lane(execution, lane)
            raise
        finally:
            if execution.lane is not None:
                execution.lane = None
                lane.turn.release()
            if self._closed.is_set() and execution.outcome is None:
                self._hand_over([execution])

    def _ask_lane(self, execution: AgentExecution, lane: OpenLane, parcel: Parcel) -> None:
        request = Execute(execution.run_id, lane.templates[execution.template], parcel.arguments)
        try:
            if not lane.is_dialled:
                lane.dial()
            execution.sent = execution.was_sent = True
            answer = lane.ask(request, parcel.buffers)
        except (OSError, HostError):  # it is not to be had any more
            answer = None
        if answer is None:
            self._leave_lane(execution, lane)
            return
        message, buffers = answer
        if isinstance(message, (Result, Failure)):  # else it was moved to the agent
            _take_variables(message, buffers)
            execution.outcome = Received(message, self.blobs.parts(message.data, buffers))
            self._executions.pop(execution.run_id, None)

    def dial(self, path: str) -> ByteStream:
        """Connect to a Unix socket of the machine.

        Raises:
            OSError: nobody listens there.
            HostError: the connection to the machine broke.
        """
        return self._dial(path)

    def ask(self, question: str, timeout: float, **arguments: Any) -> Any:
        """Ask the agent something.

        Raises:
            FalServerlessError: it refused, or did not answer within `timeout` seconds.
            LinkLostError: the connection broke.
        """
        request_id = uuid.uuid4().hex
        box = self._answers[request_id] = queue.SimpleQueue()
        try:
            self._send(Ask(request_id, question, arguments))
            answer = box.get(timeout=timeout)
        except queue.Empty:
            raise FalServerlessError(
                f"{self.host_name!r} did not answer the question {question!r} within {timeout:g} s"
            ) from None
        finally:
            del self._answers[request_id]
        if answer is None:
            raise self._lost_error()
        if answer.error is not None:
            raise FalServerlessError(f"{self.host_name!r}: {answer.error}")
        return answer.content

    def send_if_open(self, message: Message, buffers: Sequence[Buffer] = ()) -> bool:
        """Send a message that means nothing once the connection is gone; whether it was sent."""
        if self._closed.is_set():
            return False
        try:
            self._duplex.send(message, buffers)
        except OSError:  # the reading thread reports the end to every call
            self._duplex.close()
            return False
        return True

    def tell(self, question: str, **arguments: Any) -> None:
        """Ask the agent something and do not wait for the answer; nothing, once the connection is gone."""
        self.send_if_open(Ask(uuid.uuid4().hex, question, arguments))

    def drop(self) -> None:
        """End a connection that was found broken; calls are brought back by the next one."""
        self._duplex.close()

    def close(self) -> None:
        """End the connection; calls go on over there."""
        self._is_closed_here = True
        self._duplex.close()

    # ------------------------------------------------------------ sending

    def _await_welcome(self) -> None:
        if not self._greeted.wait(_GREETING_TIMEOUT) or self.welcome is None:
            is_broken = self._closed.is_set() and not self._is_nonsense
            self._duplex.close()
            if is_broken:
                raise self._lost_error()
            reason = self._problem or f"the agent did not answer within {_GREETING_TIMEOUT:g} s"
            raise HostUnreachableError(f"{self.host_name!r} was reached, but {reason}. Try again")

    def _send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        try:
            self._duplex.send(message, buffers)
        except OSError as error:
            raise self._broken(error) from None

    def _broken(self, error: OSError) -> LinkLostError:
        """The stream does not take bytes any more: end it, so that the next call connects again."""
        self._problem = self._problem or str(error)
        self._closed.set()
        self._duplex.close()
        return self._lost_error()

    def _leave_lane(self, execution: AgentExecution, lane: OpenLane) -> None:
        """Ask the agent what became of a call, whose lane is no more; it runs now if it never began."""
        parcel = execution.parcel
        with uninterrupted():
            if execution.lane is None:  # done before
                return
            execution.lane, execution.sent = None, False
            lane.close()
            lane.turn.release()
            if parcel is not None and not self._closed.is_set():
                with contextlib.suppress(LinkLostError):  # the reading thread tells every call
                    self._submissions.send(execution)

    def upload(self, name: str, data: Buffer, stop: threading.Event) -> None:
        """Bring a blob to the agent that no call names.

        Args:
            name: letters, digits, "-" and "_".
            data: its content, all of it.
            stop: ends the transfer when it is set.

        Raises:
            LinkLostError: the connection broke.
            OSError: the disk fails, where the agent is on this machine.
        """
        if self._closed.is_set():
            raise self._lost_error()
        self.blobs.bring(name, data, stop.is_set)

    # ------------------------------------------------------------ the reading thread

    def _on_message(self, message: Message, buffers: list[bytes]) -> None:
        self._heard = time.monotonic()
        if isinstance(message, BlobPart):
            self.blobs.take_part(message, buffers)
        elif isinstance(message, Need):
            self._send_again(message)
        elif isinstance(message, Want):
            from fal_notebook.hosts.supplying import in_background

            in_background(self, message)
        elif isinstance(message, Answer):
            box = self._answers.get(message.request_id)
            if box is not None:
                box.put(message)
        elif isinstance(message, Lane):
            self.lanes.offer(message)
        elif isinstance(message, LaneClosed):
            self.lanes.drop(message.lane)
        elif isinstance(message, Welcome):
            self.welcome = message
            self._greeted.set()
        elif hasattr(message, "seq"):
            self._take_event(message, buffers)

    def _take_event(self, event: Any, buffers: list[bytes]) -> None:
        with self._sharing:
            execution = self._executions.get(event.run_id)
            seeing = [] if execution is None else execution.watchers_of(event.seq)
            if execution is None or not seeing:
                return
            execution.parcel = None
            parts = (
                buffers if isinstance(event, Log) else self.blobs.parts(getattr(event, "data", ()), buffers)
            )
            if isinstance(event, (Result, Failure)):
                self._end(execution, seeing)
        if isinstance(event, (Result, Failure)):
            _take_variables(event, buffers)
        for one in seeing:
            one.last_seq = event.seq
            one.sink(Received(event, parts))

    def _end(self, execution: AgentExecution, seeing: list[AgentExecution]) -> None:
        """A run has ended; whoever has not been shown all yet waits for what is on its way to it."""
        waiting = [one for one in (execution, *execution.copies) if one not in seeing]
        if not waiting:
            self._executions.pop(execution.run_id, None)
            return
        first, *others = waiting
        first.original, first.copies = None, []
        for other in others:
            first.join(other)
        self._executions[execution.run_id] = first

    def _send_again(self, need: Need) -> None:
        """The agent let go of data that it had: send the call anew, with all of it."""
        execution = self._executions.get(need.run_id)
        if execution is None or execution.parcel is None:
            return
        execution.sent = False  # it was turned away, so it does not run
        if execution.wish is None:
            self._submissions.send_again(execution, need.names)
        else:  # and need not
            self._submissions.forget(execution, need.names)
            self._give_up_as_wished(execution, execution.wish)

    def _on_close(self, problem: Exception | None) -> None:
        self._problem = self._problem or (str(problem) if problem is not None else None)
        if isinstance(problem, ProtocolError):
            self._problem = f"what answers there is no agent of ours, or is out of order: {problem}"
            self._is_nonsense = True
            self.on_lost = None  # connecting again would bring more of the same
        self._closed.set()
        self._greeted.set()
        for box in list(self._answers.values()):
            box.put(None)
        self.lanes.close()
        # A call in a lane is handed over by the thread that sent it, which is being told just now.
        self._hand_over([execution for execution in [*self._executions.values()] if execution.lane is None])

    def _hand_over(self, executions: list[AgentExecution]) -> None:
        """The connection is gone: let calls be brought back by another one, or end them."""
        self._lose([e for e in executions if self._executions.pop(e.run_id, None) is not None])

    def _lose(self, lost: list[AgentExecution]) -> None:
        if self.on_lost is not None and not self._is_closed_here:
            self.on_lost(lost, self._problem or "the other side ended it")
        else:
            for execution in lost:
                execution.fail("link", str(self._lost_error()))

    def give_up(self, execution: AgentExecution, kind: str, message: str) -> None:
        """End a call from this side, as a failure of the given kind."""
        execution.withdrawn = True
        if self._executions.pop(execution.run_id, None) is not None:
            execution.fail(kind, message)

    def _give_up_unsent(self, execution: AgentExecution, problem: str) -> None:
        self.give_up(execution, "link", f"data for {self.host_name!r} could not be sent: {problem}")

    def _give_up_as_wished(self, execution: AgentExecution, wish: Message) -> None:
        if isinstance(wish, Interrupt):
            self.give_up(execution, "interrupted", "KeyboardInterrupt")
        else:
            self.give_up(execution, "cancelled", "the call was cancelled")

    def _lost_error(self) -> LinkLostError:
        reason = f": {self._problem}" if self._problem else ""
        return LinkLostError(
            f"the connection to {self.host_name!r} broke{reason}. The next call connects again; "
            "a run that was going on goes on there for its lease"
        )

    def _watch(self) -> None:
        """Notice a peer that has gone silent; runs in a thread."""
        while not self._closed.wait(_PING_EVERY):
            silence = time.monotonic() - self._heard
            if silence > _SILENCE_LIMIT:
                self._problem = f"no answer for {silence:.0f} s"
                self._duplex.close()
            elif silence > _PING_EVERY * 0.9:
                self.send_if_open(Ping())


def _take_variables(event: Result | Failure, buffers: Sequence[Buffer]) -> None:
    """Put the variables of failed frames, which come beside a failure, where they are looked for."""
    if isinstance(event, Failure) and event.variables is not None and event.variables < len(buffers):
        event.detail["variables"] = json.loads(bytes(buffers[event.variables]))
