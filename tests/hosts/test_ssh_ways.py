"""The ways to a machine, and the words for each way that fails."""

from __future__ import annotations

import socket
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import AuthenticationError, ConfigurationError, HostUnreachableError, LinkLostError
from fal_notebook.hosts.paramiko_link import open_link
from fal_notebook.prompting import SilentPrompt
from tests.support.socket_server import echo, socket_server
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[SSHServer]:
    with start_sshd(tmp_path / "inner", name="inner") as running:
        yield running


@pytest.fixture
def outer(tmp_path: Path) -> Iterator[SSHServer]:
    with start_sshd(tmp_path / "outer", name="outer") as running:
        yield running


def write(path: Path, *blocks: str) -> Path:
    path.write_text("\n".join(blocks))
    return path


def answered(config: Path, name: str, **options: object) -> str:
    with open_link(name, ssh_config=config, **options) as link:  # type: ignore[arg-type]
        return link.run("id -un").stdout.decode().strip()


def test_a_jump_host_leads_on(inner: SSHServer, outer: SSHServer, tmp_path: Path) -> None:
    config = write(tmp_path / "c", inner.host_block + "  ProxyJump outer\n", outer.host_block)

    with open_link("inner", ssh_config=config) as link:
        assert link.run("id -un").stdout.decode() == f"{inner.user}\n"
        inner.public.chmod(0o777)
        with socket_server(inner.public / "s.sock") as path:
            data = bytes(range(256)) * 20_000
            assert echo(link.dial(path), data) == data
    assert "direct-tcpip" not in inner.log.read_text()
    assert "Accepted publickey" in outer.log.read_text()


def test_jump_hosts_may_be_chained_and_named_by_address(
    inner: SSHServer, outer: SSHServer, tmp_path: Path
) -> None:
    """The first is an alias, the second a user, host and port; the same keys serve all."""
    with start_sshd(tmp_path / "third", name="third") as third:
        shared = (
            f"Host *\n  IdentityFile {inner.key_path}\n  IdentityFile {outer.key_path}\n"
            f"  IdentityFile {third.key_path}\n  UserKnownHostsFile {tmp_path}/all\n  IdentityAgent none\n"
        )
        (tmp_path / "all").write_text("".join(s.known_hosts.read_text() for s in (inner, outer, third)))
        config = write(
            tmp_path / "c",
            f"Host inner\n  HostName 127.0.0.1\n  Port {inner.port}\n  User {inner.user}\n"
            f"  ProxyJump outer,{third.user}@127.0.0.1:{third.port}\n",
            f"Host outer\n  HostName 127.0.0.1\n  Port {outer.port}\n  User {outer.user}\n",
            shared,
        )

        assert answered(config, "inner") == inner.user

        for server in (outer, third):
            assert "Accepted publickey" in server.log.read_text()


def test_a_jump_host_has_jump_hosts_of_its_own(inner: SSHServer, outer: SSHServer, tmp_path: Path) -> None:
    with start_sshd(tmp_path / "third", name="third") as third:
        config = write(
            tmp_path / "c",
            inner.host_block + "  ProxyJump outer\n",
            outer.host_block + "  ProxyJump third\n",
            third.host_block,
        )

        assert answered(config, "inner") == inner.user
        assert "Accepted publickey" in third.log.read_text()


def test_jump_hosts_in_a_circle_are_an_error(inner: SSHServer, outer: SSHServer, tmp_path: Path) -> None:
    config = write(
        tmp_path / "c", inner.host_block + "  ProxyJump outer\n", outer.host_block + "  ProxyJump inner\n"
    )

    with pytest.raises(ConfigurationError, match=r"'inner'.*perhaps in a circle"):
        answered(config, "inner")


def test_a_jump_host_that_fails_is_named(inner: SSHServer, outer: SSHServer, tmp_path: Path) -> None:
    config = write(
        tmp_path / "c",
        inner.host_block + "  ProxyJump outer\n",
        outer.host_block.replace(f"User {outer.user}", "User nobody-here"),
    )

    with pytest.raises(AuthenticationError, match=r"'inner', at its jump host 'outer': .*'nobody-here'"):
        answered(config, "inner")


def test_a_jump_host_that_forbids_forwarding_is_named(
    inner: SSHServer, outer: SSHServer, tmp_path: Path
) -> None:
    outer.restart("AllowTcpForwarding no")
    config = write(tmp_path / "c", inner.host_block + "  ProxyJump outer\n", outer.host_block)

    with pytest.raises(
        HostUnreachableError, match=r"the jump host 'outer' did not connect .*forbids forwarding"
    ):
        answered(config, "inner")


def test_a_machine_that_its_jump_host_cannot_reach_is_an_error(
    inner: SSHServer, outer: SSHServer, tmp_path: Path
) -> None:
    inner.stop()
    config = write(tmp_path / "c", inner.host_block + "  ProxyJump outer\n", outer.host_block)

    with pytest.raises(HostUnreachableError) as caught:
        answered(config, "inner")

    assert f"'inner': the jump host 'outer' did not connect to 127.0.0.1 port {inner.port}" in str(
        caught.value
    )
    assert "as seen from there" in str(caught.value)


def test_a_jump_host_that_breaks_takes_the_link_with_it(
    inner: SSHServer, outer: SSHServer, tmp_path: Path
) -> None:
    config = write(tmp_path / "c", inner.host_block + "  ProxyJump outer\n", outer.host_block)
    with open_link("inner", ssh_config=config) as link:
        link.run("true")

        outer.kill_connections()

        with pytest.raises(LinkLostError, match="'inner': the connection broke"):
            link.run("sleep 60")


@pytest.mark.parametrize("by", ["ssh", "python"])
def test_a_proxy_command_leads_on(inner: SSHServer, outer: SSHServer, tmp_path: Path, by: str) -> None:
    bridge = tmp_path / "bridge.py"
    bridge.write_text(
        "import os, socket, sys, threading\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def copy():\n"
        "    while d := os.read(0, 65536): s.sendall(d)\n"
        "    os._exit(0)\n"
        "threading.Thread(target=copy, daemon=True).start()\n"
        "while d := s.recv(65536): os.write(1, d)\n"
    )
    jump = write(tmp_path / "jump", outer.host_block)
    command = f"ssh -F {jump} -W %h:%p outer" if by == "ssh" else f"{sys.executable} {bridge} %h %p"
    config = write(tmp_path / "c", inner.host_block + f"  ProxyCommand {command}\n")

    assert answered(config, "inner") == inner.user


def test_a_proxy_command_that_fails_is_an_error_with_its_words(inner: SSHServer, tmp_path: Path) -> None:
    config = write(
        tmp_path / "c", inner.host_block + "  ProxyCommand sh -c 'echo no route to %h >&2; exit 3'\n"
    )

    with pytest.raises(HostUnreachableError) as caught:
        answered(config, "inner")

    assert "'inner': its ProxyCommand" in str(caught.value)
    assert "ended with status 3: no route to 127.0.0.1" in str(caught.value)


def test_a_proxy_command_ends_with_its_link(inner: SSHServer, tmp_path: Path) -> None:
    jump = write(tmp_path / "jump", inner.host_block)
    config = write(tmp_path / "c", inner.host_block + f"  ProxyCommand ssh -F {jump} -W %h:%p inner\n")
    link = open_link("inner", ssh_config=config)
    proxy = link._carrier.proxy
    assert proxy is not None
    assert proxy.poll() is None

    link.close()

    assert proxy.poll() is not None


def test_a_name_with_user_and_port_needs_no_configuration(inner: SSHServer, tmp_path: Path) -> None:
    config = write(
        tmp_path / "c", f"IdentityFile {inner.key_path}", f"UserKnownHostsFile {inner.known_hosts}"
    )

    assert answered(config, f"{inner.user}@127.0.0.1:{inner.port}") == inner.user


def test_the_configuration_is_named_by_the_environment(
    inner: SSHServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAL_SSH_CONFIG", str(inner.config_path))

    with open_link("inner") as link:
        assert link.name == "inner"


def test_a_configuration_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="/nothing does not exist"):
        open_link("inner", ssh_config=tmp_path / "nothing")


@pytest.mark.parametrize("lines", ["HostName ::1", "HostName ::1\n  AddressFamily inet6"])
def test_a_machine_may_have_an_address_of_version_6(inner: SSHServer, tmp_path: Path, lines: str) -> None:
    inner.restart(f"ListenAddress [::1]:{inner.port}")
    (tmp_path / "known").write_text(f"[::1]:{inner.port} {inner.host_key}\n")
    block = inner.host_block.replace("HostName 127.0.0.1", lines)
    config = write(tmp_path / "c", block.replace(str(inner.known_hosts), str(tmp_path / "known")))

    with open_link("inner", ssh_config=config) as link:
        assert link.run("echo ${SSH_CONNECTION%% *}").stdout == b"::1\n"


# -- machines that cannot be reached ------------------------------------------------------------------


def fails(tmp_path: Path, *lines: str, timeout: float = 5.0) -> str:
    config = write(tmp_path / "c", "Host box", *lines, "IdentityFile none", "IdentityAgent none")
    with pytest.raises(HostUnreachableError) as caught:
        open_link("box", ssh_config=config, prompt=SilentPrompt(), timeout=timeout)
    return str(caught.value)


def test_a_name_that_cannot_be_looked_up_is_an_error(tmp_path: Path) -> None:
    message = fails(tmp_path, "HostName no-such-host.invalid")

    assert message.startswith("'box': the name 'no-such-host.invalid' could not be looked up")
    assert "HostName" in message


def test_a_port_that_refuses_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

        message = fails(tmp_path, "HostName 127.0.0.1", f"Port {port}")

    assert message.startswith(f"'box': 127.0.0.1 port {port} refused the connection")
    assert "sshd" in message


def test_a_machine_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    """A listener whose queue is full stands for it: the kernel drops what comes, without a word."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(address)

        message = fails(tmp_path, "HostName 127.0.0.1", f"Port {address[1]}", "ConnectTimeout 1")

    assert message.startswith(f"'box': 127.0.0.1 port {address[1]} did not answer within 1 s")
    assert "VPN" in message


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x01" * 50_000])
def test_something_else_than_an_ssh_server_is_an_error(tmp_path: Path, greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(greeting)

        answering = threading.Thread(target=answer)
        answering.start()
        message = fails(tmp_path, "HostName 127.0.0.1", f"Port {port}")
        answering.join()

    assert f"'box': 127.0.0.1 port {port} accepted the connection but did not greet" in message


def test_a_server_that_never_greets_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        message = fails(tmp_path, "HostName 127.0.0.1", f"Port {port}", timeout=0.5)

    assert "did not greet" in message


def test_a_server_without_a_method_in_common_is_an_error(inner: SSHServer) -> None:
    inner.restart("Ciphers chacha20-poly1305@openssh.com")

    with pytest.raises(HostUnreachableError, match=r"no method in common with this side: .*ciphers"):
        open_link("inner", ssh_config=inner.config_path)
