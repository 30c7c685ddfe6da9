"""Widgets that live on a host, in this notebook's front end: what either half says is passed to the other.

Runs in the notebook's kernel. Each comm of a host has one of the same id here. The front end takes that
for the kernel's own, so every library of widgets works as it does locally.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import comm
from comm.base_comm import BaseComm
from IPython import get_ipython

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Comm
    from fal_notebook.hosts.base import Received

    Send = Callable[[str, dict[str, Any], Sequence[Buffer]], None]  # what, the message, its buffers

__all__ = ["CommBridge", "without_dead_views"]

_VIEW = "application/vnd.jupyter.widget-view+json"
_CONTROL = "jupyter.widget.control"

_open: dict[str, _BridgedComm] = {}


class CommBridge:
    """The comms of one session, or of one call of a function.

    Args:
        send: brings what the front end says to the host; None where nobody listens there.
    """

    def __init__(self, send: Send | None = None) -> None:
        self._send = send

    def draw(self, received: Received, parent: Any = None) -> None:
        """Pass on what a widget on the host says.

        Args:
            received: a `Comm` event.
            parent: the front end's message that it belongs to; None for the one that this thread answers.
        """
        event = cast("Comm", received.event)
        content = json.loads(bytes(received.data[0]))
        buffers = [bytes(part) for part in received.data[1:]]
        known = _open.get(event.comm_id)
        if event.action == "open" and known is None:
            _open[event.comm_id] = _BridgedComm(self, event.comm_id, content, buffers, parent)
            _answer_for_all()
        elif known is not None:
            known.pass_on(event.action, content, buffers, parent)

    def hear(self, action: str, message: dict[str, Any]) -> None:
        """Bring what the front end says to the host."""
        if self._send is not None:
            self._send(action, message, message["buffers"])

    def close(self) -> None:
        """The widgets are no more: so the front end's halves are closed."""
        for bridged in [item for item in _open.values() if item.bridge is self]:
            bridged.close()


class _BridgedComm(BaseComm):
    """A comm that stands for one on a host."""

    def __init__(
        self,
        bridge: CommBridge,
        comm_id: str,
        content: dict[str, Any],
        buffers: list[bytes],
        parent: Any,
    ) -> None:
        self.bridge, self._parent = bridge, parent
        super().__init__(
            content["target_name"],
            content["data"],
            content["metadata"],
            buffers,
            comm_id=comm_id,
            target_module=content["target_module"],
        )

    def pass_on(self, action: str, content: dict[str, Any], buffers: list[bytes], parent: Any) -> None:
        """Say what the half on the host says."""
        self._parent = parent
        if action == "close":
            self.close(content["data"], content["metadata"], buffers)
        else:
            self.send(content["data"], content["metadata"], buffers)

    def publish_msg(
        self,
        msg_type: str,
        data: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        buffers: list[bytes] | None = None,
        **keys: Any,
    ) -> None:
        """Say something to the front end."""
        if msg_type == "comm_close":
            _open.pop(self.comm_id, None)
        kernel = get_ipython().kernel
        content = {"data": data or {}, "comm_id": self.comm_id, **keys}
        parent = self._parent or kernel.get_parent("shell")
        kernel.session.send(
            kernel.iopub_socket,
            msg_type,
            content,
            metadata=metadata or {},
            parent=parent,
            ident=self.topic,
            buffers=buffers,
        )

    def handle_msg(self, msg: dict[str, Any]) -> None:
        """The front end's half says something."""
        self.bridge.hear("msg", msg)

    def handle_close(self, msg: dict[str, Any]) -> None:
        """The front end's half is closed."""
        _open.pop(self.comm_id, None)
        self.bridge.hear("close", msg)


def without_dead_views(data: dict[str, Any]) -> dict[str, Any]:
    """Leave out the view of a widget that is not here: a front end would say "Error displaying widget"."""
    view = data.get(_VIEW)
    if view is None or (isinstance(view, dict) and view.get("model_id") in _open):
        return data
    return {mime: content for mime, content in data.items() if mime != _VIEW}


def _answer_for_all() -> None:
    """Let a page that was loaded anew ask each widget for its state.

    It first asks the kernel's ipywidgets for the states of all, and would take the widgets on hosts, which
    that does not know, for gone; where nobody answers it asks one by one.
    """
    targets = comm.get_comm_manager().targets
    original = targets.get(_CONTROL)
    if original is None or original is _control:
        return
    _originals[:] = [original]
    targets[_CONTROL] = _control


def _control(asked: Any, message: Any) -> None:
    if _open:
        asked.close()
    else:
        _originals[0](asked, message)


_originals: list[Any] = []  # ipywidgets' own answer
