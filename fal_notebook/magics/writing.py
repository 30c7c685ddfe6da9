"""Let Tab and Shift-Tab in a `%%fal` cell know the names of its session.

Runs in the notebook. IPython's completer and the kernel's inspection are asked as always, and answer with
the notebook's own names; what the session knows comes before that.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from fal_notebook.magics.options import CellOptionsError, parse_cell_line

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

__all__ = ["ask_sessions_of"]


def ask_sessions_of(shell: Any) -> Callable[[], None]:
    """Ask sessions about the cells that are written in a shell; give what undoes it."""
    completer, kernel = shell.Completer, getattr(shell, "kernel", None)
    complete = completer.completions

    def completions(text: str, offset: int) -> Iterator[Any]:
        line = text.rfind("\n", 0, offset) + 1
        seen: set[str] = set()  # lines as they would become: both may replace more or fewer characters
        for item in itertools.chain(_completions_there(text, offset), complete(text, offset)):
            completed = text[line : item.start] + item.text
            if completed not in seen:
                seen.add(completed)
                yield item

    completer.completions = completions
    undo_inspection = _ask_when_inspecting(kernel) if hasattr(kernel, "do_inspect") else None

    def undo() -> None:
        completer.__dict__.pop("completions", None)
        if undo_inspection is not None:
            undo_inspection()

    return undo


def _ask_when_inspecting(kernel: Any) -> Callable[[], None]:
    inspect = kernel.do_inspect

    def do_inspect(code: str, cursor_pos: int, detail_level: int = 0, omit_sections: Any = ()) -> Any:
        found = _ask("inspect", code, cursor_pos, detail=detail_level)
        if not found:
            return inspect(code, cursor_pos, detail_level, omit_sections)
        if not kernel.shell.enable_html_pager:
            found.pop("text/html", None)
        return {"status": "ok", "found": True, "data": found, "metadata": {}}

    kernel.do_inspect = do_inspect
    return lambda: kernel.__dict__.pop("do_inspect", None)


def _completions_there(text: str, offset: int) -> Iterator[Any]:
    from IPython.core.completer import Completion

    first_line = text.find("\n") + 1
    for start, end, word, kind, signature in _ask("complete", text, offset) or ():
        yield Completion(
            start + first_line, end + first_line, word, type=kind, signature=signature or "", _origin="fal"
        )


def _ask(action: str, text: str, offset: int, *, detail: int = 0) -> Any:
    """Ask the session of a cell; None if it is no cell of a host, or the cursor is in its line."""
    from fal_notebook.looking import look

    line, newline, code = text.partition("\n")
    cursor = offset - len(line) - 1
    options = _options_of(line)
    if options is None or not newline or cursor < 0:
        return None
    return look(options, action, code, cursor, detail=detail)


def _options_of(line: str) -> argparse.Namespace | None:
    magic, _, arguments = line.partition(" ")
    if magic.strip() != "%%fal":
        return None
    try:
        return parse_cell_line(arguments)
    except CellOptionsError:  # it is being written
        return None
