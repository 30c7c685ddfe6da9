"""From a machine's name to an authenticated connection, directly or by way of others.

Runs in the notebook; one of the files that import paramiko. Every way to fail has its own words: which
name or address, what happened there, what to do next.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import paramiko  # type: ignore[import-untyped]

from fal_agent.errors import ConfigurationError, HostError, HostUnreachableError
from fal_notebook.hosts.host_keys import check_host_key, known_keys
from fal_notebook.hosts.ssh_config import resolve
from fal_notebook.hosts.ssh_link import ChannelRefused
from fal_notebook.hosts.ssh_login import log_in
from fal_notebook.hosts.ssh_transport import LinkTransport
from fal_notebook.prompting import SilentPrompt

if TYPE_CHECKING:
    from pathlib import Path

    from fal_notebook.hosts.ssh_config import Target
    from fal_notebook.hosts.ssh_stream import Stream
    from fal_notebook.prompting import Prompt

__all__ = ["Connection", "NeedsOpenSSHError", "connect"]

MAX_JUMPS = 8
HEARTBEAT = 5.0  # seconds
UNACKNOWLEDGED = 20_000  # milliseconds that sent bytes may stay unacknowledged
UNSENT = 128 << 10  # bytes the system may hold back; more would only make small calls wait behind large
PROHIBITED = 1
FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}


class NeedsOpenSSHError(Exception):
    """The way to a machine asks for what only the OpenSSH program can do.

    Attributes:
        reason: what that is, as the end of a sentence.
        otherwise: the error to raise where there is no such program.
    """

    def __init__(self, reason: str, otherwise: HostError | None = None) -> None:
        super().__init__(reason, otherwise)
        self.reason, self.otherwise = reason, otherwise


@dataclass
class Connection:
    """An authenticated connection and what carries it."""

    target: Target
    transport: LinkTransport
    carriers: list[Connection] = field(default_factory=list)
    proxy: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """The machine, as the user typed it."""
        return self.target.name

    @property
    def label(self) -> str:
        """How messages call the machine."""
        return self.target.label

    def is_active(self) -> bool:
        """Whether it stands, as far as is known."""
        return bool(self.transport.is_active())

    def open_session(self, command: str, *, timeout: float) -> Stream:
        """Run a line in the user's login shell; see `fal_notebook.hosts.ssh_link.Carrier`."""
        stream = self.transport.open_stream("session", timeout=timeout)
        stream.execute(command)
        return stream

    def open_unix(self, path: str, *, timeout: float) -> Stream:
        """Connect to a Unix socket of the machine."""
        return self.transport.open_unix(path, timeout=timeout)

    def why_lost(self) -> str:
        """Say in a few words how it ended."""
        return self.transport.why_lost()

    def close(self) -> None:
        """End it, then what carried it."""
        self.transport.close()
        for carrier in reversed(self.carriers):
            carrier.close()
        _end(self.proxy)


@dataclass
class _Way:
    """A socket to a server's SSH port, not yet spoken over."""

    sock: Any
    carriers: list[Connection] = field(default_factory=list)
    proxy: subprocess.Popen[bytes] | None = None
    errors: IO[bytes] | None = None  # what the proxy command writes to standard error

    def close(self) -> None:
        self.sock.close()
        for carrier in reversed(self.carriers):
            carrier.close()
        _end(self.proxy)
        if self.errors is not None:
            self.errors.close()

    def complaint(self) -> str:
        """What the proxy command said, its last 500 characters."""
        if self.errors is None:
            return ""
        self.errors.seek(0)
        return self.errors.read().decode("utf-8", "replace").strip()[-500:]


def connect(
    name: str,
    prompt: Prompt,
    files: list[Path],
    *,
    timeout: float,
    via: tuple[str, ...] | None = None,
    label: str | None = None,
    depth: int = 0,
    alone: bool = False,
) -> Connection:
    """Connect to `name`, check its host key, log in.

    Args:
        name: an alias, a host, or `user@host:port`.
        prompt: asked about new host keys, passphrases and passwords.
        files: configuration files.
        timeout: seconds for the connection and for the greeting, each; ConnectTimeout goes first.
        via: jump hosts, instead of the configuration's.
        label: how messages call the machine.
        depth: how many jumps led here.
        alone: do what can be done, even if it is not all that the configuration asks for.

    Raises:
        HostError: the subclass says whose fault it is.
        ConfigurationError: the configuration cannot be followed.
        NeedsOpenSSHError: it can be followed by the OpenSSH program only.
    """
    target = resolve(name, files, via=via, label=label)
    if target.openssh_reason and not alone:
        raise NeedsOpenSSHError(target.openssh_reason)
    if depth > MAX_JUMPS:
        raise ConfigurationError(
            f"{target.label}: its ProxyJump leads through more than {MAX_JUMPS} machines, perhaps in a circle"
        )
    timeout = target.connect_timeout or timeout
    if target.jumps:
        way = _by_jump(target, prompt, files, timeout, depth=depth, alone=alone)
    elif target.proxy_command:
        way = _by_command(target)
    else:
        way = _Way(_by_tcp(target, timeout))
    try:
        transport = _greet(target, way, timeout, SilentPrompt() if target.batch else prompt)
        log_in(transport, target, prompt)
    except HostUnreachableError as error:
        way.close()
        if alone or not isinstance(error.__cause__, paramiko.IncompatiblePeer):
            raise
        raise NeedsOpenSSHError("the server has no method in common with paramiko", error) from error
    except BaseException:  # also when the person interrupts a prompt
        way.close()
        raise
    transport.heartbeat = HEARTBEAT
    if way.errors is not None:
        way.errors.close()
    return Connection(target, transport, way.carriers, way.proxy)


def _by_tcp(target: Target, timeout: float) -> socket.socket:
    host, port = target.hostname, target.port
    try:
        family = FAMILIES.get(target.address_family, socket.AF_UNSPEC)
        addresses = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise HostUnreachableError(
            f"{target.label}: the name {host!r} could not be looked up "
            f"({getattr(error, 'strerror', error)}). Check its spelling, its HostName in the SSH "
            "configuration, and this machine's network"
        ) from error
    deadline = time.monotonic() + timeout
    problem: OSError = TimeoutError()
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(max(deadline - time.monotonic(), 0.1))
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            problem = error
        else:
            _tune(sock)
            return sock
    raise HostUnreachableError(_tcp_problem(target, problem, timeout)) from problem


def _tcp_problem(target: Target, problem: OSError, timeout: float) -> str:
    if isinstance(problem, ConnectionRefusedError):
        return (
            f"{target.label}: {target.where} refused the connection: no server listens there. "
            "Check that sshd runs on the machine, and the Port in the SSH configuration"
        )
    if isinstance(problem, TimeoutError):
        return (
            f"{target.label}: {target.where} did not answer within {timeout:g} s. Check that the machine is "
            "on, that the address is right, and whether it needs a VPN or a jump host"
        )
    return (
        f"{target.label}: {target.where} cannot be reached: {problem.strerror or problem}. Check the network"
    )


def _tune(sock: socket.socket) -> None:
    """Send at once, notice a dead peer, and keep little unsent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 3),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED),
        ("TCP_NOTSENT_LOWAT", UNSENT),
    ):
        if hasattr(socket, option):  # not every system has each
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _by_jump(
    target: Target, prompt: Prompt, files: list[Path], timeout: float, *, depth: int, alone: bool
) -> _Way:
    *before, last = target.jumps
    label = f"{target.label}, at its jump host {last!r}"
    carrier = connect(
        last,
        prompt,
        files,
        timeout=timeout,
        via=tuple(before) or None,
        label=label,
        depth=depth + 1,
        alone=alone,
    )
    try:
        sock = carrier.transport.open_tcp(target.hostname, target.port, timeout=timeout)
    except ChannelRefused as refusal:
        carrier.close()
        if refusal.reason == PROHIBITED:
            advice = "It forbids forwarding; ask for AllowTcpForwarding there, or take another way"
        else:
            advice = f"Check that {target.where} is right as seen from there, and that sshd runs on it"
        raise HostUnreachableError(
            f"{target.label}: the jump host {last!r} did not connect to {target.where}: "
            f"{refusal.text}. {advice}"
        ) from refusal
    except OSError as error:
        carrier.close()
        raise HostUnreachableError(
            f"{target.label}: the jump host {last!r} did not connect to {target.where}: {error}. Try again"
        ) from error
    return _Way(sock, carriers=[carrier])


def _by_command(target: Target) -> _Way:
    """Speak through the user's ProxyCommand, run by their shell as `ssh` does."""
    ours, theirs = socket.socketpair()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    shell = os.environ.get("SHELL") or "/bin/sh"
    try:
        proxy = subprocess.Popen(
            [shell, "-c", f"exec {target.proxy_command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=errors,
            start_new_session=True,  # an interrupt in the terminal is not meant for it
        )
    except OSError as error:
        ours.close()
        errors.close()
        raise HostUnreachableError(
            f"{target.label}: its ProxyCommand could not be started: {error}. Check ProxyCommand and $SHELL"
        ) from error
    finally:
        theirs.close()
    return _Way(ours, proxy=proxy, errors=errors)


def _end(proxy: subprocess.Popen[bytes] | None) -> None:
    if proxy is None:
        return
    proxy.terminate()
    try:
        proxy.wait(timeout=2)
    except subprocess.TimeoutExpired:
        proxy.kill()
        proxy.wait()


def _greet(target: Target, way: _Way, timeout: float, prompt: Prompt) -> LinkTransport:
    """Exchange keys and make sure that it is the right machine."""
    known = known_keys(target.known_hosts, *target.key_names)
    types = tuple(dict.fromkeys(k.key_type for k in known if not k.marker))
    authorities = any(k.marker == "cert-authority" for k in known)
    transport = LinkTransport(way.sock, known_key_types=types, certificates=authorities)
    transport.banner_timeout = transport.handshake_timeout = timeout
    try:
        transport.start_client(timeout=timeout)
        key = transport.get_remote_server_key()
    except (paramiko.SSHException, OSError, EOFError) as error:
        transport.close()
        raise _greeting_problem(target, way, error) from error
    try:
        certificate = key.public_blob.key_blob if key.public_blob is not None else None
        check_host_key(target, key.get_name(), key.asbytes(), known, prompt, certificate=certificate)
    except BaseException:
        transport.close()
        raise
    return transport


def _greeting_problem(target: Target, way: _Way, error: Exception) -> HostError:
    if way.proxy is not None:
        try:
            status: int | None = way.proxy.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = None
        ended = f"ended with status {status}" if status is not None else "gave no SSH greeting"
        return HostUnreachableError(
            f"{target.label}: its ProxyCommand `{target.proxy_command}` {ended}: "
            f"{way.complaint() or 'it said nothing'}. Run that command in a terminal to see what is wrong"
        )
    if isinstance(error, paramiko.IncompatiblePeer):
        return HostUnreachableError(
            f"{target.label}: the SSH server at {target.where} has no method in common with this side: "
            f"{error}. Update the server"
        )
    said = str(error).removeprefix("Error reading SSH protocol banner")  # and no space before the reason
    return HostUnreachableError(
        f"{target.label}: {target.where} accepted the connection but did not greet as an SSH server does: "
        f"{said or 'it hung up'}. Check the port; if it is right, the server may be overloaded or may "
        f"block this address: try `{target.ssh_command}`"
    )
