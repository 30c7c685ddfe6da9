"""Every notebook of the repository runs from top to bottom, in a real kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

sys.path.append(str(ROOT / "tools"))
from run_notebook import execute, sections  # noqa: E402 - a script, not a package

pytestmark = pytest.mark.timeout(600)


def text_of(notebook: Any) -> str:
    """Everything that an executed notebook printed or showed as text."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
            texts += output.get("traceback", [])
    return "\n".join(texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    """So that a change to one is readable."""
    notebook = nbformat.read(path, as_version=4)

    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_one_name_decides_where_a_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")

    assert code.count("HOST = ") == 1
    assert "fal.connect(HOST)" in code


def test_the_quickstart_runs_on_this_machine(tmp_path: Path) -> None:
    notebook = execute(ROOT / "notebooks" / "quickstart.ipynb", tmp_path / "quickstart.ipynb")

    check_quickstart(notebook, tmp_path / "quickstart.ipynb")


def check_quickstart(notebook: Any, written: Path) -> None:
    """What the quickstart must have shown, wherever it ran."""
    text = text_of(notebook)
    done = {section.title: section for section in sections(notebook)}
    assert text.count("(loading the model)") == 1
    assert "Finnish  is fi" in text
    assert "unseen digits are read correctly" in text
    assert done["A figure drawn on the host"].figures == 1
    assert done["A classifier trained from a DataFrame that is here"].tables == 1
    assert done["An error, where it happened"].errors == ["ZeroDivisionError: division by zero"]
    assert "found.count(code) / len(found)" in text
    assert nbformat.read(written, as_version=4) == notebook
