"""Every test here that asks for `host` runs over each kind of host: in this process, on this machine
through the agent, and through a real SSH server as another user."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.cells import CellNotebook
from support.hosts import AGENT_HOSTS, host_named

from fal_notebook.session import forget_sessions, session_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.hosts.base import Host


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that this process and every host's user can write to."""
    folder = Path(tempfile.mkdtemp(prefix="fal-public-"))
    folder.chmod(0o777)
    old = os.umask(0)
    yield folder
    os.umask(old)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=("inline", *AGENT_HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    """One host after the other."""
    return host_named(request, request.param)


@pytest.fixture(params=AGENT_HOSTS)
def agent_host(request: pytest.FixtureRequest) -> Host:
    """Hosts whose calls run in processes of their own."""
    return host_named(request, request.param)


@pytest.fixture(params=(*AGENT_HOSTS, "openssh"))
def linked_host(request: pytest.FixtureRequest) -> Host:
    """The same, over each kind of link."""
    return host_named(request, request.param)


@pytest.fixture
def notebook(agent_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CellNotebook]:
    """A notebook whose cells run on one host after the other."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}), user_ns={})
    yield CellNotebook(shell, agent_host)
    for session in session_names(agent_host):
        agent_host.ask("stop", session=session)
    forget_sessions(agent_host)
    InteractiveShell.clear_instance()
