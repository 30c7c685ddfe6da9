"""`fal.apps`: call apps by name, and `fal.apps()`: the apps of a host, whoever spawned them.

Runs in the notebook. The module itself can be called, which lists what is served.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fal_notebook.app_requests import run, stream, submit, ws
from fal_notebook.display.tables import Table, ago
from fal_notebook.hosts.registry import get_host

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host

__all__ = ["AppInfo", "Apps", "find", "listed", "run", "stream", "submit", "ws"]


@dataclass(frozen=True)
class AppInfo:
    """One app that a host serves.

    Attributes:
        name: unique on the host.
        host: the host's name.
        state: "starting", "ready", "idle" (a runner starts with the next request) or "stopping".
        since: when it was spawned, in seconds since the Unix epoch.
        in_flight: requests that it has now.
        auth: "private", "shared", "public", or empty: private to you by the way it is reached.
        attended: whether the notebook that spawned it is connected.
        run_id: of the app's run.
        runners: how many serve.
    """

    name: str
    host: str
    state: str
    since: float
    in_flight: int
    auth: str
    attended: bool
    run_id: str
    runners: int = 0

    @property
    def url(self) -> str:
        """A local URL of the app; one is made where another notebook spawned it."""
        from fal_notebook.app_ports import local_url

        return local_url(get_host(self.host), self.name)

    def stop(self) -> None:
        """End the app: it finishes the requests it has and tears down. Returns at once.

        Raises:
            FalServerlessError: it has ended already.
        """
        from fal_notebook.app_ports import close_when_gone

        host = get_host(self.host)
        host.ask("app_stop", name=self.name)
        close_when_gone(host, self.name)


class Apps(list[AppInfo]):
    """The apps of a host; a cell shows them as a table."""

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        heading = ["app", "state", "URL", "for", "runners", "requests", "spawned"]
        return Table(heading, [_row(info) for info in self])


def _row(info: AppInfo) -> list[str]:
    counts = [str(info.runners), str(info.in_flight)]
    return [info.name, info.state, info.url, info.auth or "only you", *counts, ago(info.since)]


def listed(host: Host | str | None = None) -> Apps:
    """Give the apps that a host serves, by name.

    Args:
        host: a host, the name of one, or None for the current one.

    Raises:
        HostError: the host cannot be reached.
    """
    where = get_host(host)
    if not hasattr(where, "connect"):  # this very process serves none in the background
        return Apps()
    return Apps(
        AppInfo(
            name=info["name"],
            host=where.name,
            state=info["state"],
            since=info["since"],
            in_flight=info["in_flight"],
            auth=info["auth"],
            attended=info["attended"],
            run_id=info["run_id"],
            runners=info["runners"],
        )
        for info in where.ask("apps")
    )


def find(name: str, host: Host | str | None = None) -> AppInfo:
    """Give the app of that name that a host serves.

    Raises:
        FalServerlessError: there is none; the message lists those that are there.
    """
    from fal_agent.errors import FalServerlessError

    infos = {info.name: info for info in listed(host)}
    if name not in infos:
        there = ", ".join(sorted(infos)) or "none"
        raise FalServerlessError(f"no app {name!r} on {get_host(host).name!r}; there: {there}")
    return infos[name]


class _Apps(types.ModuleType):
    """The module, which can be called."""

    def __call__(self, host: Host | str | None = None) -> Apps:
        """As `listed`."""
        return listed(host)


_module: Any = sys.modules[__name__]
_module.__class__ = _Apps
