"""The host behind the SSH server, for the notebooks that are replayed on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host


@pytest.fixture(scope="session")
def gpu_box(ssh_host: Host) -> str:
    """The name by which kernels reach it."""
    ssh_host.ask("status")  # connected, so that its agent ends with the tests
    return ssh_host.name
