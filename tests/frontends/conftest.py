"""One JupyterLab for all tests of front ends, since it takes long to start, and a page of it for each."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from support.jupyterlab import Lab, Server, open_lab, start_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def jupyter_server(own_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = os.pathsep.join(filter(None, sys.path))
    with start_server(tmp_path_factory.mktemp("lab"), PYTHONPATH=path) as running:
        yield running


@pytest.fixture(scope="module")  # playwright keeps an event loop running in this thread
def lab(jupyter_server: Server) -> Iterator[Lab]:
    with open_lab(jupyter_server) as lab:
        yield lab
