"""A cell is run again after its kernel was killed: its run is shown, unless that could surprise."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support.kernel import PATH, Kernel, start_kernel
from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ipykernel")


@contextmanager
def kernel(folder: Path, notebook: str = "analysis.ipynb") -> Iterator[Kernel]:
    """Start a kernel of a notebook; it is killed at the end."""
    path = str(folder / notebook)
    with start_kernel(PYTHONPATH=PATH, working_folder=folder, JPY_SESSION_NAME=path) as started:
        yield started
        started.kill()


def waiting_cell(folder: Path) -> str:
    """A cell that says what it reads, counts how often it runs, and ends when a file is there."""
    return (
        "%%fal\nimport time, pathlib\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "with (folder / 'runs').open('a') as file: _ = file.write('x')\n"
        "print('begun with', n, flush=True)\n"
        "while not (folder / 'go').exists(): time.sleep(0.01)\n"
        "print('ended')\n"
        "answer, unpicklable = n + 1, (i for i in range(3))\n"
    )


def begin_and_vanish(folder: Path) -> None:
    with kernel(folder) as first:
        first.run("n = 41")
        first.wait_for(first.start(waiting_cell(folder)), "begun")


def test_a_cell_that_goes_on_is_shown_by_the_next_kernel(tmp_path: Path) -> None:
    begin_and_vanish(tmp_path)

    with kernel(tmp_path) as second:
        second.run("n = 41")
        cell = second.start(waiting_cell(tmp_path))
        second.wait_for(cell, "begun")
        (tmp_path / "go").touch()
        second.wait(cell)

        assert cell.text == "begun with 41\nended\n"
        assert "has been running on local since" in cell.errors
        assert "%%fal --again" in cell.errors
        assert second.run("answer").result == "42"
        used = second.run("%%fal\nprint(answer, next(unpicklable))")  # in the session of then
        assert used.text == "42 0\n", str(used.outputs)[:4000]
        assert (tmp_path / "runs").read_text() == "x"

        assert "again" not in second.run(waiting_cell(tmp_path)).errors  # its end was seen: it runs
        assert (tmp_path / "runs").read_text() == "xx"


def test_a_cell_that_ended_unseen_is_shown_but_not_with_again(tmp_path: Path) -> None:
    begin_and_vanish(tmp_path)
    (tmp_path / "go").touch()
    until(lambda: fal.local.ask("runs")[0]["state"] == "done")

    with kernel(tmp_path) as second:
        second.run("n = 41")
        again = second.run(waiting_cell(tmp_path).replace("%%fal", "%%fal --again"))
        assert again.text == "begun with 41\nended\n"
        assert "attach" not in again.errors
        assert (tmp_path / "runs").read_text() == "xx"


def test_what_could_surprise_runs_anew_and_says_so(tmp_path: Path) -> None:
    begin_and_vanish(tmp_path)
    (tmp_path / "go").touch()

    with kernel(tmp_path) as other_value:
        other_value.run("n = 1")
        cell = other_value.run(waiting_cell(tmp_path))
        assert "had another value of 'n'" in cell.errors
        assert "%fal attach" in cell.errors
        assert cell.text == "begun with 1\nended\n"
    with kernel(tmp_path, "other.ipynb") as other_notebook:
        other_notebook.run("n = 41")
        assert "attach" not in other_notebook.run(waiting_cell(tmp_path)).errors
    assert (tmp_path / "runs").read_text() == "xxx"
