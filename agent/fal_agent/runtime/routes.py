"""What marks a method of an `App` as a route: `endpoint`, `HealthCheck`, and the mark itself.

Runs wherever user code runs, on the standard library alone. A mark is an attribute of the function,
which stays an ordinary method: it can be called, overridden and pickled as any other.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "HealthCheck",
    "HealthCheckConfig",
    "MarkedMethod",
    "RouteSignature",
    "endpoint",
    "health_check_config",
    "mark",
    "marked_methods",
    "refuse_double_routes",
]

_F = TypeVar("_F", bound="Callable[..., Any]")


class HealthCheck:
    """How the endpoint that is marked with it tells whether the app is well.

    The endpoint is called by POST without arguments; an answer that is not 2xx means that it is not.
    None stands for the default.

    Attributes:
        start_period_seconds: failures of a runner younger than this do not count; default 30, or the
            app's `startup_timeout` if that is larger.
        timeout_seconds: seconds that a check may take; default 5.
        failure_threshold: failures in a row after which the runner is replaced; default 3.
        call_regularly: check every 15 seconds; False: only when a request or an answer asks for it with
            the header `x-fal-runner-health-check`, and then the first failure counts, whenever it comes.
            Default True.
    """

    start_period_seconds: Optional[int] = None
    timeout_seconds: Optional[int] = None
    failure_threshold: Optional[int] = None
    call_regularly: Optional[bool] = None

    def __init__(
        self,
        *,
        start_period_seconds: Optional[int] = None,
        timeout_seconds: Optional[int] = None,
        failure_threshold: Optional[int] = None,
        call_regularly: Optional[bool] = None,
    ) -> None:
        self.start_period_seconds = start_period_seconds
        self.timeout_seconds = timeout_seconds
        self.failure_threshold = failure_threshold
        self.call_regularly = call_regularly
        names = ("failure_threshold", "start_period_seconds")
        unused = [name for name in names if getattr(self, name) is not None]
        if call_regularly is False and unused:
            print(  # noqa: T201 - a note for the person who writes the app, as the fal SDK gives it
                f"Note: {' and '.join(unused)} of a HealthCheck are ignored with call_regularly=False."
            )

    def __hash__(self) -> int:
        return hash(
            (self.start_period_seconds, self.timeout_seconds, self.failure_threshold, self.call_regularly)
        )

    __eq__ = object.__eq__  # by identity, though the hash is of the values

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
        return f"HealthCheck({given})"


@dataclass(frozen=True)
class HealthCheckConfig:
    """The health check of an app: where it is, and the settings of its `HealthCheck`."""

    path: str
    start_period_seconds: Optional[int] = None
    timeout_seconds: Optional[int] = None
    failure_threshold: Optional[int] = None
    call_regularly: Optional[bool] = None
    method: str = "POST"


class RouteSignature(NamedTuple):
    """Where and how a method is served. Hashable: it is the key of `App.collect_routes()`."""

    path: str  # begins with a slash
    is_websocket: bool = False
    health_check: Optional[HealthCheck] = None
    input_modal: Optional[Any] = None  # the type of one input of a realtime route; None: not validated
    output_modal: Optional[Any] = None  # the type of one output of a realtime route
    realtime_mode: Optional[str] = None  # unary, client_streaming, server_streaming, bidi; None: not realtime
    content_type: Optional[str] = None  # of a realtime route's frames; for documentation only
    buffering: Optional[int] = None  # inputs that may wait; None: without limit
    session_timeout: Optional[float] = None  # seconds without an input; None: without limit
    max_batch_size: int = 1  # waiting inputs in one call
    emit_timings: bool = False
    encode_message: Optional[Callable[[Any], bytes]] = None  # None: msgpack
    decode_message: Optional[Callable[[bytes], Any]] = None  # None: msgpack


class MarkedMethod(NamedTuple):
    """A method that is a route."""

    name: str
    function: Callable[..., Any]
    signature: RouteSignature


def endpoint(
    path: str, *, is_websocket: bool = False, health_check: Optional[HealthCheck] = None
) -> Callable[[_F], _F]:
    """Mark a method of an `App` as served at a path, by POST or as a raw websocket.

    Args:
        path: where, beginning with a slash; kept as it is written.
        is_websocket: the method gets the open connection (a parameter annotated `fastapi.WebSocket`)
            and speaks any protocol; it must be `async def`.
        health_check: the endpoint tells whether the app is well; one per app.

    Returns:
        A marker that returns the method itself, which can still be called directly.

    Raises:
        ValueError: the path does not begin with a slash, or (from the marker) the method is a route already.
    """
    _check_path(path)
    signature = RouteSignature(path, is_websocket=is_websocket, health_check=health_check)

    def marker(function: _F) -> _F:
        return mark(function, signature)

    return marker


def mark(function: _F, signature: RouteSignature) -> _F:
    """Make a function a route, and return it.

    Raises:
        ValueError: it is a route already, or the path does not begin with a slash.
    """
    _check_path(signature.path)
    if hasattr(function, "route_signature"):
        name = getattr(function, "__name__", repr(function))
        raise ValueError(f"Can't set multiple routes for the same function: {name}")
    function.route_signature = signature  # type: ignore[attr-defined] # this attribute is the mark
    return function


def marked_methods(cls: type) -> Iterator[MarkedMethod]:
    """Give the routes of a class in the order of their methods' names, inherited ones too."""
    for name in sorted(dir(cls)):
        found = inspect.getattr_static(cls, name, None)
        function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
        signature = getattr(function, "route_signature", None)
        if isinstance(signature, RouteSignature) and callable(function):
            yield MarkedMethod(name, function, signature)


def refuse_double_routes(cls: type) -> None:
    """Refuse two methods at one path; an HTTP route and a websocket route may share one.

    Raises:
        ValueError: naming both methods.
    """
    taken: dict[tuple[str, bool], str] = {}
    for name, _, signature in marked_methods(cls):
        other = taken.setdefault((signature.path, signature.is_websocket), name)
        if other != name:
            raise ValueError(
                f"{cls.__name__}.{other}() and {cls.__name__}.{name}() are both routes at "
                f"{signature.path!r}: only one of them could be reached. Give one of them another path."
            )


def health_check_config(cls: type) -> Optional[HealthCheckConfig]:
    """Give the health check that a class declares; None if it declares none.

    Raises:
        ValueError: more than one is declared, or it is on a websocket.
    """
    found = [method.signature for method in marked_methods(cls) if method.signature.health_check is not None]
    if not found:
        return None
    if len(found) > 1:
        paths = ", ".join(signature.path for signature in found)
        raise ValueError(f"Multiple health check endpoints found: {paths}. An app can have only one.")
    [signature] = found
    check = signature.health_check
    if signature.is_websocket or check is None:
        raise ValueError(
            f"Health check endpoints cannot be websocket endpoints: {signature.path}. "
            "Put the health check on an endpoint without is_websocket=True."
        )
    return HealthCheckConfig(
        path=signature.path,
        start_period_seconds=check.start_period_seconds,
        timeout_seconds=check.timeout_seconds,
        failure_threshold=check.failure_threshold,
        call_regularly=check.call_regularly,
    )


def _check_path(path: str) -> None:
    if not isinstance(path, str) or not path.startswith("/"):
        raise ValueError(
            f"The path of a route begins with a slash, and {path!r} does not; try {f'/{path}'!r}"
        )
