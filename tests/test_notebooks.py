"""Every notebook of the repository runs from top to bottom, in a real kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from support.sshd import start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

sys.path.append(str(ROOT / "tools"))
from run_notebook import ANSI, execute, sections  # noqa: E402 - a script, not a package

pytestmark = pytest.mark.timeout(600)


def text_of(notebook: Any) -> str:
    """Everything that an executed notebook printed or showed as text."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
            texts += output.get("traceback", [])
    return ANSI.sub("", "\n".join(texts))


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


@pytest.fixture(scope="module")
def gpu_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real OpenSSH server with an unprivileged user behind it, known to kernels as `gpu-box`."""
    server = start_sshd(tmp_path_factory.mktemp("sshd"), name="gpu-box")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_SSH_CONFIG", str(server.config_path))
        yield
    server.stop()


def test_the_quickstart_runs_on_this_machine(tmp_path: Path) -> None:
    notebook = execute(ROOT / "notebooks" / "quickstart.ipynb", tmp_path / "quickstart.ipynb")

    check_quickstart(notebook, tmp_path / "quickstart.ipynb")


def test_the_quickstart_runs_on_an_ssh_host_by_changing_one_name(tmp_path: Path, gpu_box: None) -> None:
    notebook = execute(
        ROOT / "notebooks" / "quickstart.ipynb", tmp_path / "quickstart.ipynb", replace={"HOST": "gpu-box"}
    )

    check_quickstart(notebook, tmp_path / "quickstart.ipynb")


def test_the_notebook_about_ssh_runs_on_an_ssh_host(tmp_path: Path, gpu_box: None) -> None:
    notebook = execute(ROOT / "notebooks" / "ssh_host.ipynb", tmp_path / "ssh_host.ipynb")

    text = text_of(notebook)
    done = {section.title: section for section in sections(notebook)}
    assert "falremote on" in text
    assert done["Data goes along"].figures == 1
    assert "[1.0, 1.0]" in text
    assert "('de', 0." in text


@pytest.mark.parametrize(
    ("name", "host", "shown"),
    [
        ("app_image", "gpu-box", ["422 Input should be a valid integer", "digits ready", "'stopped'"]),
        ("app_realtime", "gpu-box", ["fr Tous les", "fewer batches than texts: True", "'stopped'"]),
        ("app_ocr", "local", ["read letter by letter: True", "'stopped'"]),
    ],
)
def test_the_notebooks_of_apps_run(
    name: str, host: str, shown: list[str], tmp_path: Path, gpu_box: None
) -> None:
    path = ROOT / "notebooks" / f"{name}.ipynb"

    text = text_of(execute(path, tmp_path / path.name, replace={"HOST": host}))

    assert [words for words in shown if words not in text] == []


def check_quickstart(notebook: Any, written: Path) -> None:
    """What the quickstart must have shown, wherever it ran."""
    text = text_of(notebook)
    done = {section.title: section for section in sections(notebook)}
    assert text.count("(loading the model)") <= 1  # not at all where another notebook has loaded it
    assert "Finnish  is fi" in text
    assert "unseen digits are read correctly" in text
    assert done["A figure drawn on the host"].figures == 1
    assert done["A classifier trained from a DataFrame that is here"].tables == 1
    assert done["An error, where it happened"].errors == ["ZeroDivisionError: division by zero"]
    assert "found.count(code) / len(found)" in text
    assert nbformat.read(written, as_version=4) == notebook


# ---------------------------------------------------------------- the program that runs them


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook whose cells are code, but for those that begin with a heading."""
    book = nbformat.v4.new_notebook()
    for source in cells:
        make = nbformat.v4.new_markdown_cell if source.startswith("#") else nbformat.v4.new_code_cell
        book.cells.append(make(source))
    nbformat.write(book, path)
    return path


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`tools/run_notebook.py` as make calls it."""
    command = [sys.executable, str(ROOT / "tools" / "run_notebook.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_summary_names_each_section_and_where_the_notebook_lies(tmp_path: Path) -> None:
    source = write_notebook(
        tmp_path / "a.ipynb", "# Sums", "NUMBER = 1  # here", "print('twice is', 2 * NUMBER)"
    )

    done = run_tool(source, "--output", tmp_path / "out" / "a.ipynb", "--set", "NUMBER=ab")

    assert done.returncode == 0, done.stderr
    assert "Sums" in done.stdout
    assert "twice is abab" in done.stdout
    assert str(tmp_path / "out" / "a.ipynb") in done.stdout
    assert nbformat.read(source, as_version=4).cells[2].outputs == []


def test_a_cell_that_fails_unasked_ends_the_run_and_is_kept(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "a.ipynb", "1 / 0", "print('never')")

    done = run_tool(source, "--output", tmp_path / "out.ipynb")

    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert str(tmp_path / "out.ipynb") in done.stderr
    assert (
        nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs[0].ename == "ZeroDivisionError"
    )


def test_a_name_that_no_cell_sets_cannot_be_replaced(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "a.ipynb", "HOST = 'local'")

    with pytest.raises(KeyError, match="HOSTS"):
        execute(source, tmp_path / "out.ipynb", replace={"HOSTS": "gpu-box"})
