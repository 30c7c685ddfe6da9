"""The live panel of `%fal`: a row for each thing on a host, with its buttons.

Runs in the notebook's kernel; needs ipywidgets. A thread looks every two seconds and changes what has
changed, for ten minutes after the last press, so that a panel that nobody looks at costs nothing; it ends
when the panel is closed, when its cell runs again, and with the kernel.
"""

from __future__ import annotations

import html
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from fal_notebook.display.publishing import MUTED, NOTHING, STYLE, UpdatedDisplay, running
from fal_notebook.display.stop_button import let_any_thread_hear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PanelView"]

_VIEW = "application/vnd.jupyter.widget-view+json"
_EVERY = 2.0  # seconds between two looks
_PATIENCE = 600.0  # seconds without a press after which nobody seems to look any more
_SURE = 5.0  # seconds in which a second press means that a person is sure
_STYLE = (
    f"{STYLE}<style>.jp-OutputArea-child:has(.fal-panel-table):has(+.jp-OutputArea-child .fal-small)"
    "{display:none}</style>"
)
_AT_FIRST = {"text/plain": "the hosts", "text/html": '<div class="fal-run fal-panel-table">the hosts…</div>'}
_ONE_LINE = "line-height:24px; white-space:nowrap; overflow:hidden; text-overflow:ellipsis"
_HEADINGS = {
    "device": "devices",
    "session": "sessions",
    "app": "apps",
    "run": "runs",
    "environment": "environments",
}


class PanelView:
    """The panel, shown at once in the cell that is running.

    Args:
        look: gives the hosts (see `fal_notebook.panel.Section`).
        text: gives everything as a table, for what is saved.
    """

    def __init__(self, look: Callable[[], Sequence[Any]], text: Callable[[], Any]) -> None:
        from ipywidgets import HBox, VBox

        running.watch()
        self._look, self._text = look, text
        self._parent = running.parent
        self._rows: dict[tuple[str, str], _Line] = {}
        self._note = _text_widget("")
        self._refresh, self._close = _button("Refresh", self.refresh), _button("Close", self.close)
        self._body = VBox([])
        self._foot = HBox([self._refresh, self._close, self._note])
        self._box = VBox([self._body, self._foot])
        self._box.add_class("fal-small")
        self._table, self._display = UpdatedDisplay(), UpdatedDisplay()
        self._changed = threading.Event()
        self._pressed_at = time.monotonic()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        _panels[:] = [panel for panel in _panels if not panel.close_for(self._parent)] + [self]
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        self._table.show(_AT_FIRST, parent=self._parent)
        self._display.show({_VIEW: view, "text/plain": "%fal hosts lists the hosts"}, parent=self._parent)
        self.refresh()

    def refresh(self) -> None:
        """Look at once, and go on for a while."""
        self._pressed_at = time.monotonic()
        self._wake()

    def close(self) -> None:
        """End it soon; what is left is the table of that moment."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._go_on, name="fal-panel", daemon=True)
            self._thread.start()

    def _as_table(self) -> dict[str, str]:
        """Everything as a table, which is seen where there is no live panel below it."""
        table = self._text()
        shown = f'{_STYLE}<div class="fal-run fal-panel-table">{table.html()}</div>'
        return {"text/plain": repr(table), "text/html": shown}

    def close_for(self, parent: Any) -> bool:
        """End it if its cell is the one that runs now; give whether it has ended."""
        if not self._is_closed and _cell_of(self._parent) == _cell_of(parent) is not None:
            self.close()
        return self._is_closed

    def say(self, text: str) -> None:
        """Tell something below the rows."""
        self._note.value = f'<span style="{MUTED}">{html.escape(text)}</span>'

    # ------------------------------------------------------------ looking

    def _go_on(self) -> None:
        self._draw()
        self._table.update(self._as_table())
        while not self._is_closed:
            if time.monotonic() - self._pressed_at > _PATIENCE:
                self.say("paused: press Refresh")
                return
            self._changed.wait(_EVERY)
            self._changed.clear()
            if not self._is_closed:
                self._draw()
        self._fold()

    def _fold(self) -> None:
        """Leave a table, without widgets."""
        self._table.update(self._as_table())
        self._display.update(NOTHING)
        for display in (self._table, self._display):
            display.close()
        for line in self._rows.values():
            line.close()
        for widget in (self._refresh, self._close, self._note, self._foot, self._body, self._box):
            widget.close()

    def _draw(self) -> None:
        lines: dict[tuple[str, str], _Line] = {}
        children = []
        for section in self._look():
            head = f"<b>{html.escape(section.name)}</b>{' (current)' if section.is_current else ''}"
            muted = f' <span style="{MUTED}">{html.escape(section.text)}</span>'
            children.append(self._line(lines, (section.name, ""), head + muted, section.actions))
            for kind, heading in _HEADINGS.items():
                rows = [row for row in section.rows if row.kind == kind]
                if rows:
                    title = f'<span style="{MUTED}; padding-left:12px">{heading}</span>'
                    children.append(self._line(lines, (section.name, kind), title, ()))
                for row in rows:
                    text = f'<span style="padding-left:24px">{html.escape(row.text)}</span>'
                    children.append(self._line(lines, (section.name, row.key), text, row.actions))
        gone = [line for key, line in self._rows.items() if lines.get(key) is not line]
        self._rows = lines
        boxes = [line.box for line in children]
        if list(self._body.children) != boxes:
            self._body.children = boxes
        for line in gone:
            line.close()

    def _line(
        self, lines: dict[tuple[str, str], _Line], key: tuple[str, str], text: str, actions: Sequence[Any]
    ) -> _Line:
        labels = tuple(action.label for action in actions)
        line = self._rows.get(key)
        if line is None or line.labels != labels:
            line = _Line(labels, self)
        line.show(text, actions)
        lines[key] = line
        return line


class _Line:
    """One row of the panel.

    Attributes:
        labels: of its buttons.
        box: the widget.
    """

    def __init__(self, labels: tuple[str, ...], panel: PanelView) -> None:
        from ipywidgets import HBox, Layout

        self.labels, self._panel = labels, panel
        self._html = _text_widget("")
        self._actions: Sequence[Any] = ()
        self._asked_at = [0.0] * len(labels)
        self._buttons = [_button(label, partial(self._press, number)) for number, label in enumerate(labels)]
        low = Layout(align_items="center", min_height="26px", overflow="visible")
        self.box = HBox([self._html, *self._buttons], layout=low)

    def show(self, text: str, actions: Sequence[Any]) -> None:
        """Say this, with these actions behind the buttons."""
        self._actions = actions
        shown = f'<div style="{_ONE_LINE}">{text}</div>'
        if self._html.value != shown:
            self._html.value = shown

    def close(self) -> None:
        """Take it away."""
        for widget in (*self._buttons, self._html, self.box):
            widget.close()

    def _press(self, number: int) -> None:
        """Do it; what cannot be undone at the second press."""
        action = self._actions[number]
        now = time.monotonic()
        if action.is_final and now - self._asked_at[number] > _SURE:
            self._asked_at[number] = now
            self._panel.say(f"press {action.label} again to do it")
            return
        self._panel.say(f"{action.label}…")
        try:
            action.do()
        except Exception as error:  # noqa: BLE001 - there is nobody to raise it to: the panel says it
            self._panel.say(str(error))
        else:
            self._panel.say("")
        self._panel.refresh()


def _button(label: str, press: Callable[[], None]) -> Any:
    """A small button; a press is dealt with in a thread, since the one that hears it has others to hear."""
    from ipywidgets import Button, Layout

    narrow = Layout(width="auto", height="22px", flex="0 0 auto", margin="0 2px", padding="0 8px")
    button = Button(description=label, layout=narrow)
    button.on_click(lambda _: threading.Thread(target=press, name="fal-press", daemon=True).start())
    let_any_thread_hear(button)
    return button


def _text_widget(text: str) -> Any:
    from ipywidgets import HTML, Layout

    return HTML(text, layout=Layout(margin="0 4px", min_width="0", height="24px"))


def _cell_of(parent: Any) -> str | None:
    """The id of the cell that a message runs, where the front end tells it."""
    return ((parent or {}).get("metadata") or {}).get("cellId")


_panels: list[PanelView] = []
