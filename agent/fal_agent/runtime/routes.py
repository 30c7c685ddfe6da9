"""What marks a method of an app as a route.

Runs wherever user code runs. The mark is one attribute, `route_signature`, on an ordinary function.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

__all__ = ["RouteSignature", "mark"]


class RouteSignature(NamedTuple):
    """One route of an app; hashable, and the key of `App.collect_routes()`."""

    path: str
    is_websocket: bool = False
    health_check: Optional[Any] = None
    input_modal: Optional[Any] = None
    output_modal: Optional[Any] = None
    realtime_mode: Optional[str] = None
    content_type: Optional[str] = None
    buffering: Optional[int] = None
    session_timeout: Optional[float] = None
    max_batch_size: int = 1
    emit_timings: bool = False
    encode_message: Optional[Any] = None
    decode_message: Optional[Any] = None


def mark(function: Any, signature: RouteSignature) -> None:
    """Set the mark.

    Raises:
        ValueError: the function has a route, or the path has no leading slash.
    """
    if hasattr(function, "route_signature"):
        raise ValueError(
            f"Can't set multiple routes for the same function: {function.__qualname__} has "
            f"{function.route_signature.path!r} and would get {signature.path!r}"
        )
    if not signature.path.startswith("/"):
        raise ValueError(f"a path starts with a slash: {signature.path!r}")
    function.route_signature = signature
