"""The way to a machine over SSH, step by step: configuration, name, port, host key, login.

Runs in the notebook. The connection that the last step makes serves the examination of the machine.
"""

from __future__ import annotations

import shlex
import socket
import threading
import time
from typing import TYPE_CHECKING

from fal_agent.errors import (
    AuthenticationError,
    ConfigurationError,
    FalServerlessError,
    HostKeyError,
    HostUnreachableError,
    LinkLostError,
)
from fal_notebook.diagnose import machine
from fal_notebook.diagnose.checks import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.config import HostSettings
    from fal_notebook.hosts.ssh_config import Target

__all__ = ["examine_over_ssh"]

GREETING_SIZE = 255  # bytes of an SSH server's first line, at most


def examine_over_ssh(name: str, settings: HostSettings, timeout: float) -> Iterator[Check]:
    """Examine a machine that is reached over SSH; see `fal_notebook.diagnose.examine`."""
    from fal_notebook.hosts.ssh import SSHHost
    from fal_notebook.hosts.ssh_config import resolve
    from fal_notebook.hosts.ssh_config_files import config_files

    address = settings.ssh or name
    try:
        target = resolve(address, config_files())
    except FalServerlessError as error:
        yield Check(
            "configuration", False, str(error), f"ssh -G {shlex.quote(address)}   # what ssh makes of it"
        )
        return
    yield Check("configuration", True, _described(target, settings.link))
    if not target.jumps and not target.proxy_command:
        for check in _on_the_network(target, timeout):
            yield check
            if not check.ok:
                return
    host = SSHHost(name)
    began = time.monotonic()
    try:
        host.link  # noqa: B018 - connects
        yield Check("host key", True, "the machine is the one that is known")
        yield Check("login", True, f"accepted; connecting took {time.monotonic() - began:.1f} s")
        yield from machine.examine_there(host, settings, target.ssh_command, timeout)
    except FalServerlessError as error:
        yield from _refused(target, error)
    finally:
        host.close()


def _described(target: Target, link: str | None) -> str:
    way = ""
    if target.jumps:
        way = f" by way of {', '.join(target.jumps)}"
    elif target.proxy_command:
        way = f" through the ProxyCommand `{target.proxy_command}`"
    program = ""
    if link == "openssh":
        program = "; by the ssh program, as hosts.toml says"
    elif target.openssh_reason and link is None:
        program = f"; by the ssh program, because {target.openssh_reason}"
    return f"{target.user} at {target.where}{way}{program}"


def _on_the_network(target: Target, timeout: float) -> Iterator[Check]:
    found = _addresses(target, timeout)
    if isinstance(found, str):
        shown = f"{_with_program('ssh -G', target)} | grep -i ^hostname"
        fix = f"{shown}   # then correct the name, or HostName in the SSH configuration"
        yield Check("name", False, found, fix)
        return
    addresses = ", ".join(dict.fromkeys(found))
    is_one = addresses == target.hostname
    yield Check("name", True, addresses if is_one else f"{target.hostname} is {addresses}")
    yield _port(target, min(timeout, target.connect_timeout or timeout))


def _addresses(target: Target, timeout: float) -> list[str] | str:
    """Look the machine's name up; gives its addresses, or what is wrong."""
    result: list[list[str] | str] = []

    def look_up() -> None:
        try:
            rows = socket.getaddrinfo(target.hostname, target.port, socket.AF_UNSPEC, socket.SOCK_STREAM)
            result.append([str(row[4][0]) for row in rows])
        except (socket.gaierror, UnicodeError) as error:
            words = getattr(error, "strerror", None) or error
            result.append(f"the name {target.hostname!r} could not be looked up: {words}")

    looking = threading.Thread(target=look_up, name="fal-doctor", daemon=True)  # it knows no time limit
    looking.start()
    looking.join(timeout)
    if not result:
        return (
            f"the name {target.hostname!r} could not be looked up within {timeout:g} s: no DNS server answers"
        )
    return result[0]


def _port(target: Target, timeout: float) -> Check:
    try:
        with socket.create_connection((target.hostname, target.port), timeout) as connection:
            connection.settimeout(timeout)
            greeting = connection.recv(GREETING_SIZE).split(b"\n")[0].decode("ascii", "replace").strip()
    except OSError as error:
        words = _tcp_words(error, timeout)
        asked = "is the machine on, the port right, its network in reach?"
        fix = f"{_with_program('ssh -v', target)} true   # {asked}"
        return Check("port", False, f"{target.where} {words}", fix)
    if not greeting.startswith("SSH-"):
        detail = f"{target.where} answers, but not as an SSH server does: {greeting[:60]!r}"
        return Check("port", False, detail, "correct Port (or HostName) in the SSH configuration")
    return Check("port", True, f"{target.where} answers: {greeting}")


def _tcp_words(error: OSError, timeout: float) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection: no server listens there"
    if isinstance(error, TimeoutError):
        return f"did not answer within {timeout:g} s: the machine is off, or a firewall drops what is sent"
    return f"cannot be reached: {error.strerror or error}"


def _refused(target: Target, error: FalServerlessError) -> Iterator[Check]:
    """The step of a connection that failed; the error's own words say at which machine, of several."""
    text = str(error)
    if isinstance(error, HostKeyError):
        *before, last = text.splitlines()
        forget = f"{target.ssh_command} true"
        if last.startswith(" "):  # of a changed key: the command that forgets the old one
            text, forget = "\n".join(before[:-1]), last.strip()
        yield Check("host key", False, text, f"{forget}   # once the fingerprint is confirmed")
        return
    if isinstance(error, AuthenticationError):
        yield Check("host key", True, "the machine is the one that is known")
        yield Check("login", False, text, _login_fix(target))
    elif isinstance(error, ConfigurationError):
        fix = f"{_with_program('ssh -G', target)}   # shows what ssh makes of it"
        yield Check("configuration", False, text, fix)
    elif isinstance(error, (HostUnreachableError, LinkLostError)):
        yield Check("connection", False, text, f"{_with_program('ssh -v', target)} true")
    else:
        yield Check("shell", False, text, f"{target.ssh_command} true")


def _login_fix(target: Target) -> str:
    """Offer the first key to the server; or make one, where none of those that are named exists."""
    keys = [key for key in target.identity_files if key.is_file()]
    if not keys and target.identities_given:
        key = shlex.quote(str(target.identity_files[0]))
        return f"ssh-keygen -t ed25519 -f {key} && {_with_program(f'ssh-copy-id -i {key}.pub', target)}"
    chosen = f" -i {shlex.quote(str(keys[0]))}.pub" if keys and target.identities_given else ""
    return _with_program(f"ssh-copy-id{chosen}", target)


def _with_program(program: str, target: Target) -> str:
    return f"{program}{target.ssh_command.removeprefix('ssh')}"
