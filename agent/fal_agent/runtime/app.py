"""`fal.App`: a class whose marked methods are served over HTTP and websockets.

Runs wherever user code runs, on the standard library alone; what serves it (`fal_agent.serving`) is
imported when it is needed. A subclass is a declaration: defining it contacts no machine. It travels by
value while `App` itself travels by reference, so that on the other side it is a subclass of the same.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import time
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Optional, Union

from fal_agent.errors import FalServerlessError
from fal_agent.runtime import app_settings, requests, routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from fal_agent.runtime.requests import RequestContext
    from fal_agent.runtime.routes import HealthCheckConfig, RouteSignature

__all__ = ["DEFAULT_STARTUP_TIMEOUT", "RUNNER_STATE", "App", "BaseServable", "call_hook", "set_launcher"]

DEFAULT_STARTUP_TIMEOUT = 600.0  # seconds that `setup` may take before a warning
RUNNER_STATE = "FAL_RUNNER_STATE"  # environment variable: SETUP, RUNNING, TERMINATING
RUNNER_MARK = "IS_ISOLATE_AGENT"  # environment variable: set where apps may be constructed

_logger = logging.getLogger(__name__)
_launcher: Optional[Callable[..., Any]] = None


def set_launcher(launcher: Optional[Callable[..., Any]]) -> None:
    """Register what `App.spawn()` calls with the class: the notebook's half does, on import."""
    global _launcher  # noqa: PLW0603 - one seam, set once
    _launcher = launcher


def _directly(hook: Callable[[], Any]) -> Any:
    return hook()


# How `setup` and `teardown` are called; what that gives is awaited if it can be. A server sets it.
call_hook: ContextVar[Callable[[Callable[[], Any]], Any]] = ContextVar("fal_call_hook", default=_directly)


class BaseServable:
    """What a server needs of the object that it serves."""

    version: str = "unknown"

    def collect_routes(self) -> dict[RouteSignature, Callable[..., Any]]:
        """Give the bound methods that are routes, ordered by path.

        Raises:
            ValueError: two of them are at one path.
        """
        routes.refuse_double_routes(type(self))
        marked = sorted(routes.marked_methods(type(self)), key=lambda method: method.signature.path)
        return {method.signature: getattr(self, method.name) for method in marked}

    def openapi(self) -> dict[str, Any]:
        """Describe the routes as an OpenAPI document.

        Raises:
            FalServerlessException: it cannot be made; the reason is the `__cause__`.
        """
        document: dict[str, Any] = _serving("http").document(self)
        return document

    def health(self) -> Any:
        """Answer `GET /health`; may be overridden, also by an `async def`."""
        return {"version": self.version}

    def provide_hints(self) -> list[str]:
        """Say what this runner is warm for, for example which weights are loaded; may be overridden.

        Later requests that carry one of the hints as `x-fal-runner-hint` are sent here by preference.
        """
        raise NotImplementedError

    def handle_exit(self) -> None:
        """Be told of SIGTERM or SIGINT, before requests are drained; may be overridden; must be quick."""

    def setup(self) -> Any:
        """Prepare the runner, for example load a model; may be overridden, also by an `async def`."""

    def teardown(self) -> Any:
        """Clean up after the last request; may be overridden, also by an `async def`."""

    @asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[None]:  # noqa: ARG002 - what ASGI servers pass
        """Set up, serve in the body, tear down.

        Args:
            app: the ASGI application; not used.
        """
        os.environ[RUNNER_STATE] = "SETUP"
        requests.prepare_requests(self)
        try:
            with self._current():
                await self._timed_setup()
            os.environ[RUNNER_STATE] = "RUNNING"
            try:
                with self._current():
                    yield
            finally:
                os.environ[RUNNER_STATE] = "TERMINATING"
                with self._current():
                    await _finish(call_hook.get()(self.teardown))
        finally:
            requests.forget_requests(self)

    async def _timed_setup(self) -> None:
        if _logger.isEnabledFor(logging.DEBUG):
            _logger.debug("installed packages: %s", ", ".join(_installed_packages()))
        started = time.monotonic()
        await _finish(call_hook.get()(self.setup))
        seconds = time.monotonic() - started
        allowed = getattr(self, "startup_timeout", None)
        allowed = DEFAULT_STARTUP_TIMEOUT if allowed is None else allowed
        if seconds > allowed:
            print(  # noqa: T201 - into the app's log, as the fal SDK does
                f"WARNING: app setup exceeded startup_timeout: it took {seconds:.1f} of {allowed:g} seconds. "
                "Set startup_timeout on the class, or move slow work out of setup().",
                flush=True,
            )

    @contextmanager
    def _current(self) -> Iterator[None]:
        before = requests.current_app.get()
        requests.current_app.set(self)
        try:
            yield
        finally:
            requests.current_app.set(before)  # not reset: a task may end what another one began


class App(BaseServable):
    """Base class of apps: set class variables, mark methods with `endpoint` or `realtime`, `spawn()`.

    Settings may be class variables or class keywords. Times are in seconds. `host_kwargs` holds those
    that concern the host, merged with what parent classes set; read it, do not write it.
    """

    # the environment
    requirements: Union[list[str], list[list[str]]] = []  # noqa: RUF012 - a list of lists is installed in steps
    local_python_modules: list[str] = []  # noqa: RUF012 - importable local modules that travel by value
    kind: Optional[str] = None  # "virtualenv" (the default), "container" or "conda"
    image: Optional[Any] = None  # a ContainerImage; makes the kind "container"
    # the machine
    machine_type: Union[str, list[str]] = "S"  # alternatives are tried in order
    num_gpus: Optional[int] = None  # None: 1 for a GPU type, else 0
    regions: Optional[list[str]] = None  # labels, one of which the host must carry
    # the app
    app_name: Optional[str] = None  # of a subclass: from its class name, unless it says
    app_auth: Optional[str] = None  # "private", "public" or "shared"
    local_file_path: Optional[str] = None  # the file that defines the class; None in a notebook
    isolate_channel: Optional[Any] = None  # kept for compatibility, stays None
    # files
    app_files: list[str] = []  # noqa: RUF012 - files and folders, relative to the context folder
    app_files_ignore: list[str] = list(app_settings.DEFAULT_APP_FILES_IGNORE)  # noqa: RUF012
    app_files_context_dir: Optional[str] = None  # None: the defining file's folder, or the working one
    # time
    request_timeout: Optional[float] = None  # one request may take so long, then it gets 504
    startup_timeout: Optional[float] = None  # from a ready environment to the end of setup(); None: 600
    request_start_timeout: Optional[float] = None
    termination_grace_period_seconds: Optional[float] = None  # between SIGTERM and SIGKILL; None: 30
    # runners
    min_concurrency: Optional[int] = None  # runners that never end for being idle; None: 0
    max_concurrency: Optional[int] = None  # runners at most
    concurrency_buffer: Optional[int] = None  # spare runners; None: 0
    concurrency_buffer_perc: Optional[int] = None  # spare runners, as percent of requests in flight
    scaling_delay: Optional[float] = None  # a request waits so long before one more runner starts
    max_multiplexing: Optional[int] = None  # requests at once in one runner; None: 1
    skip_retry_conditions: Optional[list[str]] = None  # of "timeout", "server_error", "connection_error"
    # more
    secrets: Optional[list[str]] = None  # environment variables that go along from the notebook
    metrics_port: Optional[int] = None
    data_mounts: Optional[Any] = None
    retry_config: Optional[Any] = None
    requirements_context_dir: Optional[str] = None

    host_kwargs: dict[str, Any] = dict(app_settings.DEFAULT_HOST_KWARGS)  # noqa: RUF012

    def __init_subclass__(cls, *, name: Optional[str] = None, **keywords: Any) -> None:
        """Check and merge the settings of a subclass.

        Args:
            name: the app's name; default: made from the class name.
            keywords: settings, named as the class variables; also `keep_alive` and `resolver`.

        Raises:
            ValueError: a setting is unknown or contradicts another, `__init__` is overridden, two methods
                are at one path, or the health check is not one.
        """
        super().__init_subclass__()
        if app_settings.being_unpickled():
            return
        app_settings.check_keywords(keywords)
        if cls.__init__ is not App.__init__:
            raise ValueError(
                f"{cls.__name__} overrides __init__, which would run where the app is declared. "
                "Override setup() instead: it runs once in each runner, before the first request."
            )
        cls.app_name = app_settings.app_name(cls, name)
        cls.host_kwargs = app_settings.merge_settings(cls, keywords)
        app_settings.refuse_contradictions(cls)
        routes.refuse_double_routes(cls)
        cls.host_kwargs["health_check_config"] = routes.health_check_config(cls)

    def __init__(self, *, _allow_init: bool = False) -> None:
        if not _allow_init and not os.environ.get(RUNNER_MARK):
            name = type(self).__name__
            raise NotImplementedError(
                f"{name} is not constructed here: {name}.spawn() runs it on a host, {name}.run_local() in "
                f"this process. To call its methods directly, as in a test: {name}(_allow_init=True)."
            )

    @classmethod
    def get_endpoints(cls) -> list[str]:
        """Give the paths of all routes, in the order of their methods' names."""
        return [method.signature.path for method in routes.marked_methods(cls)]

    @classmethod
    def get_health_check_config(cls) -> Optional[HealthCheckConfig]:
        """Give the health check that an endpoint declares; None if none does."""
        config: Optional[HealthCheckConfig] = cls.host_kwargs.get("health_check_config")
        return config

    @property
    def current_request(self) -> Optional[RequestContext]:
        """The request that is being answered here: empty outside a request, None if not being served."""
        return requests.current_request(self)

    @classmethod
    def spawn(cls, **options: Any) -> Any:
        """Serve the app on a host; returns at once with a handle that has the URL and the logs.

        Args:
            options: as the launcher of the notebook's half takes them.

        Raises:
            FalServerlessError: this process is not a notebook's.
        """
        if _launcher is None:
            raise FalServerlessError(
                f"{cls.__name__} cannot be spawned here: apps are spawned from a notebook, "
                "after `import fal_notebook`. run_local() serves it in this process."
            )
        return _launcher(cls, **options)

    @classmethod
    def run_local(
        cls, *, exposed_port: Optional[int] = None, exposed_metrics_port: Optional[int] = None
    ) -> None:
        """Serve the app in this process, on the loopback address, until it is interrupted.

        Nothing is installed. Works in a notebook too, where the kernel's interrupt ends it; on a thread other
        than the main one it gets no signals.

        Args:
            exposed_port: port of the app; default 8080; 0 takes a free one. The URL is printed.
            exposed_metrics_port: port of the metrics, at `/metrics`; default 9090; 0 takes a free one.

        Raises:
            FalServerlessError: a port is in use.
            ValueError: the app has no routes.
        """
        before = os.environ.get(RUNNER_MARK)
        os.environ[RUNNER_MARK] = "1"
        try:
            _serving("local").run_local(cls(), port=exposed_port, metrics_port=exposed_metrics_port)
        finally:
            if before is None:
                os.environ.pop(RUNNER_MARK, None)
            else:
                os.environ[RUNNER_MARK] = before


def _installed_packages() -> list[str]:
    from importlib import metadata

    return sorted({f"{found.metadata['Name']}=={found.version}" for found in metadata.distributions()})


async def _finish(value: Any) -> Any:
    """Await what a hook gave, if it is `async def`."""
    return await value if inspect.isawaitable(value) else value


def _serving(module: str) -> Any:
    """Import the part that serves: it needs fastapi and uvicorn, and stands above this one."""
    try:
        return importlib.import_module(f"fal_agent.serving.{module}")
    except ModuleNotFoundError as error:
        raise FalServerlessError(
            f"apps are served with fastapi and uvicorn, and {error.name!r} is not installed here; "
            "install it, or add it to the app's requirements"
        ) from error
