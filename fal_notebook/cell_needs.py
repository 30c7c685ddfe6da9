"""What the line of a cell and its PEP 723 block ask for, and what line to type instead.

Runs in the notebook.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError
from fal_agent.requirements import distribution_name
from fal_notebook.advice import line_with, missing_in
from fal_notebook.environment import pep723_block, read_requirements_file
from fal_notebook.inference import infer_requirements
from fal_notebook.options import FunctionOptions, make_options
from fal_notebook.rebuild import add_note

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from fal_notebook.notebook_cell import NotebookCell

__all__ = ["AUTO", "advise", "asked_requirements", "checked_options", "merged_lines", "pasted_line"]

AUTO = "auto"
_REQUIRE_AUTO = re.compile(r"(?:-r|--require)[ =]?auto(?=\s|$)")


def asked_requirements(options: argparse.Namespace, cell: NotebookCell) -> list[str]:
    """Give the requirement lines that a cell asks for, in its line and in a PEP 723 block."""
    lines = [line for line in options.require if line != AUTO]
    if AUTO in options.require:
        lines = merged_lines(infer_requirements(sorted(cell.imports())), lines)
    if options.requirements_file is not None:
        lines += read_requirements_file(options.requirements_file)
    block = pep723_block(cell.place["code"])
    return lines if block is None else [*lines, *block.dependencies]


def pasted_line(line: str, requirements: Iterable[str]) -> str:
    """Give a magic's line with these requirements instead of `-r auto`."""
    words = [word for word in re.split(r"\s+", _REQUIRE_AUTO.sub("", line)) if word]
    pasted = " ".join(words) or "%%fal"
    for requirement in requirements:
        pasted = line_with(pasted, requirement)
    return pasted


def advise(error: BaseException, cell: NotebookCell) -> None:
    """Add the line to run to an error that tells of something missing on the host."""
    requirement = missing_in(error)
    if requirement is not None and cell.line.startswith("%%"):
        add_note(error, f"run the cell with: {line_with(cell.line, requirement)}")


def merged_lines(lines: Iterable[str], others: Iterable[str]) -> list[str]:
    """Put requirement lines together; of two for one distribution, the later counts."""
    by_name = {distribution_name(line) or line: line for line in lines}
    for line in others:
        if line not in by_name.values():
            by_name[distribution_name(line) or line] = line
    return list(by_name.values())


def checked_options(**config_: Any) -> FunctionOptions:
    """Check what a magic's line says; a mistake is said in a line, as of any magic."""
    try:
        return make_options(**config_)
    except FalServerlessError:
        raise
    except ValueError as error:
        from IPython.core.error import UsageError

        raise UsageError(str(error)) from None
