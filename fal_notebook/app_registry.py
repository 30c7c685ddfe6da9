"""The apps that were spawned from this notebook, by name.

Runs in the notebook. The launcher registers an app when it is spawned and forgets it when it ends; of two
apps with one name the later is found.
"""

from __future__ import annotations

import difflib
import threading
from typing import TYPE_CHECKING, Protocol

from fal_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AppInfo", "find", "find_endpoint", "forget", "names", "register"]

_lock = threading.Lock()
_apps: dict[str, AppInfo] = {}


class AppInfo(Protocol):
    """What a caller needs to know of an app: the handle that `spawn()` gives has it."""

    @property
    def url(self) -> str:
        """Where the app is reached; may block until that is known."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers to send with every request."""


def register(name: str, info: AppInfo) -> None:
    """Make an app known under a name, instead of the one that had the name."""
    with _lock:
        _apps[name] = info


def forget(name: str, info: AppInfo | None = None) -> None:
    """Remove a name, if it is there.

    Args:
        name: the app's name.
        info: remove the name only if it means this app, and not one that was spawned later.
    """
    with _lock:
        if info is None or _apps.get(name) is info:
            _apps.pop(name, None)


def names() -> list[str]:
    """Give the known names, in order."""
    with _lock:
        return sorted(_apps)


def find_endpoint(application: str) -> tuple[AppInfo, str]:
    """Give the app that is meant, and the path below it, as the fal SDK writes that.

    Args:
        application: "name", "name/path", "owner/name" or "owner/name/path"; owners mean nothing here.

    Returns:
        The app, and the path, "" or one that begins with a slash.

    Raises:
        ConfigurationError: as `find`.
    """
    parts = application.strip("/").split("/")
    known = names()
    for place in (0, 1) if application not in known else ():
        if len(parts) > place and parts[place] in known:
            rest = "/".join(parts[place + 1 :])
            return find(parts[place]), f"/{rest}" if rest else ""
    return find(application), ""


def find(name: str) -> AppInfo:
    """Give the app that has a name.

    Raises:
        ConfigurationError: there is none; the message lists the names that there are.
    """
    with _lock:
        if name in _apps:
            return _apps[name]
    known = names()
    if not known:
        raise ConfigurationError(
            f"no app is called {name!r}: none was spawned from this notebook. Spawn one, or give a URL"
        )
    close = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigurationError(f"no app is called {name!r}; there are: {', '.join(known)}.{hint}")
