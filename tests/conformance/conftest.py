"""Every test here that asks for `host` runs over each kind of host: in this process, on this machine
through the agent, and through a real SSH server as another user."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.sshd import SSHServer, start_sshd

from fal_notebook.hosts import registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.hosts.base import Host

HOSTS = ("inline", "local", "ssh")


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    """A real OpenSSH server on loopback, with an unprivileged user behind it."""
    server = start_sshd(tmp_path_factory.mktemp("sshd"), name="gpu-box")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ssh_host(ssh_server: SSHServer) -> Iterator[Host]:
    """The server as a host."""
    root = ssh_server.home / ".fal_notebook" / f"tests-{os.getpid()}"  # other test runs have theirs
    settings = Path(os.environ["FAL_NOTEBOOK_CONFIG"]) / "hosts.toml"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(f'[hosts.gpu-box]\nroot = "~/.fal_notebook/{root.name}"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_SSH_CONFIG", str(ssh_server.config_path))
        host = registry.get_host("gpu-box")
        yield host
        if getattr(host, "is_connected", False):
            host.ask("shutdown")
        host.close()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that this process and every host's user can write to."""
    folder = Path(tempfile.mkdtemp(prefix="fal-public-"))
    folder.chmod(0o777)
    old = os.umask(0)
    yield folder
    os.umask(old)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    """One host after the other."""
    return _host(request, request.param)


@pytest.fixture(params=HOSTS[1:])
def agent_host(request: pytest.FixtureRequest) -> Host:
    """Hosts whose calls run in processes of their own."""
    return _host(request, request.param)


def _host(request: pytest.FixtureRequest, name: str) -> Host:
    return request.getfixturevalue("ssh_host") if name == "ssh" else registry.get_host(name)
