"""The hosts of this notebook by name, and which of them is the current one.

Runs in the notebook. Naming a host contacts nobody; `connect` does.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fal_notebook import config

if TYPE_CHECKING:
    from fal_notebook.hosts.agent_host import AgentHost
    from fal_notebook.hosts.base import Host

__all__ = ["HostInfo", "connect", "connected", "current_host", "get_host", "hosts", "local", "use"]

_known: dict[str, Host] = {}
_current: Host | None = None
_default: tuple[str | None, float, Host] | None = None  # FAL_HOST, when it was looked up, and the host
_lock = threading.RLock()

_SETTINGS_SECONDS = 0.5  # after which the settings are looked at again


@dataclass(frozen=True)
class HostInfo:
    """One line of `fal.hosts()`.

    Attributes:
        name: how the notebook calls the host.
        address: what ssh is told; None for this machine.
        is_current: whether calls go there when nothing else is said.
        is_connected: whether a connection is open.
    """

    name: str
    address: str | None
    is_current: bool
    is_connected: bool


def get_host(name: str | Host | None = None) -> Host:
    """Give a host by its name; the same object each time. Contacts nobody.

    Args:
        name: "local", "inline", a name of `hosts.toml`, or any name that ssh knows; a host is given
            back as it is; None is the current host.

    Raises:
        ConfigurationError: no host can have that name, or the settings cannot be read.
    """
    if name is None:
        return current_host()
    if not isinstance(name, str):
        return name
    with _lock:
        if name not in _known:
            if not _known:
                atexit.register(_close_all)
            _known[name] = _make(name)
        return _known[name]


def local() -> Host:
    """This machine."""
    return get_host("local")


def current_host() -> Host:
    """Give the host that calls go to when nothing else is said.

    It is the one connected last; else FAL_HOST; else `default` of `hosts.toml`; else this machine.

    Raises:
        ConfigurationError: the settings cannot be read.
    """
    global _default  # noqa: PLW0603 - what the settings say, looked up now and then
    if _current is not None:
        return _current
    chosen, now = os.environ.get("FAL_HOST"), time.monotonic()
    if _default is None or _default[0] != chosen or now - _default[1] > _SETTINGS_SECONDS:
        _default = (chosen, now, get_host(config.load().default or "local"))
    return _default[2]


def connect(name: str | Host, *, remember: bool = False) -> Host:
    """Connect a host and make it the current one.

    Args:
        name: as `get_host`.
        remember: also write it into `hosts.toml`, as the default of the sessions to come.

    Raises:
        HostError: the machine cannot be reached.
        ConfigurationError: as `get_host`.
    """
    host = get_host(name)
    opening = getattr(host, "connect", None)
    if opening is not None:
        opening()
    if remember:
        config.remember_host(host.name, default=True)
    return use(host)


def use(name: str | Host) -> Host:
    """Make a host the current one without connecting it yet."""
    global _current  # noqa: PLW0603 - the current host is this process's
    with _lock:
        _current = get_host(name)
        return _current


def hosts() -> list[HostInfo]:
    """List the hosts: this machine, those of `hosts.toml`, and those used in this notebook."""
    settings = config.load()
    current = current_host().name
    names = dict.fromkeys(["local", *settings.names, *_known])
    return [
        HostInfo(
            name=name,
            address=settings.host(name).ssh,
            is_current=name == current,
            is_connected=bool(getattr(_known.get(name), "is_connected", False)),
        )
        for name in names
    ]


def connected() -> list[AgentHost]:
    """Give the hosts of this notebook that a connection is open to."""
    from fal_notebook.hosts.agent_host import AgentHost

    return [host for host in list(_known.values()) if isinstance(host, AgentHost) and host.is_connected]


def _make(name: str) -> Host:
    if name == "local":
        from fal_notebook.hosts.local import LocalHost

        return LocalHost()
    if name == "inline":
        from fal_notebook.hosts.inline import InlineHost

        return InlineHost()
    from fal_notebook.hosts.ssh import SSHHost

    config.load().host(name)  # refuses what cannot be a name
    return SSHHost(name)


def _close_all() -> None:
    for host in list(_known.values()):
        host.close()
