"""What the user's SSH configuration says about a machine.

Runs in the notebook; one of the files that import paramiko. paramiko matches sections and expands most
tokens; files that are included, options given in the name itself, and what the values mean are read here.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko  # type: ignore[import-untyped]
from paramiko.config import SSHConfigDict  # type: ignore[import-untyped]
from paramiko.ssh_exception import ConfigParseError  # type: ignore[import-untyped]

from fal_agent.errors import ConfigurationError
from fal_notebook.hosts.host_keys import lookup_name
from fal_notebook.hosts.ssh_choice import reason_for_openssh
from fal_notebook.hosts.ssh_config_files import (
    CERTIFICATE,
    RENAMED,
    SHOWN,
    address_in,
    in_home,
    is_own,
    read_lines,
)

__all__ = ["Target", "resolve"]

EXEC_SECONDS = 60.0
_PORTS = 1 << 16
DEFAULT_KEYS = ("id_rsa", "id_ecdsa", "id_ed25519", "id_ecdsa_sk", "id_ed25519_sk")


@dataclass(frozen=True)
class Target:
    """One machine and how to reach it, everything resolved."""

    name: str  # as the user typed it
    label: str  # how messages call it
    hostname: str
    port: int
    user: str
    identity_files: tuple[Path, ...]
    identities_given: bool  # by the configuration; else they are ssh's usual names
    identities_only: bool
    certificate_files: tuple[Path, ...]
    agent_socket: str | None
    jumps: tuple[str, ...]  # names, the nearest first
    proxy_command: str | None
    user_known_hosts: tuple[Path, ...]
    known_hosts: tuple[Path, ...]  # the user's and the system's
    strict_host_keys: str  # "yes", "ask", "accept-new", "no" or "off"
    hash_known_hosts: bool
    host_key_alias: str | None
    connect_timeout: float | None  # seconds
    batch: bool  # never ask anything
    methods: frozenset[str]  # authentication methods the configuration leaves
    address_family: str  # "any", "inet" or "inet6"
    openssh_reason: str  # what of all this paramiko cannot do; "" if nothing
    ssh_command: str  # what to type in a terminal instead

    @property
    def where(self) -> str:
        """The address in words."""
        return f"{self.hostname} port {self.port}"

    @property
    def key_name(self) -> str:
        """The name that known_hosts files know the machine by."""
        return self.host_key_alias or lookup_name(self.hostname, self.port)

    @property
    def key_names(self) -> tuple[str, ...]:
        """That name and, as `ssh` has it, the one without a port, for lines that speak of every port."""
        return tuple(dict.fromkeys((self.key_name, self.host_key_alias or self.hostname.lower())))


class _Config(paramiko.SSHConfig):  # type: ignore[misc] # paramiko is untyped
    """paramiko's, with `Match exec` run with nothing to type into, and a second pass for `final` alone."""

    def lookup(self, hostname: str) -> Any:
        options = self._lookup(hostname=hostname)
        options.setdefault("hostname", hostname)
        sections = [match for context in self._config for match in context.get("matches", [])]
        if any(match["type"] == "final" for match in sections):
            return self._lookup(hostname, options, canonical=False, final=True)
        return self._expand_variables(options, hostname)

    def _does_match(self, match_list: list[dict[str, Any]], hostname: str, *rest: Any) -> bool:
        options = rest[-1]
        if "hostname" in options:  # what Match host is about, its tokens replaced
            named = options["hostname"].replace("%%", "%").replace("%h", hostname)
            rest = (*rest[:-1], SSHConfigDict({**options, "hostname": named}))
        commands = [c for c in match_list if c["type"] == "exec"]
        others = [c for c in match_list if c["type"] != "exec"]
        if others and not super()._does_match(others, hostname, *rest):
            return False
        for command in commands:
            line = self._tokenize(options, hostname, "match-exec", command["param"])
            if _succeeds(line) == command["negate"]:
                return False
        return bool(match_list)


def _succeeds(line: str) -> bool:
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=EXEC_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"`{line}`, of a Match exec, did not end within {EXEC_SECONDS:g} s") from None
    return done.returncode == 0


def resolve(
    name: str, files: list[Path], *, via: tuple[str, ...] | None = None, label: str | None = None
) -> Target:
    """Find out how to reach `name`.

    Args:
        name: an alias of the configuration, a host name, or `user@host:port`.
        files: from `config_files`.
        via: jump hosts to use instead of what the configuration says.
        label: how messages shall call the machine; the quoted name if None.

    Raises:
        ConfigurationError: the name or the configuration cannot be understood.
    """
    match = address_in(name)
    alias = match["bracketed"] or match["host"]
    given = [f"User {match['user']}"] if match["user"] else []
    given += [f"Port {match['port']}"] if match["port"] else []
    lines = ["Host *", *given]
    try:
        for file in files:
            lines += ["Host *", *read_lines(file, file.parent, None, 0)]
        options = _Config.from_text("\n".join(lines)).lookup(alias)
        return _target(name, label or repr(name), alias, options, files=files, via=via)
    except (ConfigParseError, ValueError) as error:
        said = ", ".join(str(f) for f in files)
        raise ConfigurationError(
            f"{label or repr(name)}: the SSH configuration ({said}) cannot be understood: {error}"
        ) from error


def _target(
    name: str, label: str, alias: str, options: Any, *, files: list[Path], via: tuple[str, ...] | None
) -> Target:
    hostname = str(options.get("hostname", alias))
    user = str(options.get("user") or getpass.getuser())
    port = _number(options, "port", 22)
    if not 0 < port < _PORTS:
        raise ValueError(f"Port must be a number from 1 to {_PORTS - 1}, not {port}")
    tokens = {
        "d": str(Path.home()),
        "h": hostname,
        "n": alias,
        "p": str(port),
        "r": user,
        "u": getpass.getuser(),
    }

    def paths(option: str, default: str) -> tuple[Path, ...]:
        values = shlex.split(str(options.get(option, default)))
        return tuple(in_home(_expand(v, tokens)) for v in values if v.lower() != "none")

    named = list(dict.fromkeys(str(f).translate(SHOWN) for f in options.get("identityfile", [])))
    given = [f for f in named if not f.startswith(CERTIFICATE)]
    certificates = [f.removeprefix(CERTIFICATE) for f in named if f.startswith(CERTIFICATE)]
    keys = given or [str(Path("~/.ssh", key).expanduser()) for key in DEFAULT_KEYS]
    user_known = paths("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")
    all_known = user_known + paths(
        "globalknownhostsfile", "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
    )
    jumps, command = _way(options) if via is None else (via, None)
    own_file = f"-F {shlex.quote(str(files[0]))} " if files and is_own(files[0]) else ""
    identity_files = tuple(in_home(_expand(k, tokens)) for k in keys if k.lower() != "none")
    return Target(
        name=name,
        label=label,
        hostname=hostname,
        port=port,
        user=user,
        identity_files=identity_files,
        identities_given=bool(given),
        certificate_files=tuple(in_home(_expand(f, tokens)) for f in certificates),
        identities_only=_yes(options, "identitiesonly", default=False),
        agent_socket=_agent_socket(options.get("identityagent"), tokens),
        jumps=jumps,
        proxy_command=_expand(command, tokens) if command else None,
        user_known_hosts=user_known,
        known_hosts=all_known,
        strict_host_keys=_strictness(options),
        hash_known_hosts=_yes(options, "hashknownhosts", default=False),
        host_key_alias=options["hostkeyalias"].lower() if "hostkeyalias" in options else None,
        connect_timeout=_number(options, "connecttimeout", 0) or None,
        batch=_yes(options, "batchmode", default=False),
        methods=_methods(options),
        address_family=str(options.get("addressfamily", "any")).lower(),
        openssh_reason=reason_for_openssh(options, identity_files, keys_given=bool(given)),
        ssh_command=f"ssh {own_file}{_as_ssh_takes_it(name)}",
    )


def _as_ssh_takes_it(name: str) -> str:
    """Write `user@host:port` in the form that ssh's command line takes."""
    match = address_in(name)
    if not match["port"]:
        return shlex.quote(name)
    host = match["bracketed"] or match["host"]
    return f"-p {match['port']} " + shlex.quote(f"{match['user']}@{host}" if match["user"] else host)


def _way(options: Any) -> tuple[tuple[str, ...], str | None]:
    """Give the jump hosts or the proxy command, whichever the configuration named first."""
    for option in options:
        value = options[option]
        if option == RENAMED["proxycommand"]:
            return (), None if value.lower() == "none" else value
        if option == "proxyjump" and value.lower() not in {"", "none"}:
            return tuple(v.strip() for v in value.split(",")), None
    return (), None


def _number(options: Any, option: str, default: int) -> int:
    value = str(options.get(option, default))
    if not value.isdecimal():
        raise ValueError(f"{option.capitalize()} must be a number, not {value!r}")
    return int(value)


def _strictness(options: Any) -> str:
    value = str(options.get("stricthostkeychecking", "ask")).lower()
    return {"true": "yes", "false": "no"}.get(value, value)


def _methods(options: Any) -> frozenset[str]:
    switches = {
        "publickey": "pubkeyauthentication",
        "keyboard-interactive": "kbdinteractiveauthentication",
        "password": "passwordauthentication",
    }
    return frozenset(m for m, option in switches.items() if _yes(options, option, default=True))


def _yes(options: Any, option: str, *, default: bool) -> bool:
    value = str(options.get(option, "yes" if default else "no")).lower()
    return value not in {"no", "false", "none"}


def _agent_socket(value: str | None, tokens: dict[str, str]) -> str | None:
    if value is None or value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    if value.lower() == "none":
        return None
    if value.startswith("$"):
        return os.environ.get(value[1:].strip("{}")) or None
    return str(in_home(_expand(value, tokens)))


def _expand(value: str, tokens: dict[str, str]) -> str:
    """Replace the %-tokens that paramiko left, and ${VARIABLES}."""
    value = re.sub(r"%(.)", lambda m: "%" if m[1] == "%" else tokens.get(m[1], m[0]), value)
    return re.sub(r"\$\{(\w+)\}", lambda m: os.environ.get(m[1], m[0]), value)
