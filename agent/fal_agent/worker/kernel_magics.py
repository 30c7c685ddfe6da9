"""The magics that a kernel has besides IPython's own: `%less`, `%more`, `%man`, `%clear`, `%edit`.

Runs in a worker. Those that are about a kernel's connection (`%connect_info`, `%qtconsole`) are not
there: a session has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from IPython.core import page
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class
from IPython.utils import openpy

__all__ = ["KernelMagics"]


@magics_class
class KernelMagics(Magics):  # type: ignore[misc] # IPython has no types
    """Magics of a session's shell."""

    @line_magic  # type: ignore[untyped-decorator]
    def less(self, line: str) -> None:
        """Show a file in the notebook's pager; Python is highlighted."""
        if not line:
            raise UsageError("Missing filename.")
        if line.endswith(".py"):
            page.page(self.shell.pycolorize(openpy.read_py_file(line, skip_encoding_cookie=False)))
        else:
            page.page(Path(line).read_text())

    more = line_magic("more")(less)

    @line_magic  # type: ignore[untyped-decorator]
    def man(self, line: str) -> None:
        """Show a manual page of the host in the notebook's pager."""
        page.page(self.shell.getoutput(f"man {line} | col -b", split=False))

    @line_magic  # type: ignore[untyped-decorator]
    def clear(self, line: str) -> None:  # noqa: ARG002 - a magic's signature
        """Clear the terminal, as a kernel does."""
        self.shell.system("clear")

    @line_magic  # type: ignore[untyped-decorator]
    def edit(self, line: str) -> Any:  # noqa: ARG002 - a magic's signature
        """Say that a host has no editor to open."""
        raise UsageError("a session on a host opens no editor; `%load FILE` puts a file's text into the cell")

    ed = line_magic("ed")(edit)

    @line_cell_magic  # type: ignore[untyped-decorator]
    def fal(self, line: str, cell: Optional[str] = None) -> Any:  # noqa: ARG002 - a magic's signature
        """Say that hosts are chosen from the notebook."""
        raise UsageError(
            "this cell runs on a host already, and %fal is the notebook's: put %%fal only on the first line "
            "of a cell, and %fal into a cell of its own, without %%fal"
        )
