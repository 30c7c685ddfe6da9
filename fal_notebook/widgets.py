"""The widgets of a session: what the front end says to them travels to the host, and waits its turn there.

Runs in the notebook's kernel. A message is a call of its own: it runs in the session's worker between
cells, and what it shows is part of the front end's message. While threads or tasks of the session are at
work, the worker is asked now and then what they did to widgets meanwhile.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.errors import CallCancelledError, HostError, WorkerLostError
from fal_agent.wire import Failure, Result
from fal_notebook import display
from fal_notebook.payload import make_parcel
from fal_notebook.run import start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Call
    from fal_notebook.hosts.base import Host, Received
    from fal_notebook.run import Run

__all__ = ["SessionWidgets"]

_PATIENCE = 5.0  # seconds that a message holds up the front end's next one; a cell may keep it waiting longer
_GONE = ("lost", "unknown", "cancelled", "environment")  # kinds of failures after which there is no session
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0  # seconds between two looks at what threads and tasks did


class SessionWidgets:
    """The widgets of one session.

    Attributes:
        bridge: to their other halves in the front end; None outside of a kernel.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._call: Call | None = None
        self._cell: dict[str, Any] = {}  # the front end's message that the last cell came in
        self._watcher: threading.Thread | None = None
        self.bridge = display.comm_bridge(self._send)

    def belong_to(self, call: Call) -> None:
        """A cell is sent: widgets that it makes live where it runs."""
        if self.bridge is None:
            return
        if call.fresh:
            self.close()
        made = dataclasses.replace(call, kind="comm", label="a widget", timeout=None, fresh=False, lease=0.0)
        if made != self._call:  # equal calls are the same object: the agent then knows all but the arguments
            self._call = made
        self._cell = display.message()

    def note(self, error: BaseException) -> None:
        """A cell raised an error, which may mean that the session has ended."""
        if isinstance(error, (WorkerLostError, CallCancelledError)):
            self.close()

    def watch(self) -> None:
        """Threads or tasks are at work on the host: show what they do to widgets, though no cell runs."""
        if self.bridge is not None and (self._watcher is None or not self._watcher.is_alive()):
            self._watcher = threading.Thread(target=self._watch, name="fal-widgets", daemon=True)
            self._watcher.start()

    def close(self) -> None:
        """The session has ended."""
        if self.bridge is not None:
            self.bridge.close()

    def _send(self, action: str, message: dict[str, Any], buffers: Sequence[Buffer]) -> None:
        """Bring a message to the host. What went wrong there is shown there, or closes the widgets."""
        message = {**message, "action": action}
        run = self._start(message, message["header"]["msg_id"], buffers, _Heard(self, message))
        if run is None:
            return
        try:
            wait([run], timeout=_PATIENCE)
        except KeyboardInterrupt:
            run.interrupt()

    def _watch(self) -> None:
        """Ask until nothing is at work any more; runs in a thread."""
        pause, message = _FIRST_PAUSE, {"action": "collect", "content": {}, "metadata": {}}
        while True:
            time.sleep(pause)
            heard = _Heard(self, self._cell, may_watch=False)
            run = self._start(message, "", (), heard)
            if run is None:
                return
            wait([run])
            if not heard.goes_on:
                return
            pause = _FIRST_PAUSE if heard.events > 1 else min(2 * pause, _LONGEST_PAUSE)

    def _start(
        self, message: dict[str, Any], parent: str, buffers: Sequence[Buffer], heard: _Heard
    ) -> Run | None:
        """Send a message; None if the host cannot be reached."""
        assert self._call is not None
        content = {"parent": parent, **{key: message[key] for key in ("action", "content", "metadata")}}
        parcel = make_parcel(self._call, None, [pickling.dump(content)[0], *map(bytes, buffers)])
        try:
            return start(self._host, parcel, on_event=heard.draw)
        except HostError:  # the next cell says so
            self.close()
            return None


class _Heard:
    """What comes back of one message.

    Args:
        widgets: the session's.
        parent: the front end's message that it is shown as part of.
        may_watch: look on while threads or tasks go on.

    Attributes:
        events: how many came.
        goes_on: threads or tasks may speak through widgets from now on.
    """

    def __init__(self, widgets: SessionWidgets, parent: dict[str, Any], *, may_watch: bool = True) -> None:
        from fal_notebook.display.callbacks import CallbackFace

        assert widgets.bridge is not None
        self._widgets, self._may_watch = widgets, may_watch
        self._face = CallbackFace(widgets.bridge, parent)
        self.events, self.goes_on = 0, False

    def draw(self, received: Received) -> None:
        """Take one event; called by a thread of the host's."""
        self.events += 1
        self._face.draw(received)
        event = received.event
        if isinstance(event, Failure) and event.kind in _GONE:
            self._widgets.close()
        elif isinstance(event, Result):
            self.goes_on = pickling.load(received.data) is True
            if self.goes_on and self._may_watch:
                self._widgets.watch()
