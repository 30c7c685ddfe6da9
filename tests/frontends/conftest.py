"""A JupyterLab for all tests of front ends, and a page of it for each: starting it takes longer than most."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from support.jupyterlab import Lab, Labs, start_labs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="package")  # playwright keeps an event loop running in this thread
def labs(own_folders: Path) -> Iterator[Labs]:
    with start_labs(PYTHONPATH=os.pathsep.join(filter(None, sys.path))) as labs:
        yield labs


@pytest.fixture
def lab(labs: Labs) -> Iterator[Lab]:
    with labs.open() as lab:
        yield lab
