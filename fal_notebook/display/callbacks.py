"""Draw what a widget's callback on a host shows, as part of the front end's message that caused it.

Runs in the notebook's kernel. No cell runs then: a front end puts it where it puts the output of callbacks
in any kernel, such as into an `Output` widget that takes it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Clear, Comm, Display, Log
from fal_notebook.display.comms import without_dead_views
from fal_notebook.display.phases import TextDecoder

if TYPE_CHECKING:
    from fal_notebook.display.comms import CommBridge
    from fal_notebook.hosts.base import Received

__all__ = ["CallbackFace"]

_KINDS = {"update": "update_display_data", "error": "error"}


class CallbackFace:
    """What one message to a widget causes; may be drawn from any thread.

    Args:
        bridge: of the widget's session.
        parent: the front end's message.
    """

    def __init__(self, bridge: CommBridge, parent: dict[str, Any]) -> None:
        self._bridge, self._parent = bridge, parent
        self._decode = TextDecoder()

    def draw(self, received: Received) -> None:
        """Draw one event."""
        event = received.event
        if isinstance(event, Comm):
            self._bridge.draw(received, self._parent)
        elif isinstance(event, Log):
            self._send("stream", {"name": event.stream, "text": self._decode(received)})
        elif isinstance(event, Clear):
            self._send("clear_output", {"wait": event.wait})
        elif isinstance(event, Display):
            self._show(event.kind, json.loads(bytes(received.data[0])))

    def _show(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "error":
            content = {**content["data"], "traceback": content["data"]["traceback"] or []}
        elif kind in ("page", "next_input"):  # what belongs to a cell's reply
            return
        else:
            content["data"] = without_dead_views(content["data"])
        self._send(_KINDS.get(kind, "display_data"), content)

    def _send(self, kind: str, content: dict[str, Any]) -> None:
        from IPython import get_ipython

        publisher = get_ipython().display_pub
        publisher.session.send(
            publisher.pub_socket, kind, content, parent=self._parent, ident=publisher.topic
        )
