"""The frames of a realtime connection: binary ones are messages, text ones are control messages.

Runs in the worker that serves an app. Whatever a client sends, opening it gives a value or raises an
error of that connection.

A control message is a JSON object whose `type` begins with `x-fal-`:

* `{"type": "x-fal-error", "error": CODE, "reason": TEXT}`, from the server: the session ends. CODE is
  `INTERNAL_ERROR` (the handler or an input failed) or `TIMEOUT` (no inputs came in time).
* `{"type": "x-fal-end"}`, from the server: the stream, or the session, is complete; nothing went wrong.
  It has a type of its own because clients take any `x-fal-error` for a failure, and a finished stream is
  none. A client that knows only `x-fal-error` passes over it and then sees the connection closed with
  code 1000, which is how a websocket ends when all is well.
* `{"type": "x-fal-end"}`, from the client: it sends no more inputs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgpack
from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, TypeAdapter
from pydantic_core import to_jsonable_python

from fal_agent.serving.realtime_calls import call

if TYPE_CHECKING:
    from fal_agent.runtime.routes import RouteSignature

__all__ = ["END", "TIMEOUT", "Codec", "error_frame", "is_end"]

_MAX_REASON = 10_000  # characters of an error's text that a client gets
_MAX_CONTROL = 4096  # characters of a control message


def error_frame(code: str, reason: str) -> str:
    """Write the control message of a session that failed."""
    if len(reason) > _MAX_REASON:
        reason = f"{reason[:_MAX_REASON]}... ({len(reason)} characters)"
    return json.dumps({"type": "x-fal-error", "error": code, "reason": reason})


END = json.dumps({"type": "x-fal-end"})
TIMEOUT = error_frame("TIMEOUT", "no inputs, reconnect when needed!")


def is_end(text: str) -> bool:
    """Whether a text frame of the client says that no more inputs come."""
    if len(text) > _MAX_CONTROL:
        return False
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(message, dict) and message.get("type") == "x-fal-end"


class Codec:
    """How one endpoint opens its inputs and writes its outputs."""

    def __init__(self, route: RouteSignature) -> None:
        self._model = route.input_modal
        self._decode, self._encode = route.decode_message, route.encode_message

    async def open(self, frame: bytes) -> Any:
        """Give the value that a frame means: the model's instance, if the endpoint has a model.

        Raises:
            Exception: whatever the decoder or the model finds wrong with it.
        """
        if self._decode is None:
            decoded = msgpack.unpackb(frame, raw=False, strict_map_key=False)
        else:
            decoded = await call(self._decode, frame)
        return decoded if self._model is None else _validated(self._model, decoded)

    async def write(self, output: Any) -> bytes:
        """Give the bytes of a handler's output.

        Raises:
            TypeError: it is neither a dict nor a model, or the encoder did not give bytes.
        """
        plain = _plain(output)
        if self._encode is None:
            return bytes(msgpack.packb(plain, use_bin_type=True, default=to_jsonable_python))
        frame = await call(self._encode, plain)
        if not isinstance(frame, (bytes, bytearray, memoryview)):
            raise TypeError(f"encode_message must return bytes, not {type(frame)}")
        return bytes(frame)


def _plain(output: Any) -> dict[Any, Any]:
    if isinstance(output, BaseModel):
        return output.model_dump()
    if isinstance(output, dict):
        return output
    if isinstance(output, type) or not callable(getattr(output, "dict", None)):
        hint = ""
        if inspect.isgenerator(output) or inspect.isasyncgen(output):
            hint = "; a handler that yields streams only if its return is annotated as an iterator"
        raise TypeError(f"Expected a dict or pydantic model as output, got {type(output)}{hint}")
    return dict(output.dict())  # a model of pydantic's first version


def _validated(model: Any, decoded: Any) -> Any:
    if not _is_model(model):
        return _adapter(model).validate_python(decoded)
    if not isinstance(decoded, Mapping):
        raise TypeError(f"Expected a dict as input for {model.__name__}, got {type(decoded)}")
    return model(**decoded)


def _is_model(model: Any) -> bool:
    return isinstance(model, type) and (issubclass(model, BaseModel) or hasattr(model, "__fields__"))


@lru_cache(maxsize=256)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """Validate by an annotation that is no model: `dict[str, int]`, a dataclass, an array."""
    try:
        return TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
