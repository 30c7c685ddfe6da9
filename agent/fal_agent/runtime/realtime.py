"""`fal.realtime`: mark a method as an endpoint that answers each message of a websocket.

Runs wherever user code runs. Everything about the endpoint (its mode and its models) is known from the
method's annotations when it is decorated; serving it is `fal_agent.serving.realtime`'s part.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections import abc
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from fal_agent.runtime.routes import RouteSignature, mark

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["realtime"]


class _Unset:
    """The type of the default of `input_modal` and `output_modal`: take it from the annotations."""

    def __repr__(self) -> str:
        return "<from the annotations>"

    def __reduce__(self) -> str:
        return "_UNSET"


_UNSET: Any = _Unset()
_ASYNC_STREAMS = (abc.AsyncIterator, abc.AsyncGenerator, abc.AsyncIterable)
_STREAMS = (abc.Iterator, abc.Generator, abc.Iterable)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_UNIONS = (typing.Union, getattr(types, "UnionType", typing.Union))  # the second since Python 3.10


class _Shape(NamedTuple):
    """What the annotations of a handler say."""

    mode: str
    input_model: Any
    output_model: Any


def realtime(
    path: str,
    *,
    buffering: Optional[int] = None,
    session_timeout: Optional[float] = None,
    input_modal: Any = _UNSET,
    output_modal: Any = _UNSET,
    max_batch_size: int = 1,
    content_type: str = "application/msgpack",
    encode_message: Optional[Callable[[Any], Any]] = None,
    decode_message: Optional[Callable[[bytes], Any]] = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a method as a websocket endpoint that runs once for each message, or as a stream of them.

    The annotations decide: an `AsyncIterator` as the method's input lets the client send a stream, an
    iterator as its return value lets the endpoint send one. The marked method cannot be called with an
    input; `App.method.original_func(app, input)` can.

    Args:
        path: where clients connect, with a leading slash.
        buffering: how many inputs may wait while the handler is busy; a further one pushes out the
            oldest, so 1 means "always the newest". None keeps all.
        session_timeout: seconds without an input after which the session ends; None is no limit.
        input_modal: the pydantic model of inputs; None for none; by default, what the annotation says.
        output_modal: the same of outputs.
        max_batch_size: how many waiting inputs one call may take, as positional arguments; for a handler
            that neither takes nor gives a stream.
        content_type: what clients are told that messages are; it does not choose a codec.
        encode_message: makes the bytes of an output (`async` or not); None is msgpack.
        decode_message: opens the bytes of an input (`async` or not); None is msgpack.

    Raises:
        ValueError: an option makes no sense, or the method is marked already or takes no input.
        NameError: an annotation written as a string names what is not known at the module's top level.
    """
    _check_number("buffering", buffering, whole=True)
    _check_number("session_timeout", session_timeout, whole=False)
    _check_number("max_batch_size", max_batch_size, whole=True, needed=True)
    if not isinstance(content_type, str) or not content_type:
        raise ValueError(
            f"content_type must be a media type such as 'application/json', not {content_type!r}"
        )
    for name, codec in (("encode_message", encode_message), ("decode_message", decode_message)):
        if codec is not None and not callable(codec):
            raise ValueError(f"{name} must be a function or None, not {codec!r}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        shape = _shape_of(function)
        signature = RouteSignature(
            path=path,
            is_websocket=True,
            input_modal=shape.input_model if input_modal is _UNSET else input_modal,
            output_modal=shape.output_model if output_modal is _UNSET else output_modal,
            realtime_mode=shape.mode,
            content_type=content_type,
            buffering=buffering,
            session_timeout=session_timeout,
            max_batch_size=max_batch_size,
            encode_message=encode_message,
            decode_message=decode_message,
        )

        @functools.wraps(function)
        def endpoint(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - whatever it is called with
            raise _not_callable(function)

        endpoint.original_func = function  # type: ignore[attr-defined] # an attribute of our own
        mark(endpoint, signature)
        return endpoint

    return decorate


def _not_callable(function: Callable[..., Any]) -> TypeError:
    name = function.__qualname__
    return TypeError(
        f"{name} answers the messages of a connection, so it cannot be called: connect to its path, "
        f"or call {name}.original_func(app, input)"
    )


def _check_number(name: str, value: Any, *, whole: bool, needed: bool = False) -> None:
    if value is None and not needed:
        return
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}")
    if whole and value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be more than 0 seconds and finite, not {value!r}")


def _shape_of(function: Callable[..., Any]) -> _Shape:
    """Read the mode and the models off a handler's annotations."""
    if not inspect.isroutine(function):
        raise TypeError(f"fal.realtime decorates a method, not {function!r}")
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise NameError(
            f"the annotations of {function.__qualname__} cannot be read: {error}. Models of a realtime "
            "endpoint must be known where it is decorated: define them before it, at the top level of the "
            "module or in a cell of their own"
        ) from error
    taken = hints.get(_input_name(function), Any)
    given = hints.get("return", Any)
    takes_stream, gives_async = _is_one_of(taken, _ASYNC_STREAMS), _is_one_of(given, _ASYNC_STREAMS)
    gives_stream = gives_async or _is_one_of(given, _STREAMS)
    if _is_one_of(taken, _STREAMS[:2]):
        raise ValueError(f"{function.__qualname__} takes a stream of inputs: annotate it as AsyncIterator")
    if takes_stream and gives_stream and not gives_async:
        raise ValueError(
            f"{function.__qualname__} takes a stream and gives one, so it must be asynchronous: annotate "
            "what it returns as AsyncIterator"
        )
    mode = {
        (False, False): "unary",
        (False, True): "server_streaming",
        (True, False): "client_streaming",
        (True, True): "bidi",
    }[takes_stream, gives_stream]
    return _Shape(
        mode,
        _model(_item(taken) if takes_stream else taken),
        _model(_item(given) if gives_stream else given),
    )


def _input_name(function: Callable[..., Any]) -> str:
    """Name the first parameter after `self`."""
    parameters = list(inspect.signature(function).parameters.values())
    rest = [item for item in parameters if item.kind is item.VAR_POSITIONAL]
    positional = [item for item in parameters if item.kind in _POSITIONAL]
    inputs = [*positional[1:], *rest]
    if not inputs:
        raise ValueError(f"{function.__qualname__} takes no input: give it a parameter after `self`")
    return inputs[0].name


def _is_one_of(annotation: Any, kinds: tuple[Any, ...]) -> bool:
    origin = typing.get_origin(annotation) or annotation
    return any(origin is kind for kind in kinds)


def _item(annotation: Any) -> Any:
    arguments = typing.get_args(annotation)
    return arguments[0] if arguments else Any


def _model(annotation: Any) -> Any:
    """Give the model that an annotation names, None if it names none; `Model | None` names `Model`."""
    if typing.get_origin(annotation) in _UNIONS:
        others = [item for item in typing.get_args(annotation) if item is not type(None)]
        if len(others) == 1:
            return _model(others[0])
    if annotation is Any or annotation is type(None) or isinstance(annotation, typing.TypeVar):
        return None
    return annotation
