"""A live button below an app's card that stops the app.

Runs in the notebook's kernel. The button has a display of its own, with text instead of it for front
ends that have no widgets, and leaves when the app has ended: what is saved is the card.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from fal_notebook.display.app_face import hint_html

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StopButton", "has_widgets", "let_any_thread_hear"]

_VIEW = "application/vnd.jupyter.widget-view+json"


def has_widgets() -> bool:
    """Whether this kernel can make widgets."""
    try:
        import ipywidgets  # noqa: F401 - only whether it is there
    except ImportError:
        return False
    return True


class StopButton:
    """The button.

    Args:
        name: the app's name.
        hint: what is shown instead where there are no widgets.
        stop: stops the app and waits until it has; called in a thread of its own.
        on_problem: called with what `stop` raised.
    """

    def __init__(
        self,
        name: str,
        hint: str,
        *,
        stop: Callable[[], None],
        on_problem: Callable[[Exception], None],
    ) -> None:
        from ipywidgets import Button, Layout

        from fal_notebook.display.publishing import UpdatedDisplay

        self._stop, self._on_problem, self._hint = stop, on_problem, hint
        self._widget = Button(description="Stop", tooltip=f"Stop {name}", layout=Layout(width="auto"))
        self._widget.on_click(self._pressed)
        let_any_thread_hear(self._widget)
        self._display = UpdatedDisplay()

    def show(self) -> None:
        """Show it in the cell that is running now."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self._widget.model_id}
        self._display.show({_VIEW: view, "text/html": hint_html(self._hint), "text/plain": self._hint})

    def close(self, state: str) -> None:
        """Take it away; a page that was loaded anew has no way to hear that, and is told the app's state."""
        self._display.update({"text/html": '<span class="fal-nothing"></span>', "text/plain": ""})
        self._display.close()
        self._widget.on_click(self._pressed, remove=True)
        self._become(state.capitalize(), can_be_pressed=False)

    def _pressed(self, _widget: Any) -> None:
        """Stop the app without holding up the kernel, which may be asked to do something else."""
        self._become("Stopping…", can_be_pressed=False)
        threading.Thread(target=self._run, name="fal-stop", daemon=True).start()

    def _run(self) -> None:
        try:
            self._stop()
        except Exception as error:  # noqa: BLE001 - there is nobody to raise it to: the card says it
            self._become("Stop", can_be_pressed=True)
            self._on_problem(error)

    def _become(self, label: str, *, can_be_pressed: bool) -> None:
        self._widget.description, self._widget.disabled = label, not can_be_pressed
        let_any_thread_hear(self._widget)


def let_any_thread_hear(widget: Any) -> None:
    """Let a press be heard while a cell runs.

    JupyterLab sends it to a thread of the kernel's that is free (a subshell), but ipykernel 7.4 leads
    it to the thread that spoke to this widget last, which may be busy. Other versions hold no such
    thing, and there is nothing to take away.
    """
    getattr(widget.comm, "__dict__", {}).pop("_reply_subshell_id", None)
