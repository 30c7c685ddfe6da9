"""The magics: `%%fal` for cells, `%fal` for hosts and what is on them.

Runs in the notebook. Magics parse their line and hand over; loading them contacts no machine.
"""

from __future__ import annotations

import contextlib
from typing import Any

__all__ = ["give_a_body", "load", "unload"]

_undo: dict[Any, contextlib.ExitStack] = {}  # shell -> what takes our changes to it away again


def give_a_body(lines: list[str]) -> list[str]:
    """Let a `%%fal` line stand alone, on an empty cell: IPython wants something below a cell magic."""
    is_alone = lines[:1] and lines[0].split()[:1] == ["%%fal"] and not "".join(lines[1:]).strip()
    return [lines[0].rstrip("\n") + "\n", "\n"] if is_alone and not lines[0].rstrip().endswith("?") else lines


# IPython is not to call it to see whether a cell is complete: in a terminal the body comes in the next line.
setattr(give_a_body, "has_side_effects", True)  # noqa: B010 - a function has no such attribute for mypy


def load(shell: Any) -> None:
    """Add the magics and their completions to an IPython shell."""
    from fal_notebook.display.errors import show_errors_of
    from fal_notebook.magics.cell import CellMagics
    from fal_notebook.magics.completion import add_completions
    from fal_notebook.magics.line import LineMagics
    from fal_notebook.magics.writing import ask_sessions_of

    shell.register_magics(CellMagics)
    shell.register_magics(LineMagics)
    add_completions(shell)
    if give_a_body not in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.append(give_a_body)
    if shell not in _undo:
        _undo[shell] = contextlib.ExitStack()
        for undo in (show_errors_of(shell), ask_sessions_of(shell)):
            _undo[shell].callback(undo)


def unload(shell: Any) -> None:
    """Take them away again."""
    for kind in ("cell", "line"):
        shell.magics_manager.magics[kind].pop("fal", None)
    if give_a_body in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.remove(give_a_body)
    if shell in _undo:
        _undo.pop(shell).close()
