"""What realtime messages are made of: codecs, models, and frames that are none."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import uuid
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from support.realtime_server import drain, pack, raw, send_late, serving, unpack

from fal_agent.runtime.realtime import realtime
from fal_agent.runtime.routes import RouteSignature
from fal_agent.serving.realtime_codec import Codec, is_end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.realtime_server import RealtimeServer


class Number(BaseModel):
    """A message."""

    n: int


class Kind(enum.Enum):
    """Part of an answer."""

    GOOD = "good"


@dataclasses.dataclass
class Point:
    """A message that is no pydantic model."""

    x: int
    y: int = 0


class Array:
    """What a decoder may give that pydantic does not know."""


def encode_json(message: Any) -> bytes:
    return json.dumps(message).encode()


async def encode_json_later(message: Any) -> bytes:
    await asyncio.sleep(0)
    return encode_json(message)


async def decode_json_later(frame: bytes) -> Any:
    await asyncio.sleep(0)
    return json.loads(frame)


class App:
    """Endpoints with codecs."""

    @realtime("/json", encode_message=encode_json, decode_message=json.loads, content_type="application/json")
    async def as_json(self, number: Number) -> Number:
        return Number(n=number.n + 1)

    @realtime("/json-later", encode_message=encode_json_later, decode_message=decode_json_later)
    def as_json_later(self, number: Number) -> Number:
        return Number(n=number.n + 1)

    @realtime("/text", encode_message=lambda message: "text", decode_message=json.loads)
    def as_text(self, number: Number) -> Number:
        return number

    @realtime("/model")
    async def model(self, number: Number) -> Number:
        return number

    @realtime("/any")
    async def anything(self, message: Any) -> Any:
        return {"type": type(message).__name__}

    @realtime("/rich")
    async def rich(self, message: Any) -> Any:
        return {
            "kind": Kind.GOOD,
            "id": uuid.UUID(int=1),
            "at": datetime(2024, 1, 2, tzinfo=timezone.utc),
            "number": Number(n=1),
            "set": {1},
        }

    @realtime("/unwritable")
    async def unwritable(self, message: Any) -> Any:
        return {"object": object()}


@pytest.fixture(scope="module")
def served() -> Iterator[RealtimeServer]:
    with serving(App()) as server:
        yield server


# ---------------------------------------------------------------- codecs


@pytest.mark.parametrize("path", ["/json", "/json-later"])
def test_an_endpoint_may_have_codecs_of_its_own(served: RealtimeServer, path: str) -> None:
    """Its messages are binary frames all the same: text ones are control messages."""
    with raw(served, path) as client:
        client.send(b'{"n": 1}')
        answer = client.recv(timeout=20)

    assert isinstance(answer, bytes)
    assert json.loads(answer) == {"n": 2}


@pytest.mark.parametrize("path", ["/json", "/json-later"])
def test_a_decoder_that_fails_ends_the_connection(served: RealtimeServer, path: str) -> None:
    with raw(served, path) as client:
        client.send(b"{")
        messages, told, code = drain(client)

    assert (messages, told["error"], code) == ([], "INTERNAL_ERROR", 1000)


def test_an_encoder_must_give_bytes(served: RealtimeServer) -> None:
    with raw(served, "/text") as client:
        client.send(b'{"n": 1}')

        assert "encode_message must return bytes" in drain(client)[1]["reason"]


def test_common_values_that_msgpack_lacks_travel_as_in_json(served: RealtimeServer) -> None:
    with raw(served, "/rich") as client:
        client.send(pack({}))

        assert unpack(client.recv(timeout=20)) == {
            "kind": "good",
            "id": "00000000-0000-0000-0000-000000000001",
            "at": "2024-01-02T00:00:00Z",
            "number": {"n": 1},
            "set": [1],
        }


def test_an_output_that_cannot_be_written_is_an_error(served: RealtimeServer) -> None:
    with raw(served, "/unwritable") as client:
        client.send(pack({}))

        assert "object" in drain(client)[1]["reason"]


# ---------------------------------------------------------------- models


def opened(modal: Any, message: Any, **options: Any) -> Any:
    codec = Codec(RouteSignature("/", input_modal=modal, **options))
    return asyncio.run(codec.open(pack(message)))


def test_an_input_becomes_what_the_annotation_says() -> None:
    assert opened(Number, {"n": "3"}) == Number(n=3)
    assert opened(Point, {"x": 1}) == Point(1, 0)
    assert opened(dict[str, int], {"a": "1"}) == {"a": 1}
    assert opened(dict, {"a": "1"}) == {"a": "1"}
    assert opened(str, "text") == "text"
    assert opened(None, [1]) == [1]


def test_a_model_may_have_a_constructor_of_its_own() -> None:
    class Doubled(BaseModel):
        n: int

        def __init__(self, n: int) -> None:
            super().__init__(n=2 * n)

    assert opened(Doubled, {"n": 2}).n == 4


def test_a_class_that_pydantic_does_not_know_is_checked_by_type() -> None:
    array = Array()

    assert opened(Array, {}, decode_message=lambda frame: array) is array
    with pytest.raises(ValueError, match="instance of Array"):
        opened(Array, {}, decode_message=lambda frame: "text")


@pytest.mark.parametrize("message", [[1], "n", 3, None])
def test_a_model_is_made_of_a_dict_only(message: Any) -> None:
    with pytest.raises(TypeError, match="Expected a dict as input for Number, got"):
        opened(Number, message)


def test_models_of_both_versions_of_pydantic_are_outputs() -> None:
    class First:
        def dict(self) -> dict[str, int]:
            return {"n": 1}

    codec = Codec(RouteSignature("/"))

    for output in (First(), Number(n=1), {"n": 1}):
        assert unpack(asyncio.run(codec.write(output))) == {"n": 1}
    with pytest.raises(TypeError, match="got <class 'type'>"):
        asyncio.run(codec.write(First))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_what_a_handler_returns_is_what_a_client_opens(output: dict[str, Any]) -> None:
    frame = asyncio.run(Codec(RouteSignature("/")).write(output))

    assert msgpack.unpackb(frame, raw=False, strict_map_key=False) == output


# ---------------------------------------------------------------- frames that are none

SHARED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(frame=st.binary(max_size=200))
def test_whatever_bytes_come_are_answered_or_refused(served: RealtimeServer, frame: bytes) -> None:
    """Any frame is a message or an error of its connection; another connection notices nothing."""
    with raw(served, "/model") as other, raw(served, "/any") as untyped, raw(served, "/model") as typed:
        other.send(pack({"n": 1}))
        for client in (untyped, typed):
            client.send(frame)
            send_late(client, '{"type": "x-fal-end"}')
            messages, told, code = drain(client)
            is_answered = len(messages) == 1 and told["type"] == "x-fal-end"
            is_refused = not messages and told["error"] == "INTERNAL_ERROR"
            assert code == 1000
            assert is_answered != is_refused
        assert unpack(other.recv(timeout=20)) == {"n": 1}


@SHARED
@given(
    text=st.text(max_size=200) | st.sampled_from(['{"type": null}', '{"type": "x-fal-"}', "null", "1e999"])
)
def test_whatever_text_comes_is_refused(served: RealtimeServer, text: str) -> None:
    with raw(served, "/any") as client:
        client.send(text)

        assert drain(client)[1]["error"] == "INTERNAL_ERROR"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # a list of 2**32 - 1 items, none of which are there
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,  # lists in lists
        b"\xa1\xff",  # text that is not UTF-8
        b"\x81\x90\x01",  # a list as a key
        pack({"n": 1}) * 2,
    ],
)
def test_frames_that_lie_about_themselves_are_refused(served: RealtimeServer, frame: bytes) -> None:
    with raw(served, "/any") as client:
        client.send(frame)

        assert drain(client)[1]["error"] == "INTERNAL_ERROR"


@given(st.text() | st.text().map(lambda text: "[" * 2000 + text))
def test_text_is_never_taken_for_an_end_by_chance(text: str) -> None:
    assert not is_end(text)


def test_an_end_is_known_however_it_is_written() -> None:
    assert is_end('{"type":"x-fal-end"}')
    assert is_end(' { "reason": "", "type": "x-fal-end" } ')
    assert not is_end(json.dumps({"type": "x-fal-end", "filler": "x" * 5000}))
