"""What `fal.realtime` reads off a method, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import (  # noqa: TC003 - read by the decorator
    AsyncGenerator,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
)
from typing import Any, Optional

import cloudpickle
import pytest
from pydantic import BaseModel

from fal_agent.runtime.realtime import realtime


class Prompt(BaseModel):
    """An input."""

    text: str


class Picture(BaseModel):
    """An output."""

    data: bytes


def signature(function: Any, **options: Any) -> Any:
    return realtime("/live", **options)(function).route_signature


# ---------------------------------------------------------------- modes


async def unary(self: Any, prompt: Prompt) -> Picture: ...
def unary_sync(self: Any, prompt: Prompt) -> Picture: ...
def unary_batch(self: Any, *prompts: Prompt) -> Picture: ...
def unary_list(self: Any, prompt: Prompt) -> list[Picture]: ...
async def gives_async_iterator(self: Any, prompt: Prompt) -> AsyncIterator[Picture]: ...
async def gives_async_generator(self: Any, prompt: Prompt) -> AsyncGenerator[Picture, None]: ...
def gives_iterator(self: Any, prompt: Prompt) -> Iterator[Picture]: ...
def gives_iterable(self: Any, prompt: Prompt) -> Iterable[Picture]: ...
def gives_generator(self: Any, prompt: Prompt) -> Generator[Picture, None, None]: ...
async def takes_iterator(self: Any, prompts: AsyncIterator[Prompt]) -> Picture: ...
async def takes_generator(self: Any, prompts: AsyncGenerator[Prompt, None]) -> Picture: ...
async def both(self: Any, prompts: AsyncIterator[Prompt]) -> AsyncIterator[Picture]: ...


@pytest.mark.parametrize(
    ("function", "mode"),
    [
        (unary, "unary"),
        (unary_sync, "unary"),
        (unary_batch, "unary"),
        (unary_list, "unary"),
        (gives_async_iterator, "server_streaming"),
        (gives_async_generator, "server_streaming"),
        (gives_iterator, "server_streaming"),
        (gives_iterable, "server_streaming"),
        (gives_generator, "server_streaming"),
        (takes_iterator, "client_streaming"),
        (takes_generator, "client_streaming"),
        (both, "bidi"),
    ],
)
def test_the_annotations_say_who_streams_and_what(function: Any, mode: str) -> None:
    route = signature(function)

    assert route.realtime_mode == mode
    assert route.input_modal is Prompt
    assert route.output_modal == (list[Picture] if function is unary_list else Picture)


def test_what_is_not_annotated_has_no_model() -> None:
    def plain(self, message): ...  # type: ignore[no-untyped-def]
    def anything(self: Any, message: Any) -> Any: ...
    def nothing(self: Any, message: Any) -> None: ...
    async def streams(self: Any, messages: AsyncIterator[Any]) -> AsyncIterator[Any]: ...
    async def bare(self: Any, messages: AsyncIterator) -> AsyncIterator: ...  # type: ignore[type-arg]

    for function in (plain, anything, nothing, streams, bare):
        route = signature(function)
        assert (route.input_modal, route.output_modal) == (None, None)
    assert signature(bare).realtime_mode == "bidi"


def test_an_optional_model_is_that_model() -> None:
    def optional(self: Any, prompt: Prompt | None = None) -> Optional[Picture]: ...  # noqa: UP045 - both ways

    route = signature(optional)

    assert (route.input_modal, route.output_modal) == (Prompt, Picture)


def test_models_that_are_given_replace_those_of_the_annotations() -> None:
    class Other(BaseModel):
        pass

    given = signature(unary, input_modal=Other, output_modal=None)
    streamed = signature(both, input_modal=None, output_modal=Other)

    assert (given.input_modal, given.output_modal) == (Other, None)
    assert (streamed.input_modal, streamed.output_modal) == (None, Other)
    assert streamed.realtime_mode == "bidi"


def test_an_annotation_that_names_a_local_class_cannot_be_read() -> None:
    """All annotations of this file are strings."""

    class Local(BaseModel):
        pass

    def local(self: Any, prompt: Local) -> None: ...

    with pytest.raises(NameError, match=r"'Local'.*at the top level"):
        signature(local)


# ---------------------------------------------------------------- the mark


def test_the_route_keeps_every_option() -> None:
    def encode(message: Any) -> bytes:
        return json.dumps(message).encode()

    route = signature(
        unary,
        buffering=2,
        session_timeout=1.5,
        max_batch_size=4,
        content_type="application/json",
        encode_message=encode,
        decode_message=json.loads,
    )

    assert route._asdict() == {
        "path": "/live",
        "is_websocket": True,
        "health_check": None,
        "input_modal": Prompt,
        "output_modal": Picture,
        "realtime_mode": "unary",
        "content_type": "application/json",
        "buffering": 2,
        "session_timeout": 1.5,
        "max_batch_size": 4,
        "emit_timings": False,
        "encode_message": encode,
        "decode_message": json.loads,
    }
    assert hash(route) == hash(route)


def test_the_defaults() -> None:
    route = signature(unary)

    assert (route.buffering, route.session_timeout, route.max_batch_size) == (None, None, 1)
    assert (route.encode_message, route.decode_message) == (None, None)
    assert route.content_type == "application/msgpack"


def test_the_marked_function_is_a_new_one_that_knows_the_original() -> None:
    marked = realtime("/live")(unary)

    assert marked is not unary
    assert marked.original_func is unary
    assert not hasattr(unary, "route_signature")
    assert (marked.__name__, marked.__module__) == ("unary", unary.__module__)


def test_the_marked_method_cannot_be_called_with_an_input() -> None:
    class App:
        @realtime("/live")
        def double(self, message: Any) -> Any:
            return {"n": message["n"] * 2}

    with pytest.raises(TypeError, match=r"double answers the messages .*double\.original_func\(app, input\)"):
        App().double({"n": 1})
    assert App.double.original_func(App(), {"n": 1}) == {"n": 2}


def test_a_marked_method_travels_with_its_class() -> None:
    class App:
        @realtime("/live", encode_message=lambda message: b"")
        def double(self, message: Any) -> Any:
            return {"n": message["n"] * 2}

    again = cloudpickle.loads(cloudpickle.dumps(App))

    assert again.double.route_signature.path == "/live"
    assert again.double.original_func(again(), {"n": 2}) == {"n": 4}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffering": -1}, "buffering must be at least 1"),
        ({"buffering": 0}, "buffering must be at least 1"),
        ({"buffering": 1.5}, "buffering must be a whole number"),
        ({"buffering": True}, "buffering must be a whole number"),
        ({"session_timeout": 0}, "session_timeout must be more than 0 seconds"),
        ({"session_timeout": -1}, "session_timeout must be more than 0 seconds"),
        ({"session_timeout": float("nan")}, "session_timeout must be more than 0 seconds and finite"),
        ({"session_timeout": "5"}, "session_timeout must be a number"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_batch_size": None}, "max_batch_size must be a whole number"),
        ({"content_type": ""}, "content_type must be a media type"),
        ({"encode_message": "json"}, "encode_message must be a function or None"),
        ({"decode_message": b""}, "decode_message must be a function or None"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        realtime("/live", **options)


def test_a_path_has_a_leading_slash() -> None:
    with pytest.raises(ValueError, match="slash"):
        realtime("live")(unary)


def test_a_second_route_for_one_function_is_refused() -> None:
    with pytest.raises(ValueError, match="Can't set multiple routes for the same function"):
        realtime("/two")(realtime("/one")(unary))


def test_a_method_without_an_input_is_refused() -> None:
    def lonely(self: Any) -> None: ...
    def named_only(self: Any, *, prompt: Prompt) -> None: ...

    for function in (lonely, named_only):
        with pytest.raises(ValueError, match="takes no input"):
            signature(function)


def test_streams_that_only_an_asynchronous_handler_could_serve_are_refused() -> None:
    def sync_both(self: Any, prompts: AsyncIterator[Prompt]) -> Iterator[Picture]: ...
    def sync_input(self: Any, prompts: Iterator[Prompt]) -> Picture: ...

    with pytest.raises(ValueError, match="must be asynchronous"):
        signature(sync_both)
    with pytest.raises(ValueError, match="annotate it as AsyncIterator"):
        signature(sync_input)


def test_only_methods_can_be_marked() -> None:
    with pytest.raises(TypeError, match="decorates a method"):
        realtime("/live")("no method")  # type: ignore[arg-type]
