"""The buttons below a run's card, Interrupt and Kill, as long as the run goes on.

Runs in the notebook's kernel. As with an app's button (`stop_button`) they have a display of their own, which
is emptied at the end.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from fal_notebook.display.publishing import NOTHING, UpdatedDisplay
from fal_notebook.display.stop_button import has_widgets, let_any_thread_hear

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RunButtons", "has_widgets"]

_VIEW = "application/vnd.jupyter.widget-view+json"


class RunButtons:
    """The two buttons, shown at once.

    Args:
        interrupt: interrupts the run.
        kill: ends its worker.
        parent: the message of the cell that they belong to.
    """

    def __init__(self, interrupt: Callable[[], None], kill: Callable[[], None], *, parent: Any) -> None:
        from ipywidgets import Button, HBox, Layout

        narrow = Layout(width="auto", height="22px")
        self._actions = {
            Button(
                description="Interrupt",
                tooltip="Raise KeyboardInterrupt in this call; what is cached there stays",
                layout=narrow,
            ): (interrupt, "Interrupting…"),
            Button(
                description="Kill",
                tooltip="End the process that runs this call; what it keeps is lost",
                layout=narrow,
            ): (kill, "Ending…"),
        }
        for button in self._actions:
            button.on_click(self._pressed)
            let_any_thread_hear(button)
        self._box = HBox(list(self._actions))
        self._box.add_class("fal-small")
        self._display = UpdatedDisplay()
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        hint = "interrupt the kernel to interrupt this call; twice ends its process"
        self._display.show({_VIEW: view, "text/plain": hint}, parent=parent)

    def close(self) -> None:
        """Take them away."""
        self._display.update(NOTHING)
        self._display.close()
        for button in self._actions:
            button.on_click(self._pressed, remove=True)
            button.close()
        self._box.close()

    def _pressed(self, button: Any) -> None:
        """Do it in a thread: the one that hears the press has others to hear."""
        action, label = self._actions[button]
        button.description = label
        let_any_thread_hear(button)
        threading.Thread(target=action, name="fal-press", daemon=True).start()
