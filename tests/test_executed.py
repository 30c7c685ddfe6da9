"""Notebooks that nobody looks at while they run: `jupyter nbconvert --execute` and papermill."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import nbformat
import pytest

if TYPE_CHECKING:
    from pathlib import Path

SHOW = """%%fal
from IPython.display import HTML, display
print('there', count)
display(HTML('<b>x</b>'))
count * 21"""
CELLS = [
    "count = 2",
    "%load_ext fal_notebook",
    SHOW,
    "%%fal -o run --background\nlate = count + 1",
    "run.result()['late']",
    "%fal stop",
]


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A notebook file; papermill puts its parameters below the first cell."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    cells[0].metadata.tags = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "in.ipynb")
    return tmp_path / "in.ipynb"


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def outputs_of(path: Path) -> dict[str, str]:
    """Code of a cell -> the texts that stand below it, but for the line about phases that were slow."""
    shown = {}
    for cell in nbformat.read(path, as_version=4).cells:
        texts = [output.get("text") or output.data["text/plain"] for output in cell.outputs]
        shown[cell.source.splitlines()[0]] = " | ".join(
            text.strip() for text in texts if "start " not in text
        )
    return shown


def test_nbconvert_runs_cells_on_a_host(notebook: Path) -> None:
    run("nbconvert", "--to", "notebook", "--execute", notebook, "--output", "out.ipynb")
    shown = outputs_of(notebook.with_name("out.ipynb"))
    assert shown["%%fal"] == "there 2 | <IPython.core.display.HTML object> | 42"
    assert shown["run.result()['late']"] == "3"


def test_papermills_parameters_reach_the_host(notebook: Path) -> None:
    pytest.importorskip("papermill")
    run("papermill", notebook, notebook.with_name("out.ipynb"), "-p", "count", "5", "--no-progress-bar")
    shown = outputs_of(notebook.with_name("out.ipynb"))
    assert shown["%%fal"] == "there 5 | <IPython.core.display.HTML object> | 105"
    assert shown["run.result()['late']"] == "6"
