"""Publish what is shown below cells: in the cell that runs, in any other, and again when it changes.

Runs in the notebook's kernel.
"""

from __future__ import annotations

import html
import sys
import threading
import uuid
from typing import Any, Protocol

__all__ = [
    "MUTED",
    "NOTHING",
    "STYLE",
    "UpdatedDisplay",
    "as_text",
    "note",
    "parent_header",
    "publish",
    "publish_result",
    "running",
]


class _Followed(Protocol):
    """A display that may change after its cell has ended."""

    @property
    def is_settled(self) -> bool:
        """Whether nothing will change any more."""

    def redraw_now(self) -> None:
        """Draw what has changed while no cell ran."""


class _RunningCell:
    """The cell that is running, or ran last, and the displays that may still change.

    Attributes:
        parent: the message of that cell.
    """

    def __init__(self) -> None:
        self.parent: Any = None
        self._followed: list[_Followed] = []

    def follow(self, display: _Followed) -> None:
        """Let a display redraw when a cell starts, until it is settled."""
        self.watch()
        self._followed = [known for known in self._followed if not known.is_settled]
        self._followed.append(display)

    def watch(self) -> None:
        """Know from now on which cell runs."""
        if self.parent is None:
            from IPython import get_ipython

            get_ipython().events.register("pre_run_cell", self._enter)
            self.parent = parent_header()

    @property
    def is_looked_at(self) -> bool:
        """Whether a person looks, as far as is known: the front end can ask its user something."""
        return bool(((self.parent or {}).get("content") or {}).get("allow_stdin"))

    def _enter(self, *_info: Any) -> None:
        """A cell starts: what changed while none was running is drawn now."""
        self.parent = parent_header()
        for display in self._followed:
            display.redraw_now()


running = _RunningCell()

NOTHING = {"text/html": '<span class="fal-nothing"></span>', "text/plain": ""}
# Where JupyterLab does not trust a notebook it leaves out what refers to its theme: the grey stands alone.
MUTED = "color:#808080; color:var(--jp-ui-font-color2, #808080); font-size:var(--jp-ui-font-size1, 13px)"
# A saved notebook may hold the view of buttons whose kernel has gone. JupyterLab would say "Error displaying
# widget" there: it is hidden while there is no element in it, only text. Emptied ones take no room.
# Buttons lower than ipywidgets makes them need lines as low.
STYLE = (
    "<style>.fal-small .jupyter-button{line-height:20px}"
    ".jp-OutputArea-child:has(.fal-run)+.jp-OutputArea-child>.jupyter-widgets:not(:has(*)),"
    ".jp-OutputArea-child:has(.fal-run)+.jp-OutputArea-child:has(.fal-nothing){display:none}</style>"
)


class UpdatedDisplay:
    """One display in as many cells as show it, which may be updated in all of them, from any thread."""

    def __init__(self) -> None:
        self._display_id = f"fal-{uuid.uuid4().hex}"
        self._data: dict[str, Any] = {}
        self._is_shown = self._may_be_missed = False
        self._lock = threading.Lock()
        self.is_settled = False
        running.follow(self)

    def show(self, data: dict[str, Any], parent: Any = None) -> None:
        """Show this in the cell that is running, and wherever it was shown before.

        Args:
            data: by kind.
            parent: the message of another cell to show it in.
        """
        if self._is_shown:
            self.update(data)
        with self._lock:
            self._data, self._is_shown = data, True
            publish(data, {}, display_id=self._display_id, parent=parent or parent_header())

    def update(self, data: dict[str, Any]) -> None:
        """Show this instead of what was shown before."""
        with self._lock:
            self._data, self._may_be_missed = data, True
            self._publish()

    def redraw_now(self) -> None:
        """A cell starts: repeat what a front end may have missed that hears only running cells."""
        with self._lock:
            if self._may_be_missed:
                self._may_be_missed = False
                self._publish()

    def _publish(self) -> None:
        # As with a board: an update is found by its id, whatever cell it comes from.
        publish(self._data, {}, display_id=self._display_id, update=True, parent=running.parent)

    def close(self) -> None:
        """There will be no further update, but for those who missed the last one."""
        self.is_settled = True


def note(content: str) -> str:
    """HTML of a remark of ours, which is not to be mistaken for the cell's own output."""
    return f'<div style="{MUTED}">fal · {content}</div>'


def as_text(content: str) -> str:
    """HTML of text as a cell prints it; front ends put wide margins around their own."""
    return f'<pre style="margin:0; padding:0">{html.escape(content)}</pre>'


def publish_result(data: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Show the value of a cell's last expression as the cell's own result; also in a terminal."""
    from IPython import get_ipython
    from IPython.core.displayhook import CapturingDisplayHook

    if isinstance(sys.displayhook, CapturingDisplayHook):  # `%%capture` above `%%fal`
        sys.displayhook.outputs.append({"data": data, "metadata": metadata})
        return
    hook = get_ipython().displayhook
    hook.start_displayhook()
    hook.write_output_prompt()
    hook.write_format_data(data, metadata)
    hook.finish_displayhook()


def publish(
    data: dict[str, Any],
    metadata: dict[str, Any],
    *,
    display_id: str | None = None,
    update: bool = False,
    parent: Any = None,
) -> None:
    """Show a MIME bundle.

    Args:
        data: by kind.
        metadata: likewise.
        display_id: under which it can be updated.
        update: change what is shown under that id.
        parent: the message of the cell that it belongs to; None for the one that runs.
    """
    from IPython import get_ipython

    shell = get_ipython()
    transient = {"display_id": display_id} if display_id else {}
    if parent is None:
        shell.display_pub.publish(data, metadata, transient=transient, update=update)
        return
    # The public way knows only the cell that runs now, and `%%capture` in that; a run in the background
    # belongs to another.
    content = {"data": data, "metadata": metadata, "transient": transient}
    kind = "update_display_data" if update else "display_data"
    kernel = shell.kernel
    kernel.session.send(kernel.iopub_socket, kind, content, parent=parent, ident=b"display_data")


def parent_header() -> Any:
    """The message of the cell that is running, to which its output belongs."""
    from IPython import get_ipython

    return get_ipython().kernel.get_parent("shell")
