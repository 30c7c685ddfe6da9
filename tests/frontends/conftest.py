"""A JupyterLab for the tests of a file: starting it takes longer than most of them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from support.jupyterlab import Lab, start_lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")  # playwright keeps an event loop running in this thread
def lab(own_folders: Path) -> Iterator[Lab]:
    with start_lab(PYTHONPATH=os.pathsep.join(filter(None, sys.path))) as lab:
        yield lab
