"""Notebooks show the same with `%%fal` on top of every cell as in a plain kernel.

`FAL_REPLAY_ALL=1` replays every notebook on both hosts; otherwise one is left out, and few go over SSH.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
from support.replay import compare, differences, read_notebook, replay_on, replay_plain

if TYPE_CHECKING:
    from support.replay import Replay

NOTEBOOKS = sorted(Path(__file__).with_name("notebooks").iterdir())
PACKAGES = ("numpy", "pandas", "matplotlib", "scikit-learn", "jinja2", "tqdm")
WITHOUT_PACKAGES = ("basics", "displays", "objects", "text")
ALL = bool(os.environ.get("FAL_REPLAY_ALL"))
ON_THIS_MACHINE = [
    path for path in NOTEBOOKS if ALL or path.stem != "analysis"
]  # what it uses, others use too
ON_SSH = [path for path in NOTEBOOKS if ALL or path.stem in ("basics", "text")]

pytestmark = pytest.mark.timeout(600)


@functools.cache
def plain(path: Path) -> Replay:
    return replay_plain(read_notebook(path))


def check(path: Path, host: str) -> None:
    """Replay a notebook and fail with every difference."""
    packages = () if path.stem in WITHOUT_PACKAGES else PACKAGES
    requirements = [f"{name}=={importlib.metadata.version(name)}" for name in packages]
    with ThreadPoolExecutor() as pool:  # both kernels at once
        expected = pool.submit(plain, path)
        got = pool.submit(replay_on, host, read_notebook(path), requirements)
    found = compare(path, expected.result(), got.result())
    if found:
        pytest.fail(f"{len(found)} cells differ\n\n" + "\n\n".join(map(str, found)), pytrace=False)


@pytest.mark.parametrize("path", ON_THIS_MACHINE, ids=lambda path: path.stem)
def test_outputs_are_those_of_a_plain_kernel(path: Path) -> None:
    check(path, "local")


@pytest.mark.parametrize("path", ON_SSH, ids=lambda path: path.stem)
def test_so_they_are_over_ssh(path: Path, gpu_box: str) -> None:
    check(path, gpu_box)


# ---------------------------------------------------------------- the harness itself


def test_a_notebook_file_gives_its_code_cells(tmp_path: Path) -> None:
    new = nbformat.v4
    cells = [new.new_markdown_cell("# Title"), new.new_code_cell("%%time\nx = 1"), new.new_code_cell("x\n")]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "a.ipynb")
    (tmp_path / "a.py").write_text("# %%\n%%time\nx = 1\n\n# %% a title\nx\n")

    assert read_notebook(tmp_path / "a.ipynb") == ["%%time\nx = 1", "x"]
    assert read_notebook(tmp_path / "a.py") == ["%%time\nx = 1", "x"]


def test_a_difference_is_found_and_can_be_read() -> None:
    """A harness that finds nothing would pass every notebook."""
    one = replay_plain(
        ["print('same', object())", "1 + 1", "raise ValueError('a')", "print('x'); display(1)"]
    )
    two = replay_plain(
        ["print('same', object())", "1 + 2", "raise ValueError('b')", "display(1); print('x')"]
    )

    found = differences("a", ["", "1 + 1", "", ""], one, two)
    assert [difference.number for difference in found] == [2, 3, 4]
    assert "a, cell 2\n1 + 1\n" in str(found[0])
    assert "\n-2\n+3\n" in str(found[0])
