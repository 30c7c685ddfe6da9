"""The options of `fal.function`: their names, defaults, checks, and what they ask of a host.

Runs in the notebook. Options are checked when a function is decorated, without contacting a
machine; a `FunctionOptions` is therefore always valid by itself. What only a host can decide (has
it such a GPU?) is decided at the call.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError
from fal_agent.wire import Resources, Scaling
from fal_notebook import checks, secrets
from fal_notebook.environment import serving_needs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.runtime.routes import HealthCheckConfig
    from fal_notebook.hosts.base import Host

__all__ = [
    "DEFAULT_APP_FILES_IGNORE",
    "DEFAULT_KEEP_ALIVE",
    "DEFAULT_LEASE",
    "FAL_KEEP_ALIVE",
    "KINDS",
    "FunctionOptions",
    "Options",
    "make_options",
]

FAL_KEEP_ALIVE = 10.0  # seconds; what the fal platform uses when `keep_alive` is not given
DEFAULT_KEEP_ALIVE = 300.0  # seconds; longer than fal's, since one's own machine is paid for already
DEFAULT_LEASE = 86400.0  # seconds
DEFAULT_APP_FILES_IGNORE = (r"\.pyc$", r"__pycache__/", r"\.git/", r"\.DS_Store$")
KINDS = ("virtualenv", "container", "conda")

_MAX_PORT = 65535
_CONDA_KEYS = ("env_dict", "env_yml", "env_yml_str", "packages", "pip", "channels")
_ENVIRONMENT_KEYS = (
    *("kind", "requirements", "python_version", "compile_bytecode", "force", "resolver", "image"),
    *("local_python_modules", *_CONDA_KEYS),
)
_GATEWAY_KEYS = ("serve", "exposed_port")
_ALIASES = {"force_env_build": "force"}
_MEANT = {"timeout": "request_timeout", "gpu": "num_gpus", "gpus": "num_gpus"}  # where spelling misleads


@dataclass
class Options:
    """The options that were given, in the three groups of the fal SDK.

    Attributes:
        host: what is asked of the machine and of the pool of workers.
        environment: what the workers' environment holds.
        gateway: how the function is served, if it is.
    """

    host: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    gateway: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FunctionOptions:
    """All options of one function; made by `make_options`, which checks them.

    Times are in seconds. Options that mean something only on fal's own platform (`metadata`,
    `private_logs`, `machine_types` and those with a leading underscore) are kept and have no effect.
    """

    # where
    host: Host | str | None = None  # a host, the name of one, or None: the current default host
    # the environment
    kind: str = "virtualenv"
    requirements: list[str] | list[list[str]] | None = None  # a list of lists is installed in steps
    python_version: str | None = None  # "X.Y"; None: the notebook's
    compile_bytecode: bool = False  # compile packages when they are installed: slower build, quicker start
    force: bool = False  # build the environment anew even if it is known; also `force_env_build`
    resolver: str | None = None  # "uv" or "pip", for compatibility: uv does the work
    local_python_modules: list[str] | None = None  # importable modules that travel by value
    image: Any = None  # a ContainerImage; makes the kind "container"
    env_dict: dict[str, Any] | None = None
    env_yml: str | None = None
    env_yml_str: str | None = None
    packages: list[str] | None = None
    pip: list[str] | None = None
    channels: list[str] | None = None
    # the machine
    machine_type: str | list[str] = "XS"  # alternatives are tried in order
    num_gpus: int | None = None  # None: 1 for a GPU type, else 0
    regions: list[str] | None = None  # labels, one of which the host must carry
    # workers
    keep_alive: float | None = None  # an idle worker's life; None: the host's, else DEFAULT_KEEP_ALIVE
    min_concurrency: int = 0  # workers that never end for being idle
    max_concurrency: int | None = None  # workers at most; None: as many as the host carries
    concurrency_buffer: int = 0  # spare workers
    concurrency_buffer_perc: int = 0  # spare workers, as percent of calls in flight
    scaling_delay: float | None = None  # a call waits so long before one more worker starts; None: 0
    max_multiplexing: int = 1  # calls at once in one worker
    setup_function: Callable[[], Any] | None = None  # once per worker; its value is the first argument
    # the call
    request_timeout: float | None = None  # a call may run so long; None: without limit
    startup_timeout: float | None = None  # from a ready environment to a ready worker; None: the agent's
    lease: float | None = None  # a run's life without any client; None: the host's, else DEFAULT_LEASE
    serializer: str = "cloudpickle"  # or "dill"
    secrets: list[str] | None = None  # environment variables that go along from the notebook
    # files
    app_files: list[str] = field(default_factory=list)  # files and folders, relative to the context folder
    app_files_ignore: list[str] = field(default_factory=lambda: list(DEFAULT_APP_FILES_IGNORE))
    app_files_context_dir: str | None = None  # None: the defining file's folder, or the working folder
    # serving
    serve: bool = False  # the function is reached by HTTP: POST / calls it
    exposed_port: int | None = None  # the function runs a server on this port of the host
    health_check_config: HealthCheckConfig | dict[str, Any] | None = None  # what is asked, and how often
    skip_retry_conditions: list[str] | None = None  # in which a request is not sent to another runner
    # kept, without effect
    metadata: dict[str, Any] | None = None
    private_logs: Any = None
    machine_types: Any = None
    _base_image: Any = None
    _scheduler: Any = None
    _scheduler_options: Any = None

    has_served: bool = field(default=False, repr=False)  # what serving needs is in the environment
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)  # names set on purpose

    @property
    def views(self) -> Options:
        """The options that were given, and the kind, in the fal SDK's three groups.

        Among the requirements of a function that is served, or was before `on(serve=False)`, are those of
        serving.
        """
        views = Options()
        for name in sorted(self.given | {"kind"}):
            group = views.host
            if name in _GATEWAY_KEYS:
                group = views.gateway
            elif name in _ENVIRONMENT_KEYS:
                group = views.environment
            group[name] = getattr(self, name)
        if self.has_served:
            views.environment["requirements"] = _with_more(self.requirements, serving_needs())
        return views

    def merged(self, host: Host | str | None = None, **config: Any) -> FunctionOptions:
        """Give new options: these, overruled by others, as `f.on(...)` wants them.

        Args:
            host: another host; None keeps this one.
            config: any option of `make_options`; None brings an option's default back.

        Raises:
            ValueError: as `make_options`.
        """
        kept = {name: getattr(self, name) for name in self.given}
        new = {_ALIASES.get(name, name): value for name, value in config.items()}
        if "image" in new:
            kept.pop("kind", None)  # the kind followed from the old image
        elif new.get("kind", "container") != "container":
            kept.pop("image", None)  # or the old image would make it a container again
        made = make_options(**{**kept, **new, "host": self.host if host is None else host})
        return dataclasses.replace(made, has_served=self.has_served or made.serve)

    @property
    def is_served(self) -> bool:
        """Whether the function is reached at a URL, and not called."""
        return self.serve or self.exposed_port is not None

    def resources(self) -> Resources:
        """What a call asks of the machine."""
        types = [self.machine_type] if isinstance(self.machine_type, str) else list(self.machine_type)
        return Resources(machine_types=types, num_gpus=self.num_gpus, regions=self.regions)

    def scaling(self, *, host_keep_alive: float | None = None) -> Scaling:
        """How many workers serve the function, and for how long.

        Args:
            host_keep_alive: seconds that the host's settings give, used when the function says nothing.
        """
        return Scaling(
            keep_alive=_first(self.keep_alive, host_keep_alive, DEFAULT_KEEP_ALIVE),
            min_concurrency=self.min_concurrency,
            max_concurrency=self.max_concurrency,
            concurrency_buffer=self.concurrency_buffer,
            concurrency_buffer_perc=self.concurrency_buffer_perc,
            scaling_delay=_first(self.scaling_delay, 0.0),
            max_multiplexing=self.max_multiplexing,
        )

    def lease_seconds(self, *, host_lease: float | None = None) -> float:
        """Seconds that a run may go on while no client of it is connected.

        Args:
            host_lease: seconds that the host's settings give, used when the function says nothing.
        """
        return _first(self.lease, host_lease, DEFAULT_LEASE)

    def check_runnable(self) -> None:
        """Refuse, at the call, what can be declared but not yet run.

        Raises:
            FalServerlessError: the kind is not "virtualenv".
        """
        if self.kind != "virtualenv":
            raise FalServerlessError(
                f"functions of kind {self.kind!r} cannot run yet; use kind='virtualenv' "
                "and say what the function needs in requirements=[...]"
            )


def make_options(
    kind: str | None = "virtualenv",
    *,
    host: Host | str | None = None,
    local_python_modules: list[str] | None = None,
    **config: Any,
) -> FunctionOptions:
    """Check the options of `fal.function`; what is None or not given has its default.

    Args:
        kind: "virtualenv", "container" or "conda"; `image=` makes it "container".
        host: where to run: a host, the name of one, or None for the current default host.
        local_python_modules: names of importable local modules that travel by value.
        config: every other field of `FunctionOptions`; `force_env_build` is another name of `force`.

    Raises:
        ValueError: an option is unknown or its value cannot be right.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"Unknown environment kind {kind!r}; the kinds are {checks.listed(KINDS)}.")
    given: dict[str, Any] = {"host": host, "local_python_modules": local_python_modules}
    if kind != "virtualenv":
        given["kind"] = kind
    for name, value in config.items():
        if name not in _CHECKS and name not in _ALIASES:
            raise ValueError(_unrecognised(name))
        given[_ALIASES.get(name, name)] = value
    checked = {name: _CHECKS[name](name, value) for name, value in given.items() if value is not None}
    if "image" in checked:
        checked["kind"] = "container"
    options = FunctionOptions(**checked, has_served=checked.get("serve", False), given=frozenset(checked))
    _check_together(options)
    return options


def _unrecognised(name: str) -> str:
    close = [_MEANT[name]] if name in _MEANT else difflib.get_close_matches(name, [*_CHECKS, *_ALIASES], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unrecognised option {name!r}.{hint}"


def _check_together(options: FunctionOptions) -> None:
    """Refuse options that exclude each other."""
    conda = options.kind == "conda"
    remedy = "packages=[...] or pip=[...]" if conda else "requirements=[...]"
    for name in ("requirements",) if conda else _CONDA_KEYS:
        if name in options.given:
            raise ValueError(
                f"Unsupported option {name!r} for environment kind {options.kind!r}; use {remedy} instead."
            )
    if options.kind == "container" and options.app_files:
        raise ValueError("app_files cannot be used with kind 'container'; copy the files in the Dockerfile.")
    if options.max_concurrency is not None and options.max_concurrency < options.min_concurrency:
        raise ValueError(
            f"max_concurrency ({options.max_concurrency}) must not be smaller than "
            f"min_concurrency ({options.min_concurrency})."
        )


def _with_more(requirements: list[str] | list[list[str]] | None, more: tuple[str, ...]) -> list[Any]:
    """Give requirements with more of them, in the last step if there are steps."""
    if requirements and isinstance(requirements[-1], list):
        return [*requirements[:-1], [*requirements[-1], *more]]
    return [*(requirements or ()), *more]


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


_CHECKS: dict[str, checks.Check] = {
    "host": checks.host,
    "kind": checks.one_of(KINDS),
    "requirements": checks.requirements,
    "python_version": checks.python_version,
    "compile_bytecode": checks.flag,
    "force": checks.flag,
    "resolver": checks.one_of(("uv", "pip")),
    "local_python_modules": checks.strings,
    "image": checks.anything,
    "env_dict": checks.mapping,
    "env_yml": checks.path,
    "env_yml_str": checks.text,
    "packages": checks.strings,
    "pip": checks.strings,
    "channels": checks.strings,
    "machine_type": checks.machine_type,
    "num_gpus": checks.whole(0),
    "regions": checks.strings,
    "keep_alive": checks.seconds(positive=False),
    "min_concurrency": checks.whole(0),
    "max_concurrency": checks.whole(1),
    "concurrency_buffer": checks.whole(0),
    "concurrency_buffer_perc": checks.whole(0),
    "scaling_delay": checks.seconds(positive=False),
    "max_multiplexing": checks.whole(1),
    "setup_function": checks.function,
    "request_timeout": checks.seconds(positive=True),
    "startup_timeout": checks.seconds(positive=True),
    "lease": checks.seconds(positive=False),
    "serializer": checks.one_of(("cloudpickle", "dill")),
    "secrets": secrets.check_names,
    "app_files": checks.paths,
    "app_files_ignore": checks.patterns,
    "app_files_context_dir": checks.path,
    "serve": checks.flag,
    "exposed_port": checks.whole(1, _MAX_PORT),
    "health_check_config": checks.health_check,
    "skip_retry_conditions": checks.some_of(("timeout", "server_error", "connection_error")),
    "metadata": checks.mapping,
    "private_logs": checks.anything,
    "machine_types": checks.anything,
    "_base_image": checks.anything,
    "_scheduler": checks.anything,
    "_scheduler_options": checks.anything,
}
