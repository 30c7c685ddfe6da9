"""The servers that other tests talk to are what they say."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.sshd import SSHServer, connection_processes, ssh_command, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with start_sshd(tmp_path) as running:
        yield running


def test_the_openssh_client_reaches_the_server_as_another_user(server: SSHServer) -> None:
    done = subprocess.run(ssh_command(server, "id", "-un"), capture_output=True, text=True, timeout=30)

    assert (done.returncode, done.stdout) == (0, f"{server.user}\n"), done.stderr


def test_extra_configuration_wins_over_the_defaults(server: SSHServer) -> None:
    server.restart("PubkeyAuthentication no")

    done = subprocess.run(ssh_command(server, "true"), capture_output=True, text=True, timeout=30)

    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_killing_connections_leaves_the_server_and_the_users_processes(server: SSHServer) -> None:
    """A crash of the connection is not a crash of the host."""
    client = subprocess.Popen(
        ssh_command(server, "sh", "-c", "echo $$; exec sleep 60"), stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    remote = int(client.stdout.readline())

    killed = server.kill_connections()

    assert len(killed) == 2
    assert client.wait(timeout=30) == 255
    assert Path(f"/proc/{remote}").exists()
    assert server.process.poll() is None
    subprocess.run(["kill", str(remote)], check=True)
    client.stdout.close()


def test_a_stopped_server_is_gone(server: SSHServer) -> None:
    server.stop()

    assert connection_processes(server.process.pid) == []
    done = subprocess.run(ssh_command(server, "true"), capture_output=True, text=True, timeout=30)
    assert "Connection refused" in done.stderr
