"""Cells mean the same on every host that has processes of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import ConfigurationError, FalServerlessError
from fal_notebook.handles import Handle
from fal_notebook.session import session_names
from fal_notebook.syncing import sync_dir

if TYPE_CHECKING:
    from pathlib import Path

    from support.cells import CellNotebook


def test_names_go_and_come(notebook: CellNotebook, capsys: pytest.CaptureFixture[str]) -> None:
    notebook.here["x"] = 20
    notebook.run("y = x + 1\nprint('there', y)")
    assert notebook.here["y"] == 21
    assert capsys.readouterr().out == "there 21\n"


def test_cells_find_synced_files_below_data(notebook: CellNotebook, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    sync_dir(folder, "/data/tests-cells", host=notebook.host)

    notebook.run(
        "text = open('/data/tests-cells/a.txt').read()\nlisted = !ls $FAL_PERSISTENT_DIR/tests-cells"
    )

    assert notebook.here["text"] == "a"
    assert list(notebook.here["listed"]) == ["a.txt"]


def test_a_large_value_travels_once_each_way(notebook: CellNotebook) -> None:
    notebook.here["data"] = b"a" * 5_000_000
    notebook.run("n = len(data)\nback = data + b'!'")
    assert notebook.here["n"] == 5_000_000
    assert isinstance(notebook.here["back"], Handle)
    assert notebook.here["back"].get() == b"a" * 5_000_000 + b"!"
    notebook.run("m = len(back)")
    assert notebook.here["m"] == 5_000_001


def test_an_error_comes_home_with_its_type_and_the_session_stays(notebook: CellNotebook) -> None:
    notebook.run("kept = 1")
    with pytest.raises(LookupError, match="nothing here"):
        notebook.run("found = 2\nraise LookupError('nothing here')")
    notebook.run("total = kept + found")
    assert (notebook.here["total"], notebook.here["found"]) == (3, 2)


def test_a_class_of_the_notebook_comes_home_as_itself(notebook: CellNotebook) -> None:
    notebook.shell.run_cell("class Mine:\n    def __init__(self, n): self.n = n")
    notebook.run("one = Mine(1)")
    assert type(notebook.here["one"]) is notebook.here["Mine"]


def test_a_cell_in_the_background_gives_its_names_with_its_result(notebook: CellNotebook) -> None:
    notebook.here["x"] = 1
    run = notebook.run("y = x + 1", "--background")
    assert run.result(timeout=60) == {"y": 2}
    assert notebook.here["y"] == 2


def test_a_session_that_ended_gets_again_what_the_notebook_has(notebook: CellNotebook) -> None:
    notebook.here["x"] = [1]
    notebook.run("big = bytes(2_000_000)\nx")
    for session in session_names(notebook.host):
        notebook.host.ask("stop", session=session)
    notebook.run("y = x")
    assert notebook.here["y"] == [1]
    with pytest.raises(FalServerlessError, match="run the cell that makes it again"):
        notebook.run("len(big)")


def test_a_secret_joins_the_session_as_it_is_and_what_holds_it_stays_there(
    notebook: CellNotebook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook.run("import os\nkept = 1")
    monkeypatch.setenv("FAL_TEST_SECRET", "s3cr3t-of-a-cell")

    notebook.run("kept += 1\ntoken = os.environ['FAL_TEST_SECRET']\ntoken", "--secret FAL_TEST_SECRET")
    with pytest.raises(ConfigurationError, match="FAL_TEST_NONE, which is not set"):
        notebook.run("pass", "--secret FAL_TEST_NONE")
    notebook.run("length = len(token)\nprint(os.environ['FAL_TEST_SECRET'])")  # the session remembers it
    with pytest.raises(ValueError, match=r"^bad \*\*\*$"):
        notebook.run("raise ValueError('bad ' + token)")

    assert (notebook.here["kept"], notebook.here["length"]) == (2, 16)
    handle = notebook.here["token"]
    assert isinstance(handle, Handle)
    assert "s3cr3t" not in repr(handle) + handle.preview + handle._repr_html_()
    assert handle.get() == "s3cr3t-of-a-cell"
    said = capsys.readouterr()
    assert "s3cr3t" not in said.out + said.err
    assert said.out.count("***") >= 2
