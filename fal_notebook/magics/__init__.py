"""The magics: `%%fal` for cells, `%fal` for hosts and what is on them.

Runs in the notebook. Magics parse their line and hand over; loading them contacts no machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["load", "unload"]

_undo: dict[Any, Callable[[], None]] = {}  # shell -> what takes our way of showing errors away again


def load(shell: Any) -> None:
    """Add the magics and their completions to an IPython shell."""
    from fal_notebook.display.errors import show_errors_of
    from fal_notebook.magics.cell import CellMagics
    from fal_notebook.magics.completion import add_completions
    from fal_notebook.magics.line import LineMagics

    shell.register_magics(CellMagics)
    shell.register_magics(LineMagics)
    add_completions(shell)
    if shell not in _undo:
        _undo[shell] = show_errors_of(shell)


def unload(shell: Any) -> None:
    """Take them away again."""
    for kind in ("cell", "line"):
        shell.magics_manager.magics[kind].pop("fal", None)
    if shell in _undo:
        _undo.pop(shell)()
