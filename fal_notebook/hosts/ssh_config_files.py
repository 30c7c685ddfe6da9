"""Names of machines, and the files of the SSH configuration read as one: Include, conditions of sections.

Runs in the notebook; standard library only. What they say is made sense of in `ssh_config`.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from pathlib import Path

from fal_agent.errors import ConfigurationError
from fal_notebook.hosts.ssh_choice import CANONICALIZE, UNKNOWN_MATCH

__all__ = [
    "CERTIFICATE",
    "RENAMED",
    "SHOWN",
    "address_in",
    "config_files",
    "in_home",
    "is_own",
    "read_lines",
    "ssh_words",
]

SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
MAX_INCLUDES = 16  # levels, as OpenSSH has it
OPTION = re.compile(r"\s*(\w+)(?:\s*=\s*|\s+)(.+?)\s*$")
COMMANDS = frozenset(
    {"proxycommand", "localcommand", "remotecommand", "knownhostscommand"}
)  # taken as they are
CRITERIA = frozenset({"all", "canonical", "final", "host", "originalhost", "user", "localuser", "exec"})
NEVER = 'originalhost "!*"'
SECTION = re.compile(r"\s*(host|match|include)(?:\s*=\s*|\s+)(.+?)\s*$", re.IGNORECASE)
# What paramiko would do in its own way is done here, or by OpenSSH: it expands tokens too often, and
# looks names up for CanonicalizeHostname, and keeps several values of IdentityFile only.
RENAMED = {"proxycommand": "falproxycommand", "canonicalizehostname": CANONICALIZE}
HIDDEN = {ord("%"): "\1", ord("~"): "\2"}  # from paramiko, in the names of files
SHOWN = {1: "%", 2: "~"}
CERTIFICATE = "falcertificate:"  # begins what stands among the identity files but is a certificate
ADDRESS = re.compile(
    r"(?:ssh://)?(?:(?P<user>.+)@)?(?:\[(?P<bracketed>[^\]]+)\]|(?P<host>(?!-)(?:[^:/@\s]+|[^:/@\s]*(?::[^:/@\s]*){2,})))"
    r"(?::(?P<port>\d+))?/?"
)


def config_files(path: Path | None = None) -> list[Path]:
    """Name the configuration files in the order that `ssh` reads them.

    Args:
        path: read this one alone; `$FAL_SSH_CONFIG` says the same.

    Raises:
        ConfigurationError: that file does not exist.
    """
    named = path or (Path(os.environ["FAL_SSH_CONFIG"]) if os.environ.get("FAL_SSH_CONFIG") else None)
    if named is None:
        return [f for f in (Path("~/.ssh/config").expanduser(), SYSTEM_CONFIG) if f.is_file()]
    named = named.expanduser()
    if not named.is_file():
        raise ConfigurationError(f"the SSH configuration {named} does not exist")
    return [named]


def ssh_words(name: str, files: list[Path]) -> list[str]:
    """Give the arguments by which `ssh` reaches `name`, reading the same configuration.

    Raises:
        ConfigurationError: the name cannot be understood.
    """
    match = address_in(name)
    own_file = ["-F", str(files[0])] if files and is_own(files[0]) else []
    port = ["-p", match["port"]] if match["port"] else []
    user = ["-l", match["user"]] if match["user"] else []
    return [*own_file, *port, *user, match["bracketed"] or match["host"]]


def address_in(name: str) -> re.Match[str]:
    """Take `user@host:port` apart: groups "user", "bracketed" or "host", "port".

    Raises:
        ConfigurationError: it cannot be understood.
    """
    match = ADDRESS.fullmatch(name.strip())
    if match is None:
        raise ConfigurationError(f"{name!r} is no machine's name: write an alias, a host or user@host:port")
    return match


def is_own(file: Path) -> bool:
    """Whether `ssh` would not read a file if it were not named."""
    return file not in (Path("~/.ssh/config").expanduser(), SYSTEM_CONFIG)


def read_lines(file: Path, base: Path, condition: str | None, depth: int) -> list[str]:
    """Read `file` with what it includes, its sections narrowed to `condition` (the words of a Match)."""
    if depth > MAX_INCLUDES:
        raise ConfigurationError(f"{file}: the SSH configuration includes itself, or goes too deep")
    try:
        text = file.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ConfigurationError(f"the SSH configuration {file} cannot be read: {error.strerror}") from error
    current = condition
    lines = [f"Match {condition}"] if condition else []
    for line in text.splitlines():
        section = SECTION.match(line)
        if section is None:
            lines.append(_option(line))
        elif section[1].lower() == "include":
            for path in _included(section[2], base):
                lines += read_lines(path, base, current, depth + 1)
            lines.append(f"Match {current}" if current else "Host *")
        else:
            own, unknown = _criteria(section[1].lower(), section[2])
            current = own if condition is None else _both(condition, own)
            lines.append(f"Match {current}")
            if (
                unknown
            ):  # where all the rest of it applies, what is not understood must be told, and not apply
                lines.append(f"{UNKNOWN_MATCH} {unknown}")
                current = NEVER
                lines.append(f"Match {current}")
    return lines


def _option(line: str) -> str:
    """Write an option as paramiko reads it: no single quotes, no comment behind it.

    Raises:
        ValueError: it has no value, or quotes that nothing closes, which `ssh` refuses as well.
    """
    option = OPTION.match(line)
    if option is None:
        return line
    name, value = option[1].lower(), option[2]
    if name not in COMMANDS and set(value) & set("'#\""):
        try:
            words = shlex.split(value, comments=True)
        except ValueError as error:
            raise ValueError(f"{line.strip()!r}: {error}") from None
        if not any(words) and name != "proxyjump":  # there it means none
            raise ValueError(f"{line.strip()!r}: it lacks a value")
        if len(words) == 1:
            value = f'"{words[0]}"'
    if name in {"identityfile", "certificatefile"}:
        prefix = CERTIFICATE if name == "certificatefile" else ""
        return f'identityfile "{prefix}{value.strip(chr(34)).translate(HIDDEN)}"'
    return f"{RENAMED.get(name, name)} {value}"


def _criteria(keyword: str, value: str) -> tuple[str, str]:
    """Write a Host or Match line's value as the words of a Match line; and give what was not understood."""
    words = shlex.split(value, comments=True)
    if keyword == "host":
        return f"originalhost {shlex.quote(','.join(words))}", ""
    result: list[str] = []
    unknown: list[str] = []
    while words:
        word = words.pop(0)
        kind, _, given = word.lower().removeprefix("!").partition("=")
        takes_value = kind not in {"all", "canonical", "final"} and not given
        value = words.pop(0) if takes_value and words else ""
        if kind not in CRITERIA or given:
            unknown.append(f"{word} {value}".strip())
        else:
            result.append(word.lower())
            value = value.lower() if kind in {"host", "originalhost"} else value
            result += [shlex.quote(value)] if takes_value else []
    result = [word for word in result if word != "all"]
    return " ".join(result) or "all", " ".join(unknown)


def _both(one: str, other: str) -> str:
    """Write two conditions as one; `all` stands alone or not at all."""
    parts = [part for part in (one, other) if part != "all"]
    return " ".join(parts) or "all"


def in_home(path: str) -> Path:
    """Give a path whose "~" or "~user" stands for a home folder.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise ValueError(f"{path!r}: this machine has no user {user[1:]!r}; did you mean '~/'?") from None


def _included(value: str, base: Path) -> list[Path]:
    found = []
    for pattern in shlex.split(value, comments=True):
        path = in_home(pattern)
        if not path.is_absolute():
            path = (
                SYSTEM_CONFIG.parent if base == SYSTEM_CONFIG.parent else Path("~/.ssh").expanduser()
            ) / path
        found += [Path(p) for p in sorted(glob.glob(str(path))) if Path(p).is_file()]  # noqa: PTH207 - absolute
    return found
