"""The widgets of a session: what the front end says to them travels to the host, and waits its turn there.

Runs in the notebook's kernel. A message is a call of its own: it runs in the session's worker between
cells, and what it shows is part of the front end's message.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.errors import CallCancelledError, HostError, WorkerLostError
from fal_agent.wire import Failure
from fal_notebook import display
from fal_notebook.payload import make_parcel
from fal_notebook.run import start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Call
    from fal_notebook.hosts.base import Host, Received

__all__ = ["SessionWidgets"]

_PATIENCE = 5.0  # seconds that a message holds up the front end's next one; a cell may keep it waiting longer
_GONE = ("lost", "unknown", "cancelled", "environment")  # kinds of failures after which there is no session


class SessionWidgets:
    """The widgets of one session.

    Attributes:
        bridge: to their other halves in the front end; None outside of a kernel.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._call: Call | None = None
        self.bridge = display.comm_bridge(self._send)

    def belong_to(self, call: Call) -> None:
        """A cell is sent: widgets that it makes live where it runs."""
        if call.fresh:
            self.close()
        made = dataclasses.replace(call, kind="comm", label="a widget", timeout=None, fresh=False, lease=0.0)
        if made != self._call:  # equal calls are the same object: the agent then knows all but the arguments
            self._call = made

    def note(self, error: BaseException) -> None:
        """A cell raised an error, which may mean that the session has ended."""
        if isinstance(error, (WorkerLostError, CallCancelledError)):
            self.close()

    def close(self) -> None:
        """The session has ended."""
        if self.bridge is not None:
            self.bridge.close()

    def _send(self, action: str, message: dict[str, Any], buffers: Sequence[Buffer]) -> None:
        """Bring a message to the host. What went wrong there is shown there, or closes the widgets."""
        from fal_notebook.display.callbacks import CallbackFace

        assert self._call is not None
        assert self.bridge is not None
        face = CallbackFace(self.bridge, message)
        content = {
            "action": action,
            "parent": message["header"]["msg_id"],
            "content": message["content"],
            "metadata": message["metadata"],
        }

        def draw(received: Received) -> None:
            face.draw(received)
            event = received.event
            if isinstance(event, Failure) and event.kind in _GONE:
                self.close()

        parcel = make_parcel(self._call, None, [pickling.dump(content)[0], *map(bytes, buffers)])
        try:
            run = start(self._host, parcel, on_event=draw)
        except HostError:  # the next cell says so
            self.close()
            return
        try:
            wait([run], timeout=_PATIENCE)
        except KeyboardInterrupt:
            run.interrupt()
