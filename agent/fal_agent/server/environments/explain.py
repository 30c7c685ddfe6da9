"""Say in a user's terms why an environment could not be made, and what to do about it.

Runs in the agent. uv's own words stay in the message: its resolver explains better than we could.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Union

from fal_agent.errors import EnvironmentBuildError, RequirementError
from fal_agent.requirements import distribution_name, masked
from fal_agent.server.environments.disk import rooms
from fal_agent.server.environments.unreachable import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from fal_agent.server.environments.uv import UvError

__all__ = ["explained", "is_build_failure", "is_no_room", "is_offline", "no_room"]

_NO_ROOM = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\(os error (?:27|28|122)\)", re.IGNORECASE
)
_NO_ROOM_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OFFLINE = re.compile(r"network (?:connectivity is|was) disabled", re.IGNORECASE)
_NETWORK = re.compile(
    r"error sending request|dns error|failed to lookup address|connection refused|tcp connect error|"
    r"network is unreachable|operation timed out|network (?:connectivity is|was) disabled",
    re.IGNORECASE,
)
_BUILD = re.compile(r"failed to build|build backend", re.IGNORECASE)
_PARSE = re.compile(r"couldn't parse requirement", re.IGNORECASE)
_OLD = re.compile(r"unexpected argument|unrecognized subcommand", re.IGNORECASE)
_MAX_WORDS = 6000  # characters of uv's words in a message
_MAX_LOG = 4096  # characters of its log that an error carries, the last ones


def is_no_room(error: Union[UvError, OSError]) -> bool:
    """Whether something failed because a disk is full."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM_NUMBERS
    return bool(_NO_ROOM.search(error.words))


def is_offline(error: UvError) -> bool:
    """Whether uv failed only because it was told to stay away from the network."""
    return bool(_OFFLINE.search(error.words))


def is_build_failure(error: UvError) -> bool:
    """Whether a package could not be built from its source."""
    return bool(_BUILD.search(error.words)) and not is_no_room(error)


def no_room(folders: Iterable[Path], words: str = "") -> EnvironmentBuildError:
    """The error for a full disk. Nothing half-made is left when it is raised.

    Args:
        folders: that are written to while an environment is made.
        words: what failed.
    """
    return EnvironmentBuildError(
        f"there is not enough room to make the environment: {rooms(folders)}. Make room there "
        "(`fal-notebook envs` lists the environments and what they take, `uv cache clean` empties uv's "
        f"cache), then call again.{_quoted(words)}",
        words[-_MAX_LOG:],
    )


def explained(
    error: UvError, *, doing: str, layers: Sequence[Sequence[str]], folders: Iterable[Path]
) -> Union[EnvironmentBuildError, RequirementError]:
    """The error to raise for a failure of uv.

    Args:
        error: uv's.
        doing: what it was doing, such as "resolve the requirements for Python 3.11".
        layers: the requirement lines.
        folders: that are written to while an environment is made.
    """
    if is_no_room(error):
        return no_room(folders, masked(error.words))
    words, log = masked(error.words), masked(error.log)[-_MAX_LOG:]
    if _PARSE.search(words):
        return RequirementError(f"uv cannot read a requirement:{_quoted(words)}")
    lines = _named_in(words, layers)
    about = f"\nAsked for: {', '.join(map(repr, lines))}." if lines else ""
    if _NETWORK.search(words):
        about += (
            "\nThe packages are not in uv's cache on this host, and the package index could not be reached "
            "from it. Check the host's network, or give uv a proxy or another index in the host's "
            "~/.config/uv/uv.toml."
        )
        return UnreachableError(f"uv could not {doing}:{_quoted(words)}{about}", log)
    if _OLD.search(words):
        about += "\nThe uv on this host is too old: update it there with `uv self update`."
    return EnvironmentBuildError(f"uv could not {doing}:{_quoted(words)}{about}", log)


def _quoted(words: str) -> str:
    if len(words) > _MAX_WORDS:
        words = f"{words[: _MAX_WORDS // 2]}\n[...]\n{words[-_MAX_WORDS // 2 :]}"
    return f"\n{words}" if words else ""


def _named_in(words: str, layers: Sequence[Sequence[str]]) -> list[str]:
    """The requirement lines whose distributions these words name."""
    said = re.sub(r"[-_.]+", "-", words).lower()
    return [
        masked(line)
        for layer in layers
        for line in layer
        if re.search(rf"(?<![a-z0-9-]){re.escape(distribution_name(line))}(?![a-z0-9]|-[a-z0-9])", said)
    ]
