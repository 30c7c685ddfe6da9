"""What the `ssh` program says when it cannot log in, as errors of ours.

Runs in the notebook; standard library only.
"""

from __future__ import annotations

import re
import shlex

from fal_agent.errors import (
    AuthenticationError,
    ConfigurationError,
    HostError,
    HostKeyError,
    HostUnreachableError,
)

__all__ = ["login_error"]

MAX_LINES = 12  # of ssh's own that are shown
_FORGET = re.compile(r"^\s*(ssh-keygen -f .+ -R .+)$", re.MULTILINE)
_ON_THE_WAY = "UNKNOWN port 65535"  # how ssh calls what a ProxyCommand or a jump host leads to
_CEREMONY = re.compile(  # lines that say nothing which the error does not
    r"\s*(@.*|\*\* .*|WARNING: REMOTE HOST.*|IT IS POSSIBLE.*|Someone could be.*|It is also possible.*"
    r"|Please contact.*|Add correct host key.*|remove with:|ssh-keygen -f .*|Host key for .* has changed.*"
    r"|Warning: Permanently added.*|Pseudo-terminal.*|Connection closed by UNKNOWN.*)?\s*"
)

_ConnectionErrors = type[HostError] | type[ConfigurationError]

# What to look for, in this order; whose fault it is; what happened; what to do.
_KINDS: tuple[tuple[str, _ConnectionErrors, str, str], ...] = (
    (
        (
            "[Bb]ad configuration option|Bad owner or permissions on|missing argument|Unsupported option"
            "|Bad Match|keyword .* extra arguments"
        ),
        ConfigurationError,
        "ssh does not understand its configuration",
        "Correct the file that it names; `ssh -G {name}` shows what ssh makes of it",
    ),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        HostKeyError,
        (
            "the host key is not the one that is known. Either the machine was set up anew, or another "
            "machine answers in its place"
        ),
        "If the machine's administrator confirms the new key, forget the old one and connect again",
    ),
    (
        "you have requested strict checking",
        HostKeyError,
        "its host key is not known, and StrictHostKeyChecking yes lets nobody be asked",
        "Compare it with the machine's own, then add it to known_hosts; ssh-keyscan prints its lines",
    ),
    (
        "Host key verification failed|REVOKED|host key .*revoked",
        HostKeyError,
        "its host key is not known and was not accepted",
        "Compare it with the machine's own, then run `{command}` once in a terminal and type yes",
    ),
    (
        "Could not resolve hostname",
        HostUnreachableError,
        "the machine's name could not be looked up",
        "Check its spelling, its HostName in the SSH configuration, and this machine's network",
    ),
    (
        r"Permission denied \(|Too many authentication failures|Authentication failed",
        AuthenticationError,
        "the server did not let you in",
        (
            "See whether `{command}` works in a terminal; give the server your key with ssh-copy-id; or "
            "name another user (user@host, or User in the SSH configuration)"
        ),
    ),
    (
        "Connection refused",
        HostUnreachableError,
        "the connection was refused: no server listens there",
        "Check that sshd runs on the machine, and the Port in the SSH configuration",
    ),
    (
        "timed out",
        HostUnreachableError,
        "the machine did not answer",
        "Check that it is on, that the address is right, and whether it needs a VPN or a jump host",
    ),
    (
        "No route to host|Network is unreachable",
        HostUnreachableError,
        "the machine cannot be reached",
        "Check this machine's network, and whether the address needs a VPN or a jump host",
    ),
    (
        "stdio forwarding failed|administratively prohibited",
        HostUnreachableError,
        "the jump host did not connect further",
        "Check the address as seen from there, and that the jump host allows it (AllowTcpForwarding)",
    ),
    (
        "Unable to negotiate|no matching",
        HostUnreachableError,
        "the server has no method in common with this side",
        "Update the server, or allow one of its methods in the SSH configuration",
    ),
    (
        _ON_THE_WAY,
        HostUnreachableError,
        "the ProxyCommand or ProxyJump did not connect",
        "Run it by itself in a terminal to see what is wrong, or `{command}` with -v",
    ),
    (
        "kex_exchange_identification|Connection closed by|Connection reset by|Bad protocol|banner",
        HostUnreachableError,
        "the machine accepted the connection but ended it before the login",
        (
            "Check the port; if it is right, the server may be overloaded or may block this address: "
            "try `{command}`"
        ),
    ),
)


def login_error(
    label: str, name: str, command: str, status: int, words: str
) -> HostError | ConfigurationError:
    """Make the error that says why `ssh` did not log in.

    Args:
        label: how messages call the machine.
        name: as the user typed it.
        command: what to type in a terminal to see it.
        status: of the process.
        words: what it wrote.
    """
    lines = [line.strip() for line in words.splitlines() if not _CEREMONY.fullmatch(line)]
    said = "\n".join(f"  {line}" for line in lines[-MAX_LINES:]) or f"  nothing (its status was {status})"
    where = f"{label}, at a machine on the way" if _ON_THE_WAY in words else label
    for pattern, kind, what, advice in _KINDS:
        if re.search(pattern, words):
            todo = advice.format(command=command, name=shlex.quote(name))
            forget = _FORGET.search(words)
            if forget and kind is HostKeyError:
                todo += f":\n  {forget[1].strip()}"
            return kind(f"{where}: {what}; ssh said:\n{said}\n{todo}")
    todo = f"Try `{command}` in a terminal, with -v to see more"
    return HostUnreachableError(f"{where}: ssh could not connect; it said:\n{said}\n{todo}")
