"""The SSH connection breaks: during a call, and between calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.sshd import SSHServer


@pytest.fixture
def far(ssh_server: SSHServer) -> Iterator[SSHHost]:
    """The server as a host."""
    host = SSHHost(ssh_server.name)
    yield host
    host.ask("stop", everything=True)
    host.close()


def test_a_link_broken_during_a_call_is_told_and_the_run_goes_on(
    far: SSHHost, ssh_server: SSHServer, shared_folder: Path
) -> None:
    begun, go = shared_folder / "begun", shared_folder / "go"

    @fal.function(host=far)
    def work() -> int:
        import time

        begun.touch()
        while not go.exists():
            time.sleep(0.005)
        return 42

    run = work.submit()
    until(begun.exists)
    ssh_server.kill_connections()

    with pytest.raises(exceptions.LinkLostError, match="far-box"):
        run.result(timeout=20)
    go.touch()
    assert work() == 42
    until(lambda: {"run_id": run.run_id, "state": "done"}.items() <= record(far, run.run_id).items())


def record(host: SSHHost, run_id: str) -> dict[str, Any]:
    return next((item for item in host.ask("runs") if item["run_id"] == run_id), {})


def test_a_link_that_broke_between_calls_is_made_anew(far: SSHHost, ssh_server: SSHServer) -> None:
    @fal.function(host=far)
    def pid() -> int:
        import os

        return os.getpid()

    before = pid()
    ssh_server.kill_connections()
    until(lambda: not far.is_connected)

    assert pid() == before  # the worker was kept


def test_a_call_right_after_the_link_broke_works(far: SSHHost, ssh_server: SSHServer) -> None:
    """Whoever notices first, the connection or the call, the call makes a new link."""

    @fal.function(host=far)
    def one() -> int:
        return 1

    one()
    for _ in range(5):
        agent = far.connect()
        agent.close()  # the agent's stream is gone; the link is found broken only when it is used
        until(lambda agent=agent: not agent.is_open)
        ssh_server.kill_connections()
        assert one() == 1


def test_a_restarted_server_is_found_again(far: SSHHost, ssh_server: SSHServer) -> None:
    @fal.function(host=far)
    def one() -> int:
        return 1

    one()
    ssh_server.restart()
    until(lambda: not far.is_connected)

    assert one() == 1


def test_a_large_upload_that_breaks_is_told(far: SSHHost, ssh_server: SSHServer) -> None:
    @fal.function(host=far)
    def size(data: bytes) -> int:
        return len(data)

    assert size(b"x") == 1
    run = size.submit(bytes(300_000_000))
    ssh_server.kill_connections()

    with pytest.raises(exceptions.LinkLostError, match="far-box"):
        run.result(timeout=30)
    assert size(b"xy") == 2
