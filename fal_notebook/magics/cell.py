"""`%%fal`: parse the line, hand over. No logic lives here.

Runs in the notebook.
"""

from __future__ import annotations

from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class, no_var_expand

from fal_notebook.display.errors import show_page
from fal_notebook.magics.options import CELL_HELP, CellOptionsError, cell_parser, parse_cell_line
from fal_notebook.session import run_cell

__all__ = ["CellMagics"]


@magics_class
class CellMagics(Magics):  # type: ignore[misc] # IPython has no types
    """Holds `%%fal`."""

    @no_var_expand  # type: ignore[untyped-decorator]
    @cell_magic  # type: ignore[untyped-decorator]
    def fal(self, line: str, cell: str) -> Any:
        """Replaced below by the parser's help."""
        __tracebackhide__ = True
        try:
            options = parse_cell_line(line)
            if options.help:
                show_page({"text/plain": self.fal.__doc__}, 0)
                return None
        except CellOptionsError as error:
            raise UsageError(str(error)) from None
        return run_cell(self.shell, cell, options)


CellMagics.fal.__doc__ = f"{CELL_HELP}\n\n{cell_parser().format_help()}"
