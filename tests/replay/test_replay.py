"""Notebooks show the same with `%%fal` on top of every cell as in a plain kernel."""

from __future__ import annotations

import functools
import importlib.metadata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.replay import compare, read_notebook, replay_on, replay_plain

if TYPE_CHECKING:
    from support.replay import Replay

NOTEBOOKS = sorted(Path(__file__).with_name("notebooks").iterdir())
PACKAGES = ("numpy", "pandas", "matplotlib", "scikit-learn", "jinja2", "tqdm")


@functools.cache
def plain(path: Path) -> Replay:
    return replay_plain(read_notebook(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_a_plain_kernel(path: Path) -> None:
    requirements = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    with ThreadPoolExecutor() as pool:  # both kernels at once
        expected = pool.submit(plain, path)
        got = pool.submit(replay_on, "local", read_notebook(path), requirements)
    found = compare(path, expected.result(), got.result())
    if found:
        pytest.fail(f"{len(found)} cells differ\n\n" + "\n\n".join(map(str, found)), pytrace=False)
