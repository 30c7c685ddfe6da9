"""Show a cell's error as it was shown on the host, at the moment when IPython shows the cell's error.

Runs in the notebook. A cell's error is raised here as itself, for `%debug` and for code that catches it;
but its frames, their variables and IPython's settings are on the host, and so the host shows it. What a
cell shows after its error (figures that it left open) is drawn after it, as in any kernel.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from fal_agent.frames import leave_to_debuggers

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.hosts.base import Received

    Draw = Callable[[Received], None]

__all__ = [
    "HeldError",
    "forget_error",
    "hold_error",
    "note_error",
    "plain_text",
    "show_error",
    "show_errors_of",
    "show_next_input",
    "show_page",
]

_ANSI = re.compile(r"\x1b\[[\d;]*m")


class HeldError:
    """What a cell said at its end: its error, and what came after.

    Attributes:
        content: the error as the host showed it.
        later: events that came after it.
        error: what the cell raises here; None until that is known.
    """

    def __init__(self, content: dict[str, Any], draw: Draw) -> None:
        self.content, self._draw = content, draw
        self.later: list[Received] = []
        self.error: BaseException | None = None

    def show(self, otherwise: Callable[[], None]) -> None:
        """Show all of it; `otherwise` shows what is raised here, if that is another error: a timeout, say."""
        if type(self.error).__name__ != self.content["ename"]:
            otherwise()
        elif self.content["traceback"] is not None:  # else it was printed
            show_error({**self.content, "traceback": [*self.content["traceback"], *self._advice()]})
        for received in self.later:
            self._draw(received)

    def _advice(self) -> list[str]:
        """What was added here to the error of a missing module: how to get it onto the host."""
        return list(getattr(self.error, "__notes__", ())) if isinstance(self.error, ImportError) else []


_held: list[HeldError] = []  # of the cell that runs now; one at most
_debuggable: list[tuple[BaseException, Callable[[], bool]]] = []  # the last error whose frames a host keeps


def hold_error(content: dict[str, Any], draw: Draw) -> HeldError:
    """Keep the error that ends the running cell until IPython asks for it; `draw` draws what comes after."""
    _held[:] = [HeldError(content, draw)]
    return _held[0]


def forget_error() -> None:
    """Another call begins; an error that nobody asked for was caught."""
    _held.clear()


def note_error(error: BaseException, debug: Callable[[], bool] | None) -> None:
    """Say what the running cell raises here.

    Args:
        error: that.
        debug: starts a debugger in its frames on the host, or says that they are gone; None: there are none.
    """
    for held in _held:
        held.error = error
    _debuggable[:] = [] if debug is None else [(error, debug)]


def show_errors_of(shell: Any) -> Callable[[], None]:
    """Let an IPython shell show the errors of cells on hosts as the hosts do; give what undoes it."""
    original, original_debugger = shell.showtraceback, shell.debugger

    def showtraceback(*args: Any, **options: Any) -> None:
        error = sys.exc_info()[1]
        if error is None or not _held or _held[0].error is not error:
            original(*args, **options)
            return
        leave_to_debuggers(error)
        _held.pop().show(lambda: original(*args, **options))
        debugger()

    def debugger(force: bool = False) -> None:
        """Debug the last error where its frames are: `%debug`, and after `%pdb on` any error."""
        if not (force or shell.call_pdb):
            return
        if _debuggable and _debuggable[0][0] is getattr(sys, "last_value", None):
            error, debug = _debuggable[0]
            if debug():
                return
            _debuggable.clear()
            leave_to_debuggers(error)
        original_debugger(force)

    shell.showtraceback, shell.debugger = showtraceback, debugger

    def undo() -> None:
        for name, ours in (("showtraceback", showtraceback), ("debugger", debugger)):
            if vars(shell).get(name) is ours:
                delattr(shell, name)

    return undo


def show_error(content: dict[str, Any]) -> None:
    """Show an error below the cell that is running; in a script, on stderr."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None:
        sys.stderr.write(plain_text(content))
        return
    kind = type(content["ename"], (Exception,), {})
    shell._showtraceback(kind, content["evalue"], content["traceback"])  # noqa: SLF001 - a kernel's way to its front end


def plain_text(content: dict[str, Any]) -> str:
    """An error as text without colours."""
    return _ANSI.sub("", "\n".join(content["traceback"])) + "\n"


def show_next_input(text: str, *, replace: bool) -> None:
    """Put text into the notebook's next cell, or in place of the present one, to run where this one ran."""
    from IPython import get_ipython

    shell = get_ipython()
    first_line = (shell.history_manager.input_hist_raw or [""])[-1].partition("\n")[0]
    if first_line.startswith("%%fal") and not text.startswith("%%fal"):
        text = f"{first_line}\n{text}"
    shell.set_next_input(text, replace=replace)


def show_page(data: dict[str, Any], start: int) -> None:
    """Show help or sources where this shell shows them: in a notebook's pager, or a terminal's."""
    from IPython.core import page

    page.page(data, start=start)
