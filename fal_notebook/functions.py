"""`fal.function`: a function that runs on a host and gives its value here.

Runs in the notebook. Decorating contacts nobody; the function, its closure and the globals it uses
are captured when it is called.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import itertools
import os
import platform
import time
from typing import TYPE_CHECKING, Any, overload

from fal_agent.calling import run_coroutine
from fal_agent.errors import FalServerlessError
from fal_agent.runtime.nested import NestedFunction
from fal_agent.wire import Call
from fal_notebook import config, display
from fal_notebook.advice import requirements_change
from fal_notebook.app_files import TravellingFiles, travelling_files
from fal_notebook.environment import (
    check_python,
    environment_spec,
    pydantic_version,
    serving_needs,
    worker_needs,
)
from fal_notebook.hosts.registry import get_host
from fal_notebook.mapping import map_calls
from fal_notebook.options import FunctionOptions, Options, make_options
from fal_notebook.payload import Packed, make_parcel, pack_arguments, pack_function
from fal_notebook.run import Items, Run, follow, start
from fal_notebook.secrets import read_secrets
from fal_notebook.trips import going_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from fal_notebook.hosts.base import Host, Parcel
    from fal_notebook.spawned import AppSpawnInfo

__all__ = ["Function", "function"]


_SETTINGS_SECONDS = 1.0  # after which the host's settings are looked at again
_KEPT_CALLS = 7


_declared: dict[tuple[str, str], list[str]] = {}  # requirement lines by module and name, as declared last


class Function:
    """A function that runs on a host; made by `fal.function`.

    Attributes:
        raw_func: the plain function.
        reraise: errors of the function are raised as themselves; always true.
        app_name: the function's name.
        app_auth: None: functions are reached by nobody but you.
    """

    reraise = True
    app_auth = None

    def __init__(self, raw_func: Callable[..., Any], settings: FunctionOptions) -> None:
        self.__name__ = self.__qualname__ = type(raw_func).__qualname__  # for callables that have no name
        functools.update_wrapper(self, raw_func)
        self.raw_func = raw_func
        self.settings = settings
        self.app_name = getattr(raw_func, "__name__", type(raw_func).__name__)
        self._yields = inspect.isgeneratorfunction(raw_func) or inspect.isasyncgenfunction(raw_func)
        self._calls: dict[Any, tuple[float, Call]] = {}  # what was sent lately, and when it was made
        self._change = _change_of_requirements(self)

    # ------------------------------------------------------------ calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on its host and give its value; what it prints is printed here meanwhile.

        A coroutine function is run to its end. A generator function gives an iterator of its items,
        which arrive as they are produced. A function that is served (`serve=True`) or serves itself
        (`exposed_port`) is reached at the URL that is printed, until it ends or is interrupted.

        Raises:
            BaseException: what the function raised, or one of `fal.exceptions`.
        """
        __tracebackhide__ = True
        if self.settings.is_served:
            from fal_notebook.wrapping import serve_until_ended

            return serve_until_ended(self._serve(args, kwargs, quiet=True), self.app_name)
        host = self.host
        draw = display.drawer(reason=self._change)
        parcel = self._parcel(host, args, kwargs, snapshot=False)
        run = start(host, parcel, attended=not self._yields)
        if self._yields:
            return Items(run, draw)
        return follow(run, draw)

    def submit(self, *args: Any, **kwargs: Any) -> Run:
        """Start a call and return at once; the run is a future of the value, and can be awaited."""
        if self.settings.is_served:
            return self._serve(args, kwargs).future
        host = self.host
        draw = display.background(self.__qualname__, display.comm_bridge())
        return start(host, self._parcel(host, args, kwargs), on_event=draw)

    def spawn(self, *args: Any, **kwargs: Any) -> Any:
        """Start and return at once.

        Returns:
            For a function that is served, or serves itself, an `AppSpawnInfo`: its URL, its logs, its end.
            For any other a run, as `submit` gives it.
        """
        if self.settings.is_served:
            return self._serve(args, kwargs)
        return self.submit(*args, **kwargs)

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, quiet: bool = False) -> AppSpawnInfo:

        from fal_notebook.spawning import spawn_function

        self._refuse_arguments(args, kwargs)
        return spawn_function(self.raw_func, self.settings, (args, kwargs), name=self.app_name, quiet=quiet)

    def _refuse_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.settings.serve and (args or kwargs):
            name = self.app_name
            raise FalServerlessError(
                f"{name} is served (serve=True): its arguments come with each request. Call it without any "
                f"and POST them to its URL; {name}.on(serve=False)(...) calls it"
            )

    async def _aio_value(self, *args: Any, **kwargs: Any) -> Any:
        return await self.submit(*args, **kwargs)

    async def _aio_items(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        items = self(*args, **kwargs)
        end = object()
        try:
            while (item := await asyncio.to_thread(next, items, end)) is not end:
                yield item
        finally:
            items.close()

    def aio(self, *args: Any, **kwargs: Any) -> Any:
        """Give an awaitable of the value; for a generator function, an asynchronous iterator of its items."""
        if self._yields:
            return self._aio_items(*args, **kwargs)
        return self._aio_value(*args, **kwargs)

    def map(
        self,
        *iterables: Iterable[Any],
        ordered: bool = True,
        chunk_size: int | None = None,
        in_flight: int | None = None,
    ) -> Iterator[Any]:
        """Run the function for each item and give the values as they come.

        Args:
            iterables: as for the built-in `map`: one per parameter, read lazily; the shortest ends it.
            ordered: in the order of the items; False gives each value as soon as it is there.
            chunk_size: items of one call; None finds a size that makes a call last about 0.1 s.
            in_flight: calls at once, at most; None is four times the number of the host's cores.

        Raises:
            BaseException: what the function raised, when its item's turn comes. Calls that have not
                ended by then are cancelled, as when the loop is left.
        """
        if self.settings.is_served:
            raise FalServerlessError(
                f"{self.app_name} is served, and has no items: send requests to its URL, or use "
                f"{self.app_name}.on(serve=False, exposed_port=None).map(...)"
            )
        host = self.host
        with going_to(host) as trip:
            packed = self._pack()
        trip.bring()
        arguments = zip(*iterables, strict=False)

        def submit(chunk: list[tuple[Any, ...]], run_started: Callable[[Parcel], Run]) -> Run:
            return run_started(self._parcel(host, (chunk,), {}, kind="map", packed=packed))

        return map_calls(arguments, submit, host, ordered=ordered, chunk_size=chunk_size, in_flight=in_flight)

    def run_local(self, *args: Any, exposed_port: int | None = None, **kwargs: Any) -> Any:
        """Run the plain function in this process: no host, no environment.

        Coroutines are run to their end, also where an event loop is running. Errors come out unchanged.
        With `serve=True` the function is served in this process until it is interrupted.

        Args:
            args: for the function.
            exposed_port: of a function with `serve=True`: where; default 8080; 0 takes a free port.
            kwargs: for the function.

        Raises:
            FalServerlessError: `exposed_port` is given for a function that is not served; or it is in use.
        """
        if self.settings.serve:
            from fal_agent.serving.local import run_local
            from fal_agent.serving.served import servable

            self._refuse_arguments(args, kwargs)
            port = self.settings.exposed_port if exposed_port is None else exposed_port
            run_local(servable(self.raw_func, self.settings.setup_function), port=port)
            return None
        if exposed_port is not None:
            raise FalServerlessError("exposed_port is for served functions; this one is not (serve=False)")
        if self.settings.setup_function is not None:
            args = (self.settings.setup_function(), *args)
        value = self.raw_func(*args, **kwargs)
        return run_coroutine(value) if inspect.iscoroutine(value) else value

    # ------------------------------------------------------------ settings

    def on(self, host: Host | str | None = None, **config: Any) -> Function:
        """Give the same function with other options; this one stays as it is.

        Args:
            host: another host, or its name.
            config: any option of `fal.function`.

        Raises:
            ValueError: as `fal.function`.
        """
        return Function(self.raw_func, self.settings.merged(host=host, **config))

    @property
    def host(self) -> Host:
        """Where the function runs; the notebook's current host unless it was told otherwise.

        Raises:
            ConfigurationError: no host can have the name that was given.
        """
        return get_host(self.settings.host)

    @property
    def options(self) -> Options:
        """The options given, as three dictionaries: `host`, `environment` and `gateway`."""
        return self.settings.views

    def __repr__(self) -> str:
        where = self.settings.host if self.settings.host is not None else "the current host"
        return f"<fal function {self.app_name} on {where}>"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __reduce__(self) -> Any:
        return NestedFunction, (self.raw_func, self.settings.setup_function)

    def __copy__(self) -> Function:
        return Function(self.raw_func, self.settings)

    def __deepcopy__(self, _memo: Any) -> Function:
        return Function(self.raw_func, self.settings)

    # ------------------------------------------------------------ what travels

    def _pack(self) -> Packed:
        return pack_function(
            self.raw_func,
            self.settings.setup_function,
            local_modules=self.settings.local_python_modules or (),
            serializer=self.settings.serializer,
        )

    def _parcel(
        self,
        host: Host,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        kind: str = "function",
        packed: Packed | None = None,
        snapshot: bool = True,
    ) -> Parcel:
        with going_to(host) as trip:
            packed = packed or self._pack()
            arguments = pack_arguments(
                args, kwargs, label=self.__qualname__, func=self.raw_func, snapshot=snapshot
            )
        trip.bring()
        if self.settings.app_files:
            travelling = travelling_files(self.raw_func, self.settings)
            call = self._call(host, kind, packed, travelling)
            return make_parcel(call, packed, arguments, blobs=travelling.blobs)
        if trip.seen and kind == "function":
            call = self._call(host, kind, packed, TravellingFiles())
            home = trip.best_session(call.environment)  # there its values need not be opened
            return make_parcel(dataclasses.replace(call, session=home), packed, arguments)
        environ = read_secrets(self.settings.secrets or (), what=f"{self.__qualname__}()")
        # Equal calls are the same object: the agent then knows all but the arguments already.
        now = time.monotonic()
        key = (
            kind,
            packed.digest,
            packed.reusable,
            host.name,
            getattr(host, "working_folder", None),
            worker_needs(),
            pydantic_version(),
            tuple(environ.items()),
        )
        made = self._calls.get(key)
        if made is None or now - made[0] > _SETTINGS_SECONDS:
            call = self._call(host, kind, packed, TravellingFiles())
            if made is not None and made[1] == call:
                call = made[1]
            others = (item for item in self._calls.items() if item[0] != key)
            self._calls = {key: (now, call), **dict(itertools.islice(others, _KEPT_CALLS))}
        else:
            call = made[1]
        return make_parcel(call, packed, arguments)

    def _call(self, host: Host, kind: str, packed: Packed, travelling: TravellingFiles) -> Call:
        """Say what is to run and what it needs."""
        settings = self.settings
        settings.check_runnable()
        check_python(settings.python_version)
        known = config.load().host(host.name)
        return Call(
            kind=kind,
            label=self.__qualname__,
            function=packed.digest,
            environment=environment_spec(
                settings.requirements,
                python_version=settings.python_version,
                extra=(*worker_needs(), *(serving_needs() if settings.has_served else ())),
                compile_bytecode=settings.compile_bytecode,
                force=settings.force,
            ),
            resources=settings.resources(),
            scaling=settings.scaling(host_keep_alive=known.keep_alive),
            timeout=settings.request_timeout,
            startup_timeout=settings.startup_timeout,
            lease=settings.lease_seconds(host_lease=known.lease),
            files=travelling.files,
            import_path=travelling.import_path,
            folder=None if travelling.files else getattr(host, "working_folder", None),
            client=platform.python_version(),
            pydantic=pydantic_version(),
            scale_key=f"{os.getpid()}:{self.raw_func.__module__}.{self.__qualname__}",
            reusable=packed.reusable,
            environ=read_secrets(settings.secrets or (), what=f"{self.__qualname__}()"),
        )


def _change_of_requirements(function: Function) -> str:
    """Say how a function's requirements differ from those of the one of its name that was declared before."""
    lines = [
        line
        for layer in function.settings.requirements or ()
        for line in ([layer] if isinstance(layer, str) else layer)
    ]
    key = (getattr(function.raw_func, "__module__", None) or "", function.__qualname__)
    before, _declared[key] = _declared.get(key), lines
    return "" if before is None or before == lines else requirements_change(before, lines)


@overload
def function(kind: Callable[..., Any], /) -> Function: ...


@overload
def function(
    kind: str | None = "virtualenv",
    *,
    host: Host | str | None = None,
    local_python_modules: list[str] | None = None,
    **config: Any,
) -> Callable[[Callable[..., Any]], Function]: ...


def function(
    kind: Any = "virtualenv",
    *,
    host: Host | str | None = None,
    local_python_modules: list[str] | None = None,
    **config: Any,
) -> Any:
    """Make a function run on a host: `@fal.function(requirements=["scikit-learn"])`, or bare `@fal.function`.

    Args:
        kind: "virtualenv", the default; "container" and "conda" can be declared but not run yet.
        host: where to run: a host such as `fal.local`, the name of one, or None for the current host.
        local_python_modules: names of local modules that travel with the function.
        config: the options of `fal_notebook.options.FunctionOptions`; among them `requirements` (a list
            of lines, or a list of such lists to install in steps), `python_version`, `machine_type`,
            `num_gpus`, `keep_alive` (seconds), `max_concurrency`, `max_multiplexing`,
            `setup_function`, `request_timeout` (seconds), `lease` (seconds), `app_files`, `secrets`
            (names of environment variables that go along from the notebook or its keyring).

    Raises:
        ValueError: an option is unknown or its value cannot be right.
    """
    if callable(kind):
        return Function(kind, make_options())
    settings = make_options(kind, host=host, local_python_modules=local_python_modules, **config)

    def decorate(func: Callable[..., Any]) -> Function:
        if not callable(func):
            raise TypeError(f"fal.function decorates functions, not {type(func).__name__}")
        return Function(func, settings)

    return decorate
