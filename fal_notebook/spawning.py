"""Spawn an `App`, or a function that is served, on a host.

Runs in the notebook. Spawning returns at once; environment, worker and `setup` follow in the background.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError
from fal_agent.serving.signatures import resolved_annotations
from fal_agent.wire import AppSpec, Call, HealthPolicy, Scaling
from fal_notebook import app_registry, config
from fal_notebook.app_files import travelling_files
from fal_notebook.credentials import key_credentials, make_key
from fal_notebook.environment import environment_spec, pydantic_version, serving_needs
from fal_notebook.hosts.registry import get_host
from fal_notebook.options import FunctionOptions, make_options
from fal_notebook.payload import make_parcel, pack_arguments, pack_function
from fal_notebook.run import load_result, start
from fal_notebook.secrets import read_secrets
from fal_notebook.spawned import AppSpawnInfo
from fal_notebook.trips import going_to

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.runtime.app import App
    from fal_notebook.hosts.base import Host, Received

__all__ = ["spawn", "spawn_function"]

_GRACE = 30.0  # seconds
_NOT_OPTIONS = (  # settings that mean something only on fal's own platform, or are looked at elsewhere
    *(
        "app_auth",
        "termination_grace_period_seconds",
        "metrics_port",
        "data_mounts",
        "retry_config",
    ),
    *("request_start_timeout", "requirements_context_dir"),
)


def spawn(cls: type[App], *, host: Host | str | None = None, quiet: bool = False) -> AppSpawnInfo:
    """Serve an app on a host; returns at once.

    An app of the same name that runs there is replaced when this one is ready, without a request being
    dropped; where both need the same environment, the process stays and what is cached in it.

    Args:
        cls: the app.
        host: a host, the name of one, or None for the current one.
        quiet: print nothing of its log: the caller shows what comes in `logs`.

    Raises:
        ValueError: a setting of the app cannot be right.
        ConfigurationError: it asks for a secret that is not set here.
        FalSerializationError: the class uses something that cannot travel.
        FalServerlessError: apps cannot be served there.
        HostError: the host cannot be reached.
    """
    settings = _settings(cls)
    headers, token, accepted = _access(cls)
    grace = cls.host_kwargs.get("termination_grace_period_seconds")
    spec = _spec(
        str(cls.app_name),
        cls.__name__,
        settings,
        auth=cls.app_auth or "",
        secrets=accepted,
        grace=_GRACE if grace is None else float(grace),
    )
    served = _Served(cls, cls.__name__, settings, spec, headers=headers, token=token)
    return _launch(served, get_host(host), quiet=quiet)


def spawn_function(
    function: Callable[..., Any],
    settings: FunctionOptions,
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {}),
    *,
    name: str,
    quiet: bool = False,
) -> AppSpawnInfo:
    """Serve a function on its host; returns at once.

    Args:
        function: with `serve=True` or `exposed_port` among its settings.
        settings: what it needs, and where it is to run.
        arguments: what a function that opens a port itself is called with; others are called by requests.
        name: what it is called on the host, where it replaces what has the same name.
        quiet: as for `spawn`.

    Raises:
        FalServerlessError: its settings ask for what cannot be; or functions cannot be served there.
        FalSerializationError: it uses something that cannot travel.
        HostError: the host cannot be reached.
    """
    settings.check_runnable()
    if settings.serve and any(arguments):
        raise FalServerlessError(
            f"{name} is served (serve=True): its arguments come with each request. Call it without any and "
            f"POST them to its URL; {name}.on(serve=False)(...) calls it"
        )
    port = None if settings.serve else settings.exposed_port
    if port is not None and _has_several(settings, at_least=True):
        raise FalServerlessError(
            f"{name} opens port {port} itself, and of those a host has one: it cannot have more than one "
            "runner. Leave out min_concurrency above 1 and the concurrency buffers"
        )
    served = _Served(
        function,
        name,
        settings,
        _spec(name, f"{name}()", settings, port=port),
        setup_function=settings.setup_function,
        arguments=arguments,
    )
    return _launch(served, get_host(settings.host), quiet=quiet)


@dataclass(frozen=True)
class _Served:
    """What is to be served.

    Attributes:
        target: the class of an app, or a function.
        label: what it is called in messages.
        settings: what it needs.
        spec: how it is served.
        headers: what its callers send along.
        token: of its link.
        setup_function: of a function.
        arguments: positional and named, for a function that opens a port.
    """

    target: Any
    label: str
    settings: FunctionOptions
    spec: AppSpec
    headers: dict[str, str] = field(default_factory=dict)
    token: str = ""
    setup_function: Callable[[], Any] | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


def _launch(served: _Served, where: Host, *, quiet: bool) -> AppSpawnInfo:
    """Send it to a host; returns at once."""
    if not hasattr(where, "connect"):
        raise FalServerlessError(
            f"{where.name!r} is this very process and serves no apps in the background: "
            f"use {served.label}.run_local(), or spawn it on the host 'local'"
        )
    info = AppSpawnInfo(
        where,
        served.spec,
        headers=served.headers,
        token=served.token,
        startup_timeout=served.settings.startup_timeout,
        quiet=quiet,
    )
    parcel = _parcel(served, where)
    info.begin(start(where, parcel, decode=_value, on_event=info.take))
    app_registry.register(served.spec.name, info)
    return info


def _value(received: Received) -> Any:
    """What a run gave: nothing, unless its function has returned."""
    return load_result(received) if received.data else None


def _settings(cls: type[App]) -> FunctionOptions:
    """Check the app's settings as those of a function are checked."""
    options = {name: value for name, value in cls.host_kwargs.items() if name not in _NOT_OPTIONS}
    options.update(
        requirements=cls.requirements or None,
        local_python_modules=cls.local_python_modules or None,
        machine_type=cls.machine_type,
        num_gpus=cls.num_gpus,
        regions=cls.regions,
    )
    settings = make_options(**options)
    if settings.kind != "virtualenv":
        raise FalServerlessError(
            f"apps of kind {settings.kind!r} cannot run yet; say what {cls.__name__} needs in requirements"
        )
    return settings


def _access(cls: type[App]) -> tuple[dict[str, str], str, list[str]]:
    """Give the headers for an app's callers, the token of its link, and digests of what is accepted."""
    if cls.app_auth == "private":
        key = key_credentials() or make_key()
        return key.to_headers(), "", [_digest(f"{key.key_id}:{key.key_secret}")]
    if cls.app_auth == "shared":
        token = secrets.token_urlsafe(24)
        return {"x-fal-token": token}, token, [_digest(token)]
    if cls.app_auth not in (None, "public"):
        raise ValueError(f"app_auth must be 'private', 'shared', 'public' or None, not {cls.app_auth!r}")
    return {}, "", []


def _spec(name: str, label: str, settings: FunctionOptions, **more: Any) -> AppSpec:
    """Say how something is served; `more` are fields of the specification."""
    check = settings.health_check_config
    return AppSpec(
        name=name,
        health=HealthPolicy() if check is None else _health(check),
        request_timeout=settings.request_timeout,
        multiplexing=settings.max_multiplexing if "max_multiplexing" in settings.given else None,
        skip_retry=list(settings.skip_retry_conditions or ()),
        environ=read_secrets(settings.secrets or (), what=label),
        **more,
    )


def _health(check: Any) -> HealthPolicy:
    usual = HealthPolicy()
    return HealthPolicy(
        path=check.path,
        method=check.method,
        start_period=_first(check.start_period_seconds, usual.start_period),
        timeout=_first(check.timeout_seconds, usual.timeout),
        threshold=int(_first(check.failure_threshold, usual.threshold)),
        regularly=check.call_regularly is not False,
    )


def _first(value: float | None, usual: float) -> float:
    return usual if value is None else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parcel(served: _Served, host: Host) -> Any:
    """Put what is served and what it needs together."""
    settings, spec = served.settings, served.spec
    with going_to(host) as trip, resolved_annotations(served.target):
        packed = pack_function(
            served.target,
            served.setup_function,
            local_modules=settings.local_python_modules or (),
            serializer=settings.serializer,
        )
    travelling = travelling_files(served.target, settings)
    known = config.load().host(host.name)
    call = Call(
        kind="app",
        label=served.label,
        function=packed.digest,
        environment=environment_spec(
            settings.requirements,
            python_version=settings.python_version,
            extra=serving_needs(has_gateway=spec.port is not None or _has_several(settings)),
            compile_bytecode=settings.compile_bytecode,
            force=settings.force,
        ),
        resources=settings.resources(),
        scaling=_scaling(served, known.keep_alive),
        startup_timeout=settings.startup_timeout,
        lease=settings.lease_seconds(host_lease=known.lease),
        files=travelling.files,
        import_path=travelling.import_path,
        folder=None if travelling.files else getattr(host, "working_folder", None),
        client=platform.python_version(),
        pydantic=pydantic_version(),
        scale_key=f"app:{spec.name}",
        app=spec,
    )
    args, kwargs = served.arguments
    trip.bring()
    with going_to(host) as trip:
        arguments = pack_arguments(args, kwargs, label=served.label)
    trip.bring()
    return make_parcel(call, packed, arguments, blobs=travelling.blobs)


def _scaling(served: _Served, host_keep_alive: float | None) -> Scaling:
    scaling = served.settings.scaling(host_keep_alive=host_keep_alive)
    return scaling if served.spec.port is None else dataclasses.replace(scaling, max_concurrency=1)


def _has_several(settings: FunctionOptions, *, at_least: bool = False) -> bool:
    """Whether it may have more than one runner, and so a gateway; `at_least`: whether it must."""
    if settings.max_concurrency is not None and not at_least:
        return settings.max_concurrency > 1
    return bool(
        settings.min_concurrency > 1 or settings.concurrency_buffer or settings.concurrency_buffer_perc
    )
