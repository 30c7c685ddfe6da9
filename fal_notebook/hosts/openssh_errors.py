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

__all__ = ["NameNotFoundError", "login_error"]

MAX_WORDS = 800  # characters of ssh's own that are shown
_FORGET = re.compile(r"^\s*(ssh-keygen -f .+ -R .+)$", re.MULTILINE)
_WARNINGS = re.compile(r"^(Warning: Permanently added|Pseudo-terminal|\*\* |@+$).*$", re.MULTILINE)


class NameNotFoundError(OSError):
    """A machine's name could not be looked up; the cause of an error that says so."""


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
    said = _WARNINGS.sub("", words).strip()[-MAX_WORDS:] or f"nothing, and ended with status {status}"
    quoted = _quoted(said)
    if re.search(r"Could not resolve hostname", words):
        error = HostUnreachableError(
            f"{label}: the machine's name could not be looked up; ssh said:\n{quoted}\n"
            "Check its spelling, its HostName in the SSH configuration, and this machine's network"
        )
        error.__cause__ = NameNotFoundError(name)
        return error
    for pattern, kind, what, advice in _KINDS:
        if re.search(pattern, words):
            todo = advice.format(command=command, name=shlex.quote(name))
            forget = _FORGET.search(words)
            if forget and kind is HostKeyError:
                todo += f":\n  {forget[1].strip()}"
            return kind(f"{label}: {what}; ssh said:\n{quoted}\n{todo}")
    todo = f"Try `{command}` in a terminal, with -v to see more"
    return HostUnreachableError(f"{label}: ssh could not connect; it said:\n{quoted}\n{todo}")


def _quoted(text: str) -> str:
    return "\n".join(f"  {line.strip()}" for line in text.splitlines() if line.strip())


_KINDS: tuple[tuple[str, type[HostError | ConfigurationError], str, str], ...] = (
    (
        (
            "Bad configuration option|bad configuration options|Bad owner or permissions on|missing argument|"
            "Unsupported option|keyword .* extra arguments"
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
        "Host key verification failed|host key is known for|REVOKED|host key .*revoked",
        HostKeyError,
        "its host key is not known and was not accepted",
        "Compare it with the machine's own, then run `{command}` once in a terminal and type yes",
    ),
    (
        r"Permission denied \(|Too many authentication failures|Authentication failed|No more authentication",
        AuthenticationError,
        "the server did not let you in",
        (
            "See whether `{command}` works in a terminal; give the server your key with ssh-copy-id; or name "
            "another user (user@host, or User in the SSH configuration)"
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
        "Check that the machine is on, that the address is right, and whether it needs a VPN or a jump host",
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
        "Check the address as seen from the jump host, and that it allows forwarding (AllowTcpForwarding)",
    ),
    (
        "Unable to negotiate|no matching",
        HostUnreachableError,
        "the server has no method in common with this side",
        "Update the server, or allow one of its methods in the SSH configuration",
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
