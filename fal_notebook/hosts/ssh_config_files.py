"""The files of the user's SSH configuration, read as one: Include, and the conditions of their sections.

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

__all__ = ["LENT", "SYSTEM_CONFIG", "config_files", "read_lines"]

SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
MAX_INCLUDES = 16  # levels, as OpenSSH has it
CRITERIA = frozenset({"all", "canonical", "final", "host", "originalhost", "user", "localuser", "exec"})
NEVER = 'originalhost "!*"'
SECTION = re.compile(r"\s*(host|match|include)(?:\s*=\s*|\s+)(.+?)\s*$", re.IGNORECASE)
# paramiko keeps several values of few options: one of which nothing here makes use lends its name. And it
# looks names up by itself for CanonicalizeHostname, in its own way: OpenSSH does that.
RENAMED = re.compile(r"^(\s*)(remoteforward|certificatefile|canonicalizehostname)(?=[\s=])", re.IGNORECASE)
LENT = {
    "certificatefile": "remoteforward",
    "remoteforward": "falremoteforward",
    "canonicalizehostname": CANONICALIZE,
}


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
            lines.append(RENAMED.sub(lambda m: m[1] + LENT[m[2].lower()], line))
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
            result += [shlex.quote(value)] if takes_value else []
    if unknown and result == ["all"]:
        result = []
    return " ".join(result) or "all", " ".join(unknown)


def _both(one: str, other: str) -> str:
    """Write two conditions as one; `all` stands alone or not at all."""
    parts = [part for part in (one, other) if part != "all"]
    return " ".join(parts) or "all"


def _included(value: str, base: Path) -> list[Path]:
    found = []
    for pattern in shlex.split(value, comments=True):
        path = Path(pattern).expanduser()
        if not path.is_absolute():
            path = (
                SYSTEM_CONFIG.parent if base == SYSTEM_CONFIG.parent else Path("~/.ssh").expanduser()
            ) / path
        found += [Path(p) for p in sorted(glob.glob(str(path))) if Path(p).is_file()]  # noqa: PTH207 - absolute
    return found
