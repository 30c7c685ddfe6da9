"""The request that is being answered, and the app that answers it, as context variables.

Runs wherever an `App` is served, on the standard library alone. Concurrent requests, in threads or
tasks, each see their own. Nothing is kept on the app itself, so that its instances can be pickled.
"""

from __future__ import annotations

import functools
import json
import random
import uuid
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "REQUEST_ID_HEADER",
    "RequestContext",
    "answering",
    "context_from_headers",
    "current_app",
    "current_request",
    "current_request_id",
    "forget_requests",
    "get_current_app",
    "prepare_requests",
]

REQUEST_ID_HEADER = "x-fal-request-id"
_LONGEST_ID = 128  # characters; a longer one is not an id, and would be in every log line


@dataclass(frozen=True)
class RequestContext:
    """What is known about the request that is being answered.

    Attributes:
        request_id: header `x-fal-request-id`, or the id that was made for the request; None outside one.
        endpoint: header `x-fal-endpoint`.
        lifecycle_preference: header `x-fal-object-lifecycle-preference`, read as JSON.
        headers: all headers of the request, with lower-case names.
    """

    request_id: Optional[str] = None
    endpoint: Optional[str] = None
    lifecycle_preference: Optional[Any] = None
    headers: dict[str, str] = field(default_factory=dict)


current_app: ContextVar[Optional[Any]] = ContextVar("fal_current_app", default=None)
current_request_id: ContextVar[Optional[str]] = ContextVar("fal_current_request_id", default=None)

_variables: dict[int, ContextVar[RequestContext]] = {}  # by the identity of the app
_served: dict[int, weakref.ref[Any]] = {}  # likewise


def get_current_app() -> Any:
    """Give the app that is answering the current request, or being set up or torn down.

    Elsewhere, for example in a thread that the app's `setup` started, it is the one app that this process
    serves; None if it serves none or several.
    """
    app = current_app.get()
    if app is None and len(_served) == 1:
        [reference] = list(_served.values())
        app = reference()
    return app


def current_request(app: Any) -> Optional[RequestContext]:
    """Give the request that an app is answering here.

    Returns:
        None if the app is not being served; an empty context between requests.
    """
    variable = _variables.get(id(app))
    return None if variable is None else variable.get()


def prepare_requests(app: Any) -> None:
    """Begin to keep the requests of an app apart: called once, before it is set up."""
    if id(app) not in _served:
        _served[id(app)] = weakref.ref(app, partial(_forget_dead, id(app)))
    _variables[id(app)] = ContextVar("fal_current_request", default=RequestContext())  # noqa: B039 - frozen


def forget_requests(app: Any) -> None:
    """Undo `prepare_requests`: called once, after the app has been torn down."""
    _forget(id(app))


def _forget_dead(key: int, _reference: weakref.ref[Any]) -> None:
    _forget(key)


def _forget(key: int) -> None:
    _served.pop(key, None)
    _variables.pop(key, None)


@contextmanager
def answering(app: Any, context: Optional[RequestContext], request_id: str) -> Iterator[None]:
    """Make an app and its request the current ones.

    Args:
        app: the app that answers.
        context: the request; None for a websocket, which is not one.
        request_id: what log lines are labelled with.
    """
    variable = _variables.get(id(app))
    before = current_app.set(app), current_request_id.set(request_id)
    request = variable.set(context) if variable is not None and context is not None else None
    try:
        yield
    finally:
        if variable is not None and request is not None:
            variable.reset(request)
        current_request_id.reset(before[1])
        current_app.reset(before[0])


def context_from_headers(headers: Mapping[str, str]) -> RequestContext:
    """Read the request's context from its headers (lower-case names); an id is made if there is none."""
    request_id = headers.get(REQUEST_ID_HEADER, "")
    if not (0 < len(request_id) <= _LONGEST_ID and request_id.isascii() and request_id.isprintable()):
        request_id = _new_id()
    return RequestContext(
        request_id=request_id,
        endpoint=headers.get("x-fal-endpoint"),
        lifecycle_preference=_json(headers.get("x-fal-object-lifecycle-preference")),
        headers=dict(headers),
    )


def _new_id() -> str:
    return str(uuid.UUID(int=_numbers().getrandbits(128), version=4))


@functools.cache
def _numbers() -> random.Random:
    """Give a source of numbers for ids, which need not be secret.

    Asking the system for each lets go of the interpreter's lock, and a busy handler's thread then keeps the
    event loop waiting for milliseconds. It is not the source that an app's `random.seed` would set back.
    """
    return random.Random()  # noqa: S311 - see above


def _json(text: Optional[str]) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None  # a header that cannot be read states no preference
