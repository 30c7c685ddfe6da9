"""Every message survives the way there; what is no message is refused, whatever is wrong with it."""

from __future__ import annotations

import dataclasses
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fal_agent import wire
from fal_agent.errors import ProtocolError
from fal_agent.framing import Frame, FrameDecoder
from fal_agent.wire import Call, EnvironmentSpec, Log, Resources, Submit, decode, encode

MESSAGES = sorted(get_args(wire.Message), key=lambda cls: cls.__name__)
text = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation of a message's field."""
    if dataclasses.is_dataclass(kind):
        return messages_of(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Union:
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=4)
    if origin is dict:
        return st.dictionaries(text, values_of(arguments[1]), max_size=4)
    return {
        str: text,
        int: st.integers(-(2**40), 2**40),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        Any: json_values,
        type(None): st.none(),
    }[kind]


def messages_of(cls: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls, localns=vars(wire))
    return st.builds(cls, **{item.name: values_of(hints[item.name]) for item in dataclasses.fields(cls)})


def minimal(cls: Any) -> dict[str, Any]:
    """The header of a message with nothing but the fields that it must have."""
    plain = {"str": "x", "int": 1, "float": 1.5, "bool": True, "Data": [], "Any": None}
    header: dict[str, Any] = {"type": cls.type} if hasattr(cls, "type") else {}
    for item in dataclasses.fields(cls):
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            name = str(item.type)
            nested = getattr(wire, name, None)
            if dataclasses.is_dataclass(nested):
                header[item.name] = minimal(nested)
            elif name.startswith(("list[", "dict[")):
                header[item.name] = [] if name.startswith("list") else {}
            else:
                header[item.name] = None if name.startswith("Optional[") else plain[name]
    return header


def decoded(header: dict[str, Any]) -> str:
    """The type of the message that a header gives, or the text of the error."""
    try:
        return decode(Frame(header, [])).type
    except ProtocolError as error:
        return str(error)


def test_every_message_is_known_by_one_name() -> None:
    names = [cls.type for cls in MESSAGES]

    assert len(set(names)) == len(names)
    assert all(cls.__name__ in wire.__all__ for cls in MESSAGES)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.type)
@settings(max_examples=30)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(cls: Any, data: st.DataObject) -> None:
    message = data.draw(messages_of(cls))
    buffers = data.draw(st.lists(st.binary(max_size=50), max_size=3))

    (frame,) = FrameDecoder().feed(encode(message, buffers))

    assert decode(frame) == message
    assert frame.buffers == buffers


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.type)
def test_only_the_fields_without_a_default_are_needed(cls: Any) -> None:
    header = minimal(cls)
    assert isinstance(decode(Frame(header, [])), cls)

    for name in set(header) - {"type"}:
        with pytest.raises(ProtocolError, match=name):
            decode(Frame({key: value for key, value in header.items() if key != name}, []))


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.type)
def test_an_unknown_field_is_refused(cls: Any) -> None:
    """Both ends run the same source, so it can only be a mistake."""
    with pytest.raises(ProtocolError, match="surprise"):
        decode(Frame({**minimal(cls), "surprise": 1}, []))


WRONG = {
    "str": [None, 1, True, [], {}],
    "int": [None, "1", 1.5, True, []],
    "float": [None, "1", True, []],
    "bool": [None, 0, 1, "true"],
    "Data": [None, "x", {}, [None], [1.5], [True], [[0]]],
    "list": [None, "x", {}, 1],
    "dict": [None, [], "x"],
}
ELEMENTS = {
    "list[str]": [[1], [None]],
    "list[list[str]]": [["x"], [[1]]],
    "list[list[Any]]": [["x"]],
    "dict[str, str]": [{"a": 1}],
}
PLACES = {  # where the parts of messages stand
    Call: (Submit, "call"),
    EnvironmentSpec: (Call, "environment"),
    Resources: (Call, "resources"),
    wire.Scaling: (Call, "scaling"),
    wire.Task: (wire.Execute, "task"),
}
CASES = [
    (cls, item.name, wrong)
    for cls in [*MESSAGES, *PLACES]
    for item in dataclasses.fields(cls)
    for name in [str(item.type)]
    for bare in [name[len("Optional[") : -1] if name.startswith("Optional[") else name]
    for wrong in [*WRONG.get(bare.split("[")[0], []), *ELEMENTS.get(bare, [])]
    if not (name.startswith("Optional[") and wrong is None)
]


@pytest.mark.parametrize(
    ("cls", "name", "wrong"), CASES, ids=[f"{cls.__name__}-{name}-{wrong!r}" for cls, name, wrong in CASES]
)
def test_a_field_of_another_kind_is_refused(cls: Any, name: str, wrong: Any) -> None:
    """JSON's true is no number, and what lies in a list counts too."""
    header, outermost = {**minimal(cls), name: wrong}, cls
    while outermost not in MESSAGES:
        outermost, field = PLACES[outermost]
        header = {**minimal(outermost), field: header}

    with pytest.raises(ProtocolError, match=f"{cls.__name__} cannot have {name}="):
        decode(Frame(header, []))


@pytest.mark.parametrize("kind", [None, 1, "", "nothing", "Log", ["log"], {}])
def test_an_unknown_type_is_refused(kind: Any) -> None:
    with pytest.raises(ProtocolError, match="unknown message type"):
        decode(Frame({"type": kind, "run_id": "x"}, []))
    with pytest.raises(ProtocolError, match="unknown message type"):
        decode(Frame({}, []))


@given(st.dictionaries(text, json_values, max_size=4), st.sampled_from([cls.type for cls in MESSAGES]))
def test_any_header_gives_a_message_or_a_protocol_error(header: dict[str, Any], kind: str) -> None:
    outcome = decoded({**header, "type": kind})

    assert outcome == kind or len(outcome) < 500, "a message for a person, however long the nonsense was"


@given(st.data())
@settings(max_examples=200)
def test_any_value_in_any_field_gives_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(MESSAGES))
    name = data.draw(st.sampled_from([item.name for item in dataclasses.fields(cls)]))
    outcome = decoded({**minimal(cls), name: data.draw(json_values)})

    assert outcome == cls.type or cls.__name__ in outcome or name.title() in outcome


def test_a_call_nested_in_a_submit_comes_back_whole() -> None:
    call = Call(
        kind="function",
        label="f",
        function="d",
        environment=EnvironmentSpec("3.11", [["numpy"], ["torch==2.4"]]),
        resources=Resources(["GPU-H100", "L"], 2, ["attic"]),
    )
    submit = Submit("r", "t", [0, "b3-x", 1], call)

    (frame,) = FrameDecoder().feed(encode(submit))

    assert decode(frame) == submit


def test_a_part_of_another_kind_is_refused() -> None:
    for wrong in ("x", 1, [], [{}]):
        with pytest.raises(ProtocolError, match="Submit cannot have call="):
            decode(Frame({**minimal(Submit), "call": wrong}, []))
    with pytest.raises(ProtocolError, match="Call"):
        decode(Frame({**minimal(Submit), "call": {}}, []))


def test_a_field_at_its_default_does_not_travel() -> None:
    """Events are many and small."""
    assert wire.header(Log("r", "stdout")) == {"type": "log", "run_id": "r", "stream": "stdout"}
    assert wire.header(Log("r", "stdout", seq=7))["seq"] == 7


def test_decoding_leaves_the_frame_as_it_was() -> None:
    header = {"type": "log", "run_id": "x", "stream": "stdout"}

    assert decode(Frame(header, [])) == decode(Frame(header, [])) == Log("x", "stdout")
    assert header == {"type": "log", "run_id": "x", "stream": "stdout"}


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="travels as blobs"):
        encode(wire.Answer("a", "x" * (1 << 20)))


def test_messages_know_their_fields_by_plain_names() -> None:
    """A message's own field named `type` would be lost on the way."""
    for cls in MESSAGES:
        assert "type" not in {item.name for item in dataclasses.fields(cls)}
