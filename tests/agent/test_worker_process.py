"""What a worker's process is given by the agent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fal_agent.server.process import worker_variables

if TYPE_CHECKING:
    import pytest


def variables_under(monkeypatch: pytest.MonkeyPatch, folder: Path, **outside: str) -> dict[str, str]:
    """The variables of a worker whose agent has these of its own."""
    for name, value in outside.items():
        monkeypatch.setenv(name, value)
    return worker_variables("w1", code=folder, root=folder, python=Path(sys.executable), devices=None)


def test_a_worker_keeps_what_it_compiles_though_its_agent_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers often forbid it, and then every worker would compile all that it imports."""
    (tmp_path / "imported.py").write_text("VALUE = 1\n")

    variables = variables_under(monkeypatch, tmp_path, PYTHONDONTWRITEBYTECODE="1")
    subprocess.run([sys.executable, "-c", "import imported"], env=variables, check=True)

    assert list((tmp_path / "__pycache__").glob("imported.*.pyc"))


def test_a_worker_is_not_told_of_the_environment_that_its_agent_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = variables_under(
        monkeypatch, tmp_path, CONDA_PREFIX="/opt/conda", PYTHONSTARTUP="x.py", MINE="kept"
    )

    assert variables["VIRTUAL_ENV"] == str(Path(sys.executable).parent.parent)
    assert not {"CONDA_PREFIX", "PYTHONSTARTUP"} & set(variables)
    assert variables["MINE"] == "kept"
    assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
