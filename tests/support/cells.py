"""An IPython shell whose cells run on a host, without a kernel around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_notebook.magics.options import parse_cell_line
from fal_notebook.session import run_cell

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host

__all__ = ["CellNotebook"]


class CellNotebook:
    """An IPython shell, and a host that its cells run on.

    Attributes:
        here: the notebook's names.
    """

    def __init__(self, shell: Any, host: Host) -> None:
        self.shell, self.host = shell, host
        self.here: dict[str, Any] = shell.user_ns

    def run(self, code: str, line: str = "") -> Any:
        """Run a `%%fal` cell."""
        return run_cell(self.shell, code, parse_cell_line(f"--host {self.host.name} {line}"))

    def run_here(self, code: str) -> None:
        """Run a plain cell."""
        self.shell.run_cell(code).raise_error()
