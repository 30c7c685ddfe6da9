"""Spawn an `App` on a host: what `App.spawn()` calls.

Runs in the notebook. Spawning returns at once; environment, worker and `setup` follow in the background.
"""

from __future__ import annotations

import hashlib
import platform
import secrets
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError
from fal_agent.serving.signatures import resolved_annotations
from fal_agent.wire import AppSpec, Call, HealthPolicy
from fal_notebook import app_registry, config
from fal_notebook.credentials import key_credentials, make_key
from fal_notebook.environment import environment_spec
from fal_notebook.functions import pydantic_version
from fal_notebook.hosts.registry import get_host
from fal_notebook.options import FunctionOptions, make_options
from fal_notebook.payload import make_parcel, pack_arguments, pack_function
from fal_notebook.run import start
from fal_notebook.secrets import check_names, read_secrets
from fal_notebook.spawned import AppSpawnInfo
from fal_notebook.sync import collect_app_files, read_app_files

if TYPE_CHECKING:
    from fal_agent.runtime.app import App
    from fal_notebook.hosts.base import Host

__all__ = ["spawn"]

_GRACE = 30.0  # seconds
_NEEDS = (
    *("fastapi>=0.115", "uvicorn>=0.32", "websockets>=15", "msgpack>=1.0"),
    *("httptools>=0.6", "uvloop>=0.21"),  # a third less time for a small request
)
_GATEWAY_NEEDS = ("httpx>=0.27",)
_NOT_OPTIONS = (  # settings that mean something only on fal's own platform, or are looked at elsewhere
    *(
        "app_auth",
        "secrets",
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
    where = get_host(host)
    if not hasattr(where, "connect"):
        raise FalServerlessError(
            f"{where.name!r} is this very process and serves no apps in the background: "
            f"use {cls.__name__}.run_local(), or spawn it on the host 'local'"
        )
    settings = _settings(cls)
    spec, headers, token = _spec(cls, settings)
    info = AppSpawnInfo(
        where,
        spec,
        headers=headers,
        token=token,
        startup_timeout=settings.startup_timeout,
        quiet=quiet,
    )
    parcel = _parcel(cls, where, settings, spec)
    info.begin(start(where, parcel, decode=lambda _: None, on_event=info.take))
    app_registry.register(spec.name, info)
    return info


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


def _spec(cls: type[App], settings: FunctionOptions) -> tuple[AppSpec, dict[str, str], str]:
    """Say how the app is served; give that, the headers for its callers, and the token of its link."""
    headers: dict[str, str] = {}
    accepted: list[str] = []
    token = ""
    if cls.app_auth == "private":
        key = key_credentials() or make_key()
        headers = key.to_headers()
        accepted = [_digest(f"{key.key_id}:{key.key_secret}")]
    elif cls.app_auth == "shared":
        token = secrets.token_urlsafe(24)
        accepted = [_digest(token)]
        headers = {"x-fal-token": token}
    elif cls.app_auth not in (None, "public"):
        raise ValueError(f"app_auth must be 'private', 'shared', 'public' or None, not {cls.app_auth!r}")
    check = cls.get_health_check_config()
    grace = cls.host_kwargs.get("termination_grace_period_seconds")
    spec = AppSpec(
        name=str(cls.app_name),
        auth=cls.app_auth or "",
        secrets=accepted,
        health=HealthPolicy() if check is None else _health(check),
        request_timeout=settings.request_timeout,
        multiplexing=settings.max_multiplexing if "max_multiplexing" in settings.given else None,
        grace=_GRACE if grace is None else float(grace),
        skip_retry=list(settings.skip_retry_conditions or ()),
        environ=read_secrets(check_names("secrets", cls.host_kwargs.get("secrets") or []), what=cls.__name__),
    )
    return spec, headers, token


def _health(check: Any) -> HealthPolicy:
    usual = HealthPolicy()
    return HealthPolicy(
        path=check.path,
        start_period=_first(check.start_period_seconds, usual.start_period),
        timeout=_first(check.timeout_seconds, usual.timeout),
        threshold=int(_first(check.failure_threshold, usual.threshold)),
        regularly=check.call_regularly is not False,
    )


def _first(value: float | None, usual: float) -> float:
    return usual if value is None else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parcel(cls: type[App], host: Host, settings: FunctionOptions, spec: AppSpec) -> Any:
    """Put the class and what it needs together."""
    with resolved_annotations(cls):
        packed = pack_function(
            cls, local_modules=settings.local_python_modules or (), serializer=settings.serializer
        )
    files, blobs = read_app_files(
        collect_app_files(
            settings.app_files,
            ignore=settings.app_files_ignore,
            context_dir=settings.app_files_context_dir,
        )
    )
    known = config.load().host(host.name)
    call = Call(
        kind="app",
        label=cls.__name__,
        function=packed.digest,
        environment=environment_spec(
            settings.requirements,
            python_version=settings.python_version,
            extra=_needs(settings),
            compile_bytecode=settings.compile_bytecode,
            force=settings.force,
        ),
        resources=settings.resources(),
        scaling=settings.scaling(host_keep_alive=known.keep_alive),
        startup_timeout=settings.startup_timeout,
        lease=settings.lease_seconds(host_lease=known.lease),
        files=files,
        folder=None if files else getattr(host, "working_folder", None),
        client=platform.python_version(),
        pydantic=pydantic_version(),
        scale_key=f"app:{spec.name}",
        app=spec,
    )
    return make_parcel(call, packed, pack_arguments((), {}), blobs=blobs)


def _needs(settings: FunctionOptions) -> tuple[str, ...]:
    """What serving needs in the app's environment; pydantic as in the notebook, since models travel."""
    version = pydantic_version()
    major = int(version.partition(".")[0]) if version else 2
    gateway = _GATEWAY_NEEDS if _has_several(settings) else ()
    return (*_NEEDS, *gateway, f"pydantic>={major},<{major + 1}")


def _has_several(settings: FunctionOptions) -> bool:
    """Whether the app may have more than one runner, and so a gateway."""
    if settings.max_concurrency is not None:
        return settings.max_concurrency > 1
    return bool(
        settings.min_concurrency > 1 or settings.concurrency_buffer or settings.concurrency_buffer_perc
    )
