"""Turns messages into frames and back.

Runs everywhere. Messages are frozen dataclasses, defined in `fal_agent.messages`; their frames are those of
`fal_agent.framing`.

Data (pickles and their out-of-band buffers) is referred to by `Data`: a list whose items are either
the index of a raw buffer of the same frame, or the name of a blob. A blob is larger data that
travels on its own, in `BlobPart`s that other frames may come between, and that is kept on the host
under its name. The first item is a pickle, the others are its out-of-band buffers in order.

Flow control: every event that a worker makes carries `cost`, in bytes. A worker stops producing
when more than `WINDOW` bytes of one run are not yet acknowledged; the notebook acknowledges what it
has drawn or handed over, and the agent does so itself for runs that nobody watches.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar, Union

from fal_agent.errors import ProtocolError
from fal_agent.framing import Buffer, Frame, encode_frame
from fal_agent.messages.calls import (
    AppSpec,
    Call,
    Data,
    EnvironmentSpec,
    HealthPolicy,
    Resources,
    Scaling,
)  # fmt: skip
from fal_agent.messages.events import (
    Clear,
    Comm,
    Display,
    Failure,
    Item,
    Log,
    Progress,
    Prompt,
    Result,
    Serving,
    Stage,
)  # fmt: skip
from fal_agent.messages.requests import (
    PART_SIZE,
    Ack,
    Answer,
    Arrived,
    Ask,
    Attach,
    BlobPart,
    Cancel,
    Hello,
    Interrupt,
    Kill,
    Lane,
    LaneClosed,
    Need,
    Ping,
    Pong,
    Reply,
    Seen,
    Submit,
    Want,
    Welcome,
)  # fmt: skip
from fal_agent.messages.work import (
    Activity,
    Adopt,
    Begun,
    Execute,
    Found,
    Lend,
    Lent,
    Listening,
    Load,
    Look,
    Moved,
    Ready,
    Recall,
    Returned,
    Runners,
    Serve,
    Sick,
    Task,
    Unwell,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "INLINE_LIMIT",
    "PART_SIZE",
    "WINDOW",
    "Ack",
    "Activity",
    "Adopt",
    "Answer",
    "AppSpec",
    "Arrived",
    "Ask",
    "Attach",
    "Begun",
    "BlobPart",
    "Call",
    "Cancel",
    "Clear",
    "Comm",
    "Data",
    "Display",
    "EnvironmentSpec",
    "Event",
    "Execute",
    "Failure",
    "Found",
    "HealthPolicy",
    "Hello",
    "Interrupt",
    "Item",
    "Kill",
    "Lane",
    "LaneClosed",
    "Lend",
    "Lent",
    "Listening",
    "Load",
    "Log",
    "Look",
    "Message",
    "Moved",
    "Need",
    "Ping",
    "Pong",
    "Progress",
    "Prompt",
    "Ready",
    "Recall",
    "Reply",
    "Resources",
    "Result",
    "Returned",
    "Runners",
    "Scaling",
    "Seen",
    "Serve",
    "Serving",
    "Sick",
    "Stage",
    "Submit",
    "Task",
    "Unwell",
    "Want",
    "Welcome",
    "decode",
    "encode",
    "header",
    "lasting",
]

INLINE_LIMIT = 256 << 10  # bytes of raw buffers that one message carries itself; more goes as blobs
WINDOW = 1 << 20  # bytes of events of one run that may be unacknowledged

Event = Union[Stage, Log, Display, Clear, Progress, Prompt, Comm, Item, Serving, Result, Failure]
Message = Union[
    Hello, Submit, Arrived, Attach, BlobPart, Ack, Interrupt, Cancel, Kill, Reply, Seen, Ask, Ping, Welcome,
    Need, Want, Answer, Pong, Stage, Log, Display, Clear, Progress, Prompt, Comm, Item, Result, Failure,
    Ready, Execute,
    Serving, Activity, Unwell, Runners, Load, Sick,
    Lane, LaneClosed, Lend, Lent, Listening, Recall, Returned, Adopt, Moved, Begun,
    Look, Found,
]  # fmt: skip

_TYPES: dict[str, type[Any]] = {cls.type: cls for cls in Message.__args__}  # type: ignore[attr-defined]
_NESTED: dict[type, dict[str, type[Any]]] = {
    Submit: {"call": Call},
    Call: {"environment": EnvironmentSpec, "resources": Resources, "scaling": Scaling, "app": AppSpec},
    AppSpec: {"health": HealthPolicy},
    Execute: {"task": Task},
    Task: {"serve": Serve},
    Serve: {"app": AppSpec},
}
_M = TypeVar("_M")


def encode(message: Message, buffers: Sequence[Buffer] = ()) -> bytes:
    """Make the frame of a message.

    Raises:
        ProtocolError: it would be larger than a frame may be.
    """
    return encode_frame(header(message), buffers)


def header(message: Message) -> dict[str, Any]:
    """Give a message as the JSON object of its frame."""
    return {"type": message.type, **_plain(message)}


def lasting(content: dict[str, Any], buffers: Sequence[Buffer]) -> tuple[dict[str, Any], Sequence[Buffer]]:
    """Give what may be written down of an event: its header and buffers, without the variables of frames."""
    if content.get("variables") is None:
        return content, buffers
    return {key: item for key, item in content.items() if key != "variables"}, buffers[:-1]


def decode(frame: Frame) -> Message:
    """Give the message of a frame; its buffers stay in the frame.

    Raises:
        ProtocolError: the type is unknown, or fields are missing, unknown or of another kind.
    """
    values = dict(frame.header)
    kind = values.pop("type", None)
    cls = _TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown message type {kind!r}")
    message: Message = _build(cls, values)
    return message


def _plain(value: Any) -> dict[str, Any]:
    """`value`'s fields as JSON types, those at their defaults left out; nested messages become objects."""
    defaults = _DEFAULTS[type(value)]
    plain: dict[str, Any] = {}
    for key, item in vars(value).items():
        if key in defaults and defaults[key] == item:
            continue
        plain[key] = _plain(item) if type(item) in _DEFAULTS else item
    return plain


def _defaults(cls: type) -> dict[str, Any]:
    """The fields of a message that may be left out, with what they then are."""
    given: dict[str, Any] = {}
    for item in fields(cls):
        if item.default is not MISSING:
            given[item.name] = item.default
        elif item.default_factory is not MISSING:
            given[item.name] = item.default_factory()
    return given


def _build(cls: type[_M], values: dict[str, Any]) -> _M:
    for name, nested in _NESTED.get(cls, {}).items():
        if isinstance(values.get(name), dict):
            values[name] = _build(nested, dict(values[name]))
    shapes = _SHAPES[cls]
    for name, value in values.items():
        kinds, inner = shapes.get(name, _NOTHING)
        if type(value) not in kinds or (inner is not None and not _hold(value, inner)):
            shown = "..." if name in _UNSHOWN else f"{value!r:.80}"
            raise ProtocolError(f"{cls.__name__} cannot have {name}={shown}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ProtocolError(f"{cls.__name__}: {error}") from None


class _Shape(NamedTuple):
    """What JSON may give for a field: exact types, and the shape of what lies in a list or an object."""

    kinds: frozenset[type]
    inner: Optional[_Shape] = None


def _hold(value: Any, inner: _Shape) -> bool:
    """Whether all that lies in a list or an object has a shape; None holds nothing."""
    items = value.values() if type(value) is dict else value or ()
    deeper = inner.inner
    return all(type(item) in inner.kinds and (deeper is None or _hold(item, deeper)) for item in items)


def _shape(annotation: str) -> _Shape:
    head, _, inner = annotation.partition("[")
    if head == "Optional":
        shape = _shape(inner[:-1])
        return _Shape(shape.kinds | {type(None)}, shape.inner)
    if head == "list":
        return _Shape(frozenset([list]), _shape(inner[:-1]))
    if head == "dict":
        return _Shape(frozenset([dict]), _shape(inner[:-1].partition(", ")[2]))
    return _JSON_SHAPES.get(head) or _Shape(frozenset([globals()[head]]))


_NOTHING = _Shape(frozenset())
_UNSHOWN = ("environ", "agent_secret")  # what is in no message, not even when it is wrong
_JSON_SHAPES: dict[str, _Shape] = {
    "str": _Shape(frozenset([str])),
    "int": _Shape(frozenset([int])),
    "float": _Shape(frozenset([int, float])),
    "bool": _Shape(frozenset([bool])),
    "Any": _Shape(frozenset([str, int, float, bool, list, dict, type(None)])),
    "Data": _Shape(frozenset([list]), _Shape(frozenset([int, str]))),
}
_NESTED_ONLY = (Call, EnvironmentSpec, Resources, Scaling, AppSpec, HealthPolicy, Task, Serve)
_SHAPES: dict[type, dict[str, _Shape]] = {
    cls: {item.name: _shape(str(item.type)) for item in fields(cls)}
    for cls in [*_TYPES.values(), *_NESTED_ONLY]
}
_DEFAULTS: dict[type, dict[str, Any]] = {cls: _defaults(cls) for cls in _SHAPES}
