"""The magics: `%%fal` for cells, `%fal` for hosts and what is on them.

Runs in the notebook. Magics parse their line and hand over; loading them contacts no machine.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load", "unload"]


def load(shell: Any) -> None:
    """Add the magics and their completions to an IPython shell."""
    from fal_notebook.magics.cell import CellMagics
    from fal_notebook.magics.completion import add_completions
    from fal_notebook.magics.line import LineMagics

    shell.register_magics(CellMagics)
    shell.register_magics(LineMagics)
    add_completions(shell)


def unload(shell: Any) -> None:
    """Take them away again."""
    for kind in ("cell", "line"):
        shell.magics_manager.magics[kind].pop("fal", None)
