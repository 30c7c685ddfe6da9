"""How a call's events look: in a notebook's cell, in a terminal, in a script.

Runs in the notebook. `drawer` gives what draws the events of a call that the main thread waits for;
`background` what draws those of a call that goes on by itself, in a place that belongs to its cell.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Failure, Result
from fal_notebook.display.errors import forget_error, note_error
from fal_notebook.display.watching import unwatch, watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.display.comms import CommBridge, Send
    from fal_notebook.display.notebook import CellFace
    from fal_notebook.display.plain import TextFace
    from fal_notebook.display.run_card import Stoppable
    from fal_notebook.hosts.base import Received

    Draw = Callable[[Received], None]

__all__ = [
    "STRIP_AFTER",
    "Drawer",
    "background",
    "comm_bridge",
    "drawer",
    "in_kernel",
    "message",
    "note_error",
    "remark",
    "show_connections",
]

STRIP_AFTER = 5.0  # seconds that a call runs before a strip shows what its worker does


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel, which shows more than text."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def message() -> dict[str, Any]:
    """The front end's message that this thread answers; empty outside of a kernel."""
    if not in_kernel():
        return {}
    from fal_notebook.display.publishing import parent_header

    return dict(parent_header() or {})


def comm_bridge(send: Send | None = None) -> CommBridge | None:
    """Give what connects widgets on a host with the front end; None outside of a kernel.

    Args:
        send: brings what the front end says to the host; None where nobody listens there.
    """
    if not in_kernel():
        return None
    from fal_notebook.display.comms import CommBridge

    return CommBridge(send)


def drawer(bridge: CommBridge | None = None, *, adds_up: bool = False, reason: str = "") -> Drawer:
    """Give what draws the events of one call, called by the thread that waits for it.

    Args:
        bridge: of the widgets of its session; None for a call's own.
        adds_up: they are those of many calls, whose bars of progress add up.
        reason: how the call's requirements have changed, should an environment be built.
    """
    forget_error()
    return Drawer(bridge, adds_up=adds_up, reason=reason)


class Drawer:
    """Draws one call, on a face that is made when there is something to draw: most calls say nothing.

    Between `begin` and `end` the call is looked at: one that takes long says so by itself.
    """

    __slots__ = ("_adds_up", "_began", "_bridge", "_draw", "_face", "_reason", "_run")

    def __init__(self, bridge: CommBridge | None, *, adds_up: bool = False, reason: str = "") -> None:
        self._bridge, self._adds_up, self._reason = bridge, adds_up, reason
        self._draw: Draw | None = None
        self._face: CellFace | TextFace | None = None
        self._run: Stoppable | None = None
        self._began = 0.0
        show_connections()

    def __call__(self, received: Received) -> None:
        """Draw one event."""
        if self._draw is None:
            if self._face is None and isinstance(received.event, (Result, Failure)):
                return
            self._make_face()
        assert self._draw is not None
        self._draw(received)

    def begin(self, run: Stoppable) -> None:
        """The notebook waits for this run from now on."""
        self._run, self._began = run, time.monotonic()
        watch(self)

    def end(self) -> None:
        """The notebook no longer waits."""
        unwatch(self)
        run, self._run = self._run, None
        if self._face is not None:
            if run is None or run.done():
                self._face.close()
            else:  # a generator's items are waited for by and by
                self._face.fold()

    def tick(self) -> None:
        """Look at the call; called by the watching thread."""
        run = self._run
        if run is None or time.monotonic() - self._began < STRIP_AFTER or not _may_show_strip(run):
            return
        unwatch(self)  # the card looks by itself
        if self._draw is None:
            self._make_face()
        from fal_notebook.display.notebook import CellFace

        if isinstance(self._face, CellFace):
            self._face.look(run, self._began)

    def _make_face(self) -> None:
        with _making:
            if self._draw is not None:
                return
            if in_kernel():
                from fal_notebook.display.notebook import CellFace

                label = self._run.label if self._run is not None else ""
                self._face = CellFace(label, self._bridge, adds_up=self._adds_up, reason=self._reason)
            else:
                from fal_notebook.display.plain import TextFace

                self._face = TextFace(adds_up=self._adds_up, reason=self._reason)
            self._draw = self._face.draw


_making = threading.Lock()
_listening: list[bool] = []


def show_connections() -> None:
    """From now on show how hosts are connected, and know which cell runs."""
    if _listening:
        return
    from fal_notebook.display.connecting import shown
    from fal_notebook.hosts.steps import listen

    _listening.append(True)
    listen(shown)
    if in_kernel():
        from fal_notebook.display.publishing import running

        running.watch()


def _may_show_strip(run: Stoppable) -> bool:
    """Whether somebody looks at the cell, and the host tells what the run's worker uses."""
    if not in_kernel() or not getattr(run.host, "tells_usage", False):
        return False
    from fal_notebook.display.publishing import running

    return running.is_looked_at


def remark(text: str) -> None:
    """Say something of ours below the cell that is running, apart from what it prints; else on stderr."""
    if not in_kernel():
        sys.stderr.write(f"{text}\n")
        return
    from fal_notebook.display.publishing import note, publish

    publish({"text/plain": text, "text/html": note(html.escape(text))}, {})


def background(label: str, bridge: CommBridge | None = None) -> Draw:
    """Give what draws the events of one call in the background, from any thread.

    Args:
        label: the function's name, or the first line of the cell.
        bridge: of the widgets of its session; None leaves widgets as text.
    """
    if in_kernel():
        from fal_notebook.display.board import BackgroundFace

        return BackgroundFace(label, bridge).draw
    from fal_notebook.display.plain import TextFace

    return TextFace().draw
