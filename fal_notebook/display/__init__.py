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

    from fal_notebook.hosts.base import Received

    Draw = Callable[[Received], None]

__all__ = ["background", "drawer", "in_kernel", "note_error"]


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel, which shows more than text."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def drawer() -> Draw:
    """Give what draws the events of one call, called by the thread that waits for it."""
    forget_error()
    return _Drawer().draw


class _Drawer:
    """Draws one call, on a face that is made when there is something to draw: most calls say nothing."""

    __slots__ = ("_draw",)

    def __init__(self) -> None:
        self._draw: Draw | None = None

    def draw(self, received: Received) -> None:
        if self._draw is None:
            if isinstance(received.event, (Result, Failure)):
                return
            self._draw = _face()
        self._draw(received)


def _face() -> Draw:
    if in_kernel():
        from fal_notebook.display.notebook import CellFace

        return CellFace().draw
    from fal_notebook.display.plain import TextFace

    return TextFace().draw


def background(label: str) -> Draw:
    """Give what draws the events of one call in the background, from any thread.

    Args:
        label: the function's name, or the first line of the cell.
    """
    if in_kernel():
        from fal_notebook.display.notebook import BackgroundFace

        return BackgroundFace(label).draw
    from fal_notebook.display.plain import TextFace

    return TextFace().draw
