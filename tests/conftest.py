"""What all tests share: folders of their own for hosts and settings, and agents that end with the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parent))  # for `support`

pytest_plugins = ["support.hosts"]


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first: no process should be left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def pytest_report_header() -> str:
    """Say which library is tested: the installed wheel, or the checkout."""
    import fal_notebook

    return f"fal_notebook from {Path(fal_notebook.__file__).parent}"
