"""`fal.wrap_app`: an app as something that can be called, which serves it until it ends.

Runs in the notebook, or in a script that ends with `fal.wrap_app(MyApp)()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_notebook.app_client import LogPrinter
from fal_notebook.spawning import spawn

if TYPE_CHECKING:
    from fal_agent.runtime.app import App
    from fal_notebook.hosts.base import Host
    from fal_notebook.spawned import AppSpawnInfo

__all__ = ["WrappedApp", "serve_until_ended", "wrap_app"]


class WrappedApp:
    """An app that is served when this is called; made by `fal.wrap_app`.

    Attributes:
        app: the app's class, with the settings given.
        app_name: what it is called on a host.
        app_auth: who may use it.
    """

    def __init__(self, app: type[App], host: Host | str | None) -> None:
        self.app, self.app_name, self.app_auth = app, app.app_name, app.app_auth
        self._host = host
        self.__name__, self.__doc__ = app.__name__, app.__doc__

    def __call__(self) -> None:
        """Serve the app on its host, print what it says, and return when it has ended; an interrupt ends it.

        Raises:
            BaseException: what `setup` raised, or why the app could not be served.
        """
        serve_until_ended(spawn(self.app, host=self._host, quiet=True), self.__name__)

    def spawn(self) -> AppSpawnInfo:
        """Serve the app on its host and return at once, as `App.spawn` does."""
        return spawn(self.app, host=self._host)

    def run_local(self, *, exposed_port: int | None = None, exposed_metrics_port: int | None = None) -> None:
        """Serve the app in this process, as `App.run_local` does."""
        self.app.run_local(exposed_port=exposed_port, exposed_metrics_port=exposed_metrics_port)

    def __repr__(self) -> str:
        return f"<wrapped app {self.app_name!r}>"


def serve_until_ended(info: AppSpawnInfo, name: str) -> Any:
    """Wait until what was spawned has ended, printing what it says; an interrupt ends it.

    Args:
        info: what was spawned, without a display of its own.
        name: what to call it.

    Returns:
        What its function returned; None for an app, and after an interrupt.

    Raises:
        BaseException: why it could not be served.
    """
    logs = LogPrinter(info.logs)
    try:
        print(f"{name} is served at {info.url}; interrupt to stop", flush=True)  # noqa: T201 - for the person at the keyboard
        return info.future.result()
    except KeyboardInterrupt:
        info.stop()
        return None
    finally:
        logs.close()


def wrap_app(cls: type[App], *, host: Host | str | None = None, **settings: Any) -> WrappedApp:
    """Make an app something that can be called: `fal.wrap_app(MyApp)()` serves it until it is interrupted.

    Args:
        cls: the app.
        host: where to serve it: a host, the name of one, or None for the current one.
        settings: as class keywords of an app; they go before those of the class.

    Raises:
        ValueError: a setting is unknown or contradicts another.
    """
    if settings:
        settings.setdefault("name", cls.app_name)
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        metaclass: Any = type(cls)
        cls = metaclass(cls.__name__, (cls,), body, **settings)
    return WrappedApp(cls, host)
