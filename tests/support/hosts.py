"""Fixtures of the hosts that tests run over: this machine through the agent, and a real SSH server as
another user. `tests/conftest.py` makes them known to all tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fal_notebook.hosts import registry
from support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.hosts.base import Host

__all__ = ["AGENT_HOSTS", "host_named", "openssh_host", "ssh_host", "ssh_server"]

AGENT_HOSTS = ("local", "ssh")  # those whose calls run in processes of their own
BY_OPENSSH = "gpu-box-by-openssh"


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
    kept = f'root = "~/.fal_notebook/{root.name}"\n'
    other = f'[hosts.{BY_OPENSSH}]\nssh = "gpu-box"\nlink = "openssh"\n{kept}'
    settings.write_text(f'[hosts.gpu-box]\nlabels = ["attic"]\n{kept}{other}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_SSH_CONFIG", str(ssh_server.config_path))
        host = registry.get_host("gpu-box")
        yield host
        if getattr(host, "is_connected", False):
            host.ask("shutdown")
        host.close()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def openssh_host(ssh_host: Host) -> Iterator[Host]:
    """The same server and agent, reached by the ssh program."""
    host = registry.get_host(BY_OPENSSH)
    yield host
    host.close()


def host_named(request: pytest.FixtureRequest, name: str) -> Host:
    """Give the host that a test's parameter names."""
    fixture = f"{name}_host"
    remote = name in {"ssh", "openssh"}
    host: Host = request.getfixturevalue(fixture) if remote else registry.get_host(name)
    return host
