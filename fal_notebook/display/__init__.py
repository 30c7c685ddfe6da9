"""How a call's events look: in a notebook's cell, in a terminal, in a script.

Runs in the notebook. `drawer` gives what draws the events of a call that the main thread waits for;
`background` what draws those of a call that goes on by itself, in a place that belongs to its cell.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fal_agent.wire import Failure, Result
from fal_notebook.display.errors import forget_error, note_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.display.comms import CommBridge, Send
    from fal_notebook.hosts.base import Received

    Draw = Callable[[Received], None]

__all__ = ["background", "comm_bridge", "drawer", "in_kernel", "message_id", "note_error"]


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel, which shows more than text."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def message_id() -> str:
    """The id of the front end's message that this thread answers; "" outside of a kernel."""
    if not in_kernel():
        return ""
    from IPython import get_ipython

    return str(get_ipython().kernel.get_parent("shell").get("header", {}).get("msg_id", ""))


def comm_bridge(send: Send | None = None) -> CommBridge | None:
    """Give what connects widgets on a host with the front end; None outside of a kernel.

    Args:
        send: brings what the front end says to the host; None where nobody listens there.
    """
    if not in_kernel():
        return None
    from fal_notebook.display.comms import CommBridge

    return CommBridge(send)


def drawer(bridge: CommBridge | None = None) -> Draw:
    """Give what draws the events of one call, called by the thread that waits for it.

    Args:
        bridge: of its session; None for a call's own.
    """
    forget_error()
    return _Drawer(bridge).draw


class _Drawer:
    """Draws one call, on a face that is made when there is something to draw: most calls say nothing."""

    __slots__ = ("_bridge", "_draw")

    def __init__(self, bridge: CommBridge | None) -> None:
        self._bridge = bridge
        self._draw: Draw | None = None

    def draw(self, received: Received) -> None:
        if self._draw is None:
            if isinstance(received.event, (Result, Failure)):
                return
            self._draw = _face(self._bridge)
        self._draw(received)


def _face(bridge: CommBridge | None) -> Draw:
    if in_kernel():
        from fal_notebook.display.notebook import CellFace

        return CellFace(bridge).draw
    from fal_notebook.display.plain import TextFace

    return TextFace().draw


def background(label: str, bridge: CommBridge | None = None) -> Draw:
    """Give what draws the events of one call in the background, from any thread.

    Args:
        label: the function's name, or the first line of the cell.
        bridge: of its session; None for a call's own.
    """
    if in_kernel():
        from fal_notebook.display.notebook import BackgroundFace

        return BackgroundFace(label, bridge).draw
    from fal_notebook.display.plain import TextFace

    return TextFace().draw
