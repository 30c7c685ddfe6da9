"""Files that travel with a call: app files, and local modules."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_notebook.app_files import travelling_files
from fal_notebook.options import make_options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fal_notebook.hosts.base import Host


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with data, a module and things to leave behind."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "words.txt").write_text("hello\n")
    (tmp_path / "data" / "deep" / "more.bin").write_bytes(b"\x00\xff")
    (tmp_path / "data" / "skipped.pyc").write_text("")
    (tmp_path / "shipped_tools.py").write_text("def shout(text):\n    return text.upper()\n")
    return tmp_path


def test_app_files_are_found_by_relative_path_and_can_be_imported(host: Host, project: Path) -> None:
    @fal.function(host=host, app_files=["data", "shipped_tools.py"], app_files_context_dir=str(project))
    def read() -> Any:
        import pathlib

        sys.modules.pop("shipped_tools", None)
        import shipped_tools  # type: ignore[import-not-found]

        text = pathlib.Path("data/words.txt").read_text()
        return shipped_tools.shout(text), pathlib.Path("data/deep/more.bin").read_bytes()

    assert read() == ("HELLO\n", b"\x00\xff")


def test_ignored_files_stay_here(host: Host, project: Path) -> None:
    @fal.function(
        host=host,
        app_files=["data"],
        app_files_context_dir=str(project),
        app_files_ignore=[r"\.pyc$", "deep/"],
    )
    def names() -> list[str]:
        import pathlib

        return sorted(str(path) for path in pathlib.Path("data").rglob("*"))

    assert names() == ["data/words.txt"]


def test_an_edited_app_file_arrives_as_edited(host: Host, project: Path) -> None:
    @fal.function(host=host, app_files=["data"], app_files_context_dir=str(project))
    def read() -> str:
        import pathlib

        return pathlib.Path("data/words.txt").read_text()

    first = read()
    (project / "data" / "words.txt").write_text("edited, and longer\n")

    assert (first, read()) == ("hello\n", "edited, and longer\n")


def test_executable_files_stay_executable(host: Host, project: Path) -> None:
    tool = project / "tool.sh"
    tool.write_text("#!/bin/sh\necho ran\n")
    tool.chmod(0o755)

    @fal.function(host=host, app_files=["tool.sh"], app_files_context_dir=str(project))
    def run() -> str:
        import subprocess

        return subprocess.check_output(["./tool.sh"], text=True)

    assert run() == "ran\n"


def test_a_path_that_leaves_the_context_is_refused(host: Host, project: Path) -> None:
    @fal.function(host=host, app_files=["../outside"], app_files_context_dir=str(project / "data"))
    def read() -> None:
        return None

    with pytest.raises(fal.exceptions.AppFileUploadException, match="outside"):
        read()


def test_local_modules_travel_and_follow_edits(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fal_tests_local"
    package.mkdir()
    (package / "__init__.py").write_text("from fal_tests_local.inner import FACTOR, scale\n")
    (package / "inner.py").write_text("FACTOR = 2\ndef scale(x):\n    return x * FACTOR\n")
    for name in ("fal_tests_local", "fal_tests_local.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    local: Any = importlib.import_module("fal_tests_local")

    @fal.function(host=host, local_python_modules=["fal_tests_local"])
    def scaled(value: int) -> Any:
        return local.scale(value)

    first = scaled(10)
    (package / "inner.py").write_text("FACTOR = 30\ndef scale(x):\n    return x * FACTOR\n")

    assert (first, scaled(10)) == (20, 300)


def test_a_module_that_does_not_exist_is_refused(host: Host) -> None:
    @fal.function(host=host, local_python_modules=["fal_tests_absent"])
    def one() -> int:
        return 1

    with pytest.raises(ValueError, match="fal_tests_absent"):
        one()


DEFINING = """
import fal_notebook as fal

def look():
    import os
    import neighbour
    return neighbour.NAME, sorted(os.listdir()), sorted(os.listdir("nested"))

class Service(fal.App):
    app_files = ["."]

    @fal.endpoint("/")
    def look(self) -> None: ...
"""


@pytest.fixture
def nested(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module in a folder of the project, with another module beside it."""
    folder = project / "nested"
    folder.mkdir()
    (folder / "neighbour.py").write_text("NAME = 'beside'\n")
    (folder / "defining_file.py").write_text(DEFINING)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("defining_file")
    for name in ("defining_file", "neighbour"):
        sys.modules.pop(name, None)


def test_files_are_those_beside_the_defining_file_which_is_left_out(nested: Any, project: Path) -> None:
    for defined in (nested.look, nested.Service):
        found = travelling_files(defined, make_options(app_files=["."]))
        assert [name for name, _, _ in found.files] == ["neighbour.py"]
        assert found.import_path == ""

    found = travelling_files(nested.look, make_options(app_files=["."], app_files_context_dir=str(project)))
    assert "nested/neighbour.py" in {name for name, _, _ in found.files}
    assert "nested/defining_file.py" not in {name for name, _, _ in found.files}
    assert found.import_path == "nested"


def test_what_lies_beside_the_defining_file_can_be_imported_there(
    host: Host, nested: Any, project: Path
) -> None:
    """Though the working folder is the context, which is above it."""
    decorate = fal.function(host=host, app_files=["nested"], app_files_context_dir=str(project))

    name, top, below = decorate(nested.look)()

    assert (name, top) == ("beside", ["nested"])
    assert [file for file in below if not file.startswith("__")] == ["neighbour.py"]


def test_what_is_defined_in_a_notebook_takes_files_from_the_working_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    cell: dict[str, Any] = {"__name__": "__main__"}
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    exec("def look(): ...", cell)

    found = travelling_files(cell["look"], make_options(app_files=["data/words.txt"]))

    assert [name for name, _, _ in found.files] == ["data/words.txt"]
