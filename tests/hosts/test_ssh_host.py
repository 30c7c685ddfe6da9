"""A host that is reached again: by either program, whatever the server allows, its agent killed or not."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import TYPE_CHECKING

import pytest

from fal_notebook.config import remember_host
from fal_notebook.hosts.base import CompletedCommand
from fal_notebook.hosts.ssh import SSHHost
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with start_sshd(tmp_path_factory.mktemp("sshd"), name="box") as running:
        yield running
        shutil.rmtree(running.home / ".fal_notebook" / f"tests-again-{os.getpid()}", ignore_errors=True)


@pytest.fixture(params=["paramiko", "openssh"])
def host(
    server: SSHServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SSHHost]:
    monkeypatch.setenv("FAL_SSH_CONFIG", str(server.config_path))
    monkeypatch.setenv("FAL_NOTEBOOK_CONFIG", str(server.folder / "settings"))
    remember_host("box", link=request.param, root=f"~/.fal_notebook/tests-again-{os.getpid()}")
    host = SSHHost("box")
    yield host
    host.close()


def agent_of(host: SSHHost) -> int:
    return int(host.ask("status")["agent"]["pid"])


def wait_until_lost(host: SSHHost) -> None:
    for _ in range(1000):
        if not host.is_connected:
            return
        time.sleep(0.01)
    pytest.fail("the connection did not break")


def test_a_connection_that_broke_is_made_again_to_the_same_agent(host: SSHHost, server: SSHServer) -> None:
    before = agent_of(host)
    server.kill_connections()
    wait_until_lost(host)

    assert agent_of(host) == before


def test_two_kernels_share_the_agent_and_not_the_connection(host: SSHHost, server: SSHServer) -> None:
    other = SSHHost("box")
    try:
        assert agent_of(host) == agent_of(other)
        other.close()

        assert agent_of(host)
        assert host.link.is_alive
    finally:
        other.close()


@pytest.mark.parametrize("host", ["paramiko"], indirect=True)
@pytest.mark.parametrize("shell", ["fish", "tcsh"])
def test_a_login_shell_of_another_family_that_prints_at_its_start_will_do(
    server: SSHServer, host: SSHHost, shell: str
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    line = f"echo Welcome; echo 93% full >&2; exec {shell} -c"
    (server.public / "login").write_text(f'{line} "$SSH_ORIGINAL_COMMAND"\n')
    server.restart(f"ForceCommand /bin/sh {server.public}/login")

    assert agent_of(host)
    assert host.link.run("echo on; echo off >&2") == CompletedCommand(0, b"on\n", b"off\n")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("paramiko", ""),
        ("paramiko", "DisableForwarding yes"),
        ("paramiko", "MaxSessions 1"),
        ("openssh", "DisableForwarding yes"),
    ],
    indirect=["host"],
)
def test_an_agent_that_was_killed_is_started_again(host: SSHHost, server: SSHServer, allowed: str) -> None:
    """Its socket is still there, and so is what tells the next client where it is."""
    server.restart(allowed)
    before = agent_of(host)
    os.kill(before, signal.SIGKILL)
    wait_until_lost(host)

    assert agent_of(host) != before
    host.close()
    assert agent_of(host) != before  # a client that knows nothing finds the new one
