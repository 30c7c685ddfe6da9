"""What all tests share: folders of their own for hosts and settings, and agents that end with the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parent))  # for `support`

pytest_plugins = ["support.hosts"]

hypothesis.settings.register_profile("untimed", deadline=None)  # how fast a machine is, is no matter of tests
hypothesis.settings.load_profile("untimed")

TOGETHER = ("tests/frontends/",)  # one JupyterLab
# Those that compute beside those that wait; what is left at the end is short.
FIRST = ("tests/test_notebooks.py", "tests/frontends/", "tests/faults/", "tests/replay/", "tests/load/")


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the tests away from the user's settings and from the user's agent."""
    folder = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("FAL_NOTEBOOK_HOME", str(folder / "root"))
    patch.setenv("FAL_NOTEBOOK_CONFIG", str(folder / "config"))
    patch.setenv("FAL_NOTEBOOK_CACHE", str(folder / "cache"))
    patch.setenv("FAL_NOTEBOOK_IDLE", "20")
    patch.delenv("FAL_HOST", raising=False)
    yield folder
    _end_agent()
    patch.undo()


def _end_agent() -> None:
    """Tell the local agent of these tests to end, if one was started."""
    if "fal_notebook.hosts.registry" not in sys.modules:
        return
    from fal_notebook.hosts import registry

    for host in list(registry._known.values()):
        if getattr(host, "is_connected", False):
            host.ask("shutdown")
        host.close()


class Scheduling(LoadFileScheduling):
    """Each file goes to one process; a folder that shares what is slow to start goes as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return next((folder for folder in TOGETHER if folder in file), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    """Share files between processes in this project's way."""
    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first: no process should be left alone with one of them at the end."""
    ranks = list(enumerate(FIRST))
    items.sort(key=lambda item: next((rank for rank, part in ranks if part in item.nodeid), len(ranks)))


def pytest_report_header() -> str:
    """Say which library is tested: the installed wheel, or the checkout."""
    import fal_notebook

    return f"fal_notebook from {Path(fal_notebook.__file__).parent}"
