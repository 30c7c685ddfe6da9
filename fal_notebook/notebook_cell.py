"""A cell as it stands in the notebook: its names, its lines, and what tracebacks call it.

Runs in the notebook, with IPython.
"""

from __future__ import annotations

import linecache
import sys
import types
from typing import TYPE_CHECKING, Any

from fal_notebook import display
from fal_notebook.cells import CellNames, analyse

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["NotebookCell"]

_LABEL_LENGTH = 60
_TELLS_NOTHING = ("import ", "from ", "#", "@", "%")


class NotebookCell:
    """A cell as it stands in the notebook.

    Attributes:
        names: what it reads and binds.
        place: "code", "filename", "first_line", "source" and "number" of its request.
        label: its first line that says something.
    """

    def __init__(self, shell: Any, code: str) -> None:
        self.shell = shell
        self.namespace: dict[str, Any] = shell.user_ns
        source, number = _whole_text(shell, code)
        above = source[: source.rindex(code)]
        first_line = above.count("\n") + 1
        shown = _shown(shell, above, code)
        filename = _known_as(shell, source, shown, number)
        self.place: dict[str, Any] = {
            "code": code,
            "filename": filename,
            "first_line": first_line,
            "source": shown,
            "number": number,
            "parent": display.message_id(),
        }
        lines = [line.strip() for line in code.splitlines() if line.strip()]
        telling = [line for line in lines if not line.startswith(_TELLS_NOTHING)]
        code_lines = [line for line in lines if not line.startswith(("#", "%%"))]
        self.label = next(iter([*telling, *code_lines, *lines]), "")[:_LABEL_LENGTH]
        self.names = _names_in(shell, code, filename, first_line)

    def imports(self) -> set[str]:
        """Modules that it imports, or that the notebook has imported for it."""
        values = (self.namespace.get(name) for name in self.names.reads)
        return {
            *self.names.imports,
            *(value.__name__ for value in values if isinstance(value, types.ModuleType)),
        }


def _whole_text(shell: Any, code: str) -> tuple[str, int]:
    """Give the cell with its magic line, and its number."""
    inputs = getattr(shell.history_manager, "input_hist_raw", None) or [""]
    raw = inputs[-1] if inputs[-1].endswith("\n") else inputs[-1] + "\n"
    if len(inputs) > 1 and code.strip() and code in raw:
        return raw, len(inputs) - 1
    return f"%%fal\n{code}", shell.execution_count


def _shown(shell: Any, above: str, code: str) -> str:
    """Give a cell as tracebacks show it, which is Python: IPython finds the lines to show by parsing it."""
    comments = "".join(f"# {line}" for line in above.splitlines(keepends=True))
    blank = code[: len(code) - len(code.lstrip())].count("\n")  # IPython drops empty lines at the top
    try:
        return comments + "\n" * blank + str(shell.transform_cell(code))
    except SyntaxError:  # it is told where the cell is read
        return comments + code


def _known_as(shell: Any, source: str, shown: str, number: int) -> str:
    """Give the cell a file name, under which tracebacks show its lines."""
    known = shell.compile._filename_map  # noqa: SLF001 - IPython has no other way to ask
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - inspect.stack() reads every source file
    while frame is not None:
        filename = frame.f_code.co_filename
        if frame.f_code.co_name == "<module>" and known.get(filename) == number:  # the cell that runs now
            break
        frame = frame.f_back
    else:
        filename = str(shell.compile.cache(source, number, raw_code=source))
    linecache.cache[filename] = (len(shown), None, shown.splitlines(keepends=True), filename)
    return filename


def _names_in(shell: Any, code: str, filename: str, first_line: int) -> CellNames:
    """Analyse a cell, by IPython's own reading of it where ours fails."""
    try:
        return analyse(code)
    except SyntaxError:
        transformed = shell.transform_cell(code)
    try:
        return analyse(transformed)
    except SyntaxError as error:
        found = error
    try:  # IPython's words, with the lines counted as in the notebook
        shell.compile.ast_parse("\n" * (first_line - 1) + transformed, filename)
    except SyntaxError as error:
        found = error
    found.filename = filename
    raise found.with_traceback(None) from None
