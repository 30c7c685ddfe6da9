"""Run a notebook from top to bottom in a kernel of its own, keep it with its outputs, and say what happened.

Used by `make demo` and by the tests of the notebooks. The kernel is one of the Python that runs
this. A cell tagged `raises-exception` is meant to fail; any other failure ends the run with status 1.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Section", "execute", "sections"]

CELL_SECONDS = 600  # the first cell may have to build an environment on a slow network
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass
class Section:
    """What the cells below one heading gave."""

    title: str
    seconds: float = 0.0
    printed: list[str] = field(default_factory=list)
    figures: int = 0
    tables: int = 0
    errors: list[str] = field(default_factory=list)


def execute(source: Path, output: Path, *, replace: dict[str, str] | None = None) -> Any:
    """Run the notebook `source` and write it with its outputs to `output`, also when a cell fails.

    Args:
        source: the notebook; it is left as it is. Cells run in its folder.
        output: where the executed notebook goes; parent folders are made.
        replace: new values for names that a cell sets on a line of its own (`NAME = "value"`).

    Raises:
        KeyError: no cell sets a name of `replace`.
        nbclient.exceptions.CellExecutionError: a cell failed that was not meant to.
        nbclient.exceptions.CellTimeoutError: a cell took longer than 600 seconds.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    for name, value in (replace or {}).items():
        _replace(notebook, name, value)
    folder = {"metadata": {"path": str(source.parent)}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources=folder)
    try:
        with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
            manager = client.create_kernel_manager()
            manager.transport, manager.ip = "ipc", f"{sockets}/k"  # no TCP port, even for a moment
            client.execute()
    finally:
        output.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, output)
    return notebook


def sections(notebook: Any) -> Iterator[Section]:
    """What an executed notebook did, heading by heading; sections without output are left out."""
    section = Section("")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.match(r"##? (.+)", cell.source)
            if heading:
                if section.seconds:
                    yield section
                section = Section(heading[1])
        elif cell.cell_type == "code":
            section.seconds += _seconds(cell)
            for output in cell.outputs:
                _add(section, output)
    if section.seconds:
        yield section


def _replace(notebook: Any, name: str, value: str) -> None:
    line = re.compile(rf"^{re.escape(name)} = [^#\n]*", re.MULTILINE)
    for cell in notebook.cells:
        if cell.cell_type == "code" and line.search(cell.source):
            cell.source = line.sub(lambda _: f"{name} = {value!r}  ", cell.source, count=1)
            return
    raise KeyError(f"no cell sets {name} on a line of its own")


def _seconds(cell: Any) -> float:
    times = cell.metadata.get("execution", {})
    if not {"iopub.execute_input", "shell.execute_reply"} <= set(times):
        return 0.0
    begin, end = (datetime.fromisoformat(times[key].replace("Z", "+00:00")) for key in (
        "iopub.execute_input", "shell.execute_reply"))  # fmt: skip
    return (end - begin).total_seconds()


def _add(section: Section, output: Any) -> None:
    if output.output_type == "stream":
        section.printed += [line for line in output.text.splitlines() if line.strip()]
    elif output.output_type == "error":
        section.errors.append(f"{output.ename}: {output.evalue}".splitlines()[0])
    else:
        data = output.data
        section.figures += "image/png" in data
        section.tables += "<table" in data.get("text/html", "")
        if "image/png" not in data and "text/html" not in data:
            section.printed += [line for line in data.get("text/plain", "").splitlines() if line.strip()]


def describe(section: Section) -> str:
    """A few lines for a person: how long, what was shown, the last thing that was printed."""
    shown = [
        f"{count} {noun}{'s' if count > 1 else ''}"
        for count, noun in ((section.figures, "figure"), (section.tables, "table"))
        if count
    ]
    lines = [f"  {section.title:<58} {section.seconds:6.1f} s   {', '.join(shown)}".rstrip()]
    lines += [f"      {ANSI.sub('', line)[:100]}" for line in section.printed[-2:]]
    lines += [f"      raised {ANSI.sub('', error)[:90]} (on purpose)" for error in section.errors]
    return "\n".join(lines)


def main() -> int:
    """Run the notebook that the command line names."""
    parser = argparse.ArgumentParser(description="Run a notebook and say what it did.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="where the executed notebook goes")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as HOST=gpu-box")
    arguments = parser.parse_args()
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    started = time.monotonic()
    print(f"Running {arguments.notebook} ...", flush=True)
    try:
        notebook = execute(
            arguments.notebook, arguments.output, replace=dict(item.split("=", 1) for item in arguments.set)
        )
    except (CellExecutionError, CellTimeoutError) as error:
        print(
            f"{error}\nA cell failed; the notebook as far as it came: {arguments.output.resolve()}",
            file=sys.stderr,
        )
        return 1
    print("\n".join(map(describe, sections(notebook))))
    print(f"\nAll cells ran in {time.monotonic() - started:.0f} s. The executed notebook, with its outputs:")
    print(f"  {arguments.output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
