"""The notebook's end of a lane: brief calls straight to a worker that the agent has lent us.

Runs in the notebook, in the thread that waits for the call: it sends the call and reads its outcome
itself, so that nothing comes between the two processes. One call at a time.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from fal_agent.errors import ProtocolError
from fal_agent.framing import FrameDecoder
from fal_agent.wire import decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Execute, Lane, Message
    from fal_notebook.hosts.base import ByteStream
    from fal_notebook.hosts.execution import AgentExecution

__all__ = ["Lanes", "OpenLane"]

_READ_SIZE = 512 << 10


class OpenLane:
    """A lane that the agent has offered.

    It is dialled by the thread that has a call for it, at a moment when that thread has none on its way
    through the agent: the worker takes no other calls from then on.

    Args:
        lane: the agent's name for it.
        templates: our names of the calls that may go there -> the agent's names.
        dial: connects to the worker.

    Attributes:
        turn: held by the thread whose call is in the lane.
        is_open: whether calls can be sent.
    """

    def __init__(self, lane: str, templates: dict[str, str], dial: Callable[[], ByteStream]) -> None:
        self.lane, self.templates = lane, templates
        self.turn = threading.Lock()
        self.is_open = True
        self._dial = dial
        self._stream: ByteStream | None = None
        self._decoder = FrameDecoder()

    @property
    def is_dialled(self) -> bool:
        """Whether `ask` can be called."""
        return self._stream is not None

    def dial(self) -> None:
        """Connect to the worker.

        Raises:
            HostError: the connection to the machine broke.
            OSError: the offer is no longer good.
        """
        self._stream = self._dial()

    def ask(self, request: Execute, buffers: Sequence[Buffer]) -> tuple[Message, list[bytes]] | None:
        """Send a call and wait for its answer; None when the worker has hung up: the agent knows more."""
        assert self._stream is not None
        try:
            self._stream.sendall(encode(request, buffers))
            while data := self._stream.recv(_READ_SIZE):
                for frame in self._decoder.feed(data):
                    return decode(frame), frame.buffers
        except (OSError, ProtocolError):
            return None
        return None

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        if self._stream is not None:
            self._stream.close()


class Lanes:
    """The lanes that the agent has lent to one connection.

    Args:
        dial: connects to a Unix socket of the machine.

    Attributes:
        by_template: they, by our names for the calls that may go there.
    """

    def __init__(self, dial: Callable[[str], ByteStream]) -> None:
        self.by_template: dict[str, OpenLane] = {}
        self._dial = dial
        self._changing = threading.Lock()

    def take(self, execution: AgentExecution, template: str) -> bool:
        """Let a call go straight to the worker that was lent to us for such calls; whether that is possible.

        Args:
            execution: the call; `AgentExecution.receive` sends it.
            template: our name for it.
        """
        lane = self.by_template.get(template)
        if lane is None or not lane.is_open or not lane.turn.acquire(blocking=False):
            return False
        execution.lane, execution.template = lane, template
        return True

    def offer(self, message: Lane) -> None:
        """The agent lends a lane."""
        lane = OpenLane(message.lane, message.templates, lambda: self._dial(message.path))
        with self._changing:
            self.by_template = {**self.by_template, **dict.fromkeys(message.templates, lane)}

    def drop(self, name: str) -> None:
        """The agent takes a lane back."""
        with self._changing:
            self.by_template = {key: lane for key, lane in self.by_template.items() if lane.lane != name}

    def close(self) -> None:
        """Hang up everywhere."""
        for lane in set(self.by_template.values()):
            lane.close()
