"""Links whose server forbids things, breaks, freezes or falls silent."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import LinkLostError
from fal_notebook.hosts.links import open_link
from tests.support.socket_server import count_bytes, echo, pour
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fal_notebook.hosts.ssh_link import SSHLink


DIALER = """
import os, socket, sys, threading
c = socket.socket(socket.AF_UNIX)
try:
    c.connect(sys.argv[1])
except OSError as error:
    sys.exit(str(error))
def copy():
    while d := os.read(0, 65536):
        c.sendall(d)
    c.shutdown(socket.SHUT_WR)
threading.Thread(target=copy, daemon=True).start()
while d := c.recv(65536):
    os.write(1, d)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with start_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def link(server: SSHServer) -> Iterator[SSHLink]:
    with open_link("gpu-box", ssh_config=server.config_path) as opened:
        yield opened


@pytest.fixture
def own(tmp_path: Path) -> Iterator[SSHServer]:
    """A server that a test may reconfigure, freeze and break."""
    with start_sshd(tmp_path / "own") as running:
        yield running


@pytest.fixture(params=["paramiko", "openssh"])
def by(request: pytest.FixtureRequest) -> str:
    """What carries the link."""
    return str(request.param)


def _wait_for(condition: object) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        pause.wait(0.01)
    pytest.fail("what was waited for did not happen")


# -- servers that forbid forwarding -------------------------------------------------------------------


@pytest.mark.parametrize("option", ["AllowStreamLocalForwarding no", "DisableForwarding yes"])
def test_where_sockets_are_forbidden_a_command_joins_them(
    own: SSHServer, by: str, sock: str, option: str
) -> None:
    own.restart(option)
    (own.public / "dial.py").write_text(DIALER)
    data = os.urandom(2_000_000)

    with open_link("gpu-box", by=by, ssh_config=own.config_path) as link:
        link.dial_command = f"exec /usr/bin/python3 {own.public}/dial.py {{socket}}"
        first, second = link.dial(sock), link.dial(sock)

        assert echo(first, data) == data
        assert echo(second, b"two") == b"two"
        first.close()
        second.close()
        pour(link.dial(sock), 10_000_000)


def test_where_sockets_are_forbidden_nobody_listening_is_still_told(
    own: SSHServer, by: str, sock: str
) -> None:
    """The server gives the same answer to both; before and after the fallback is known."""
    own.restart("DisableForwarding yes")
    (own.public / "dial.py").write_text(DIALER)

    with open_link("gpu-box", by=by, ssh_config=own.config_path) as link:
        link.dial_command = f"exec /usr/bin/python3 {own.public}/dial.py {{socket}}"
        with pytest.raises(ConnectionRefusedError):
            link.dial("/nowhere/a.sock")
        echo(link.dial(sock), b"x")
        with pytest.raises(ConnectionRefusedError, match="No such file"):
            link.dial("/nowhere/a.sock").recv(1)


def test_a_fallback_is_not_used_where_sockets_are_allowed(link: SSHLink, sock: str) -> None:
    link.dial_command = "exit 1"
    with pytest.raises(ConnectionRefusedError):
        link.dial("/nowhere/a.sock")

    assert echo(link.dial(sock), b"direct") == b"direct"


# -- connections that break ---------------------------------------------------------------------------


def test_a_killed_connection_is_an_error_for_everybody(own: SSHServer, by: str, sock: str) -> None:
    with open_link("gpu-box", by=by, ssh_config=own.config_path) as link, ThreadPoolExecutor(3) as pool:
        stream = link.dial(sock)
        stream.sendall(b"i")
        reading = pool.submit(stream.recv, 1)
        sending = pool.submit(stream.sendall, bytes(64 << 20))
        running = pool.submit(link.run, "sleep 60")
        _wait_for(lambda: link.run("pgrep -x sleep").status == 0)

        own.kill_connections()

        with pytest.raises(OSError, match="connection broke"):
            reading.result(timeout=30)
        with pytest.raises(OSError, match="connection broke"):
            sending.result(timeout=30)
        with pytest.raises(LinkLostError, match=r"'gpu-box': the connection broke.*Connect again"):
            running.result(timeout=30)
        with pytest.raises(LinkLostError):
            link.dial(sock)
        assert not link.is_alive


def test_a_frozen_server_is_noticed_though_its_machine_still_answers(own: SSHServer, sock: str) -> None:
    """Its kernel acknowledges every byte, so only the SSH server's own silence tells."""
    with open_link("gpu-box", ssh_config=own.config_path) as link, ThreadPoolExecutor(1) as pool:
        stream = link.dial(sock)
        stream.sendall(b"i")
        link._carrier.transport.heartbeat, link._carrier.transport.patience = 0.2, 1.0
        reading = pool.submit(stream.recv, 1)

        own.freeze()
        try:
            with pytest.raises(OSError, match="no sign of life"):
                reading.result(timeout=60)
        finally:
            own.thaw()
        assert not link.is_alive


def test_a_server_that_freezes_while_much_is_sent_is_noticed(own: SSHServer, sock: str) -> None:
    with open_link("gpu-box", ssh_config=own.config_path) as link, ThreadPoolExecutor(1) as pool:
        stream = link.dial(sock)
        link._carrier.transport.heartbeat, link._carrier.transport.patience = 0.2, 1.0
        sending = pool.submit(count_bytes, stream, 1 << 40)

        own.freeze()
        try:
            with pytest.raises(OSError, match="connection broke"):
                sending.result(timeout=60)
        finally:
            own.thaw()


def test_an_idle_connection_lives_on(own: SSHServer) -> None:
    """Signs of life are asked for and given; nothing else happens."""
    with open_link("gpu-box", ssh_config=own.config_path) as link:
        link._carrier.transport.heartbeat, link._carrier.transport.patience = 0.1, 0.6

        threading.Event().wait(2.0)

        assert link.run("echo on").stdout == b"on\n"


def test_a_server_that_asks_for_signs_of_life_gets_them(own: SSHServer) -> None:
    own.restart("ClientAliveInterval 1\nClientAliveCountMax 1")

    with open_link("gpu-box", ssh_config=own.config_path) as link:
        link._carrier.transport.heartbeat = 0.0  # ours would keep the server quiet
        threading.Event().wait(3.5)

        assert link.run("echo on").stdout == b"on\n"


def test_closing_a_link_ends_its_streams_and_may_be_done_twice(own: SSHServer, sock: str) -> None:
    link = open_link("gpu-box", ssh_config=own.config_path)
    stream = link.dial(sock)
    stream.sendall(b"i")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stream.recv, 1)

        link.close()
        link.close()

        with pytest.raises(OSError, match="closed here"):
            reading.result(timeout=30)
    with pytest.raises(LinkLostError, match="closed here"):
        link.run("true")


def test_many_links_leave_no_threads_behind(server: SSHServer) -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        with open_link("gpu-box", ssh_config=server.config_path) as link:
            link.run("true")

    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive(), thread.name
