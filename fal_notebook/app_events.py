"""From the bytes of a streamed answer to its events: no I/O.

Runs in the notebook. Lines end where the format says and nowhere else: JSON may hold other signs that
Python would take for the end of a line.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["decoded"]

_LINES_OF_JSON = {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/json-lines"}
_END_OF_LINE = re.compile(r"\r\n|\n|\r")


def decoded(content_type: str, pieces: Iterable[bytes]) -> Iterator[Any]:
    """Give the events of a streamed answer as they come.

    Args:
        content_type: of the answer. Server-sent events: each one's data, from JSON or as text. Lines of
            JSON: each line's value. JSON: its one value. Other text, and what has no type: the pieces as
            text. Anything else: the pieces.
        pieces: the answer, cut anywhere.

    Raises:
        ValueError: what should be JSON is not.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/event-stream":
        for text in _events(_lines(_texts(pieces))):
            yield _json_or_text(text)
    elif kind in _LINES_OF_JSON:
        for line in _lines(_texts(pieces)):
            if line.strip():
                yield json.loads(line)
    elif kind == "application/json" or kind.endswith("+json"):
        yield json.loads(b"".join(pieces))
    elif kind.startswith("text/"):
        yield from _texts(pieces)
    elif not kind:
        yield from _texts_if_they_are(pieces)
    else:
        yield from pieces


def _texts(pieces: Iterable[bytes]) -> Iterator[str]:
    """Decode pieces that may be cut inside a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _texts_if_they_are(pieces: Iterable[bytes]) -> Iterator[str | bytes]:
    """Give text as long as it is that, then bytes."""
    rest = b""
    is_text = True
    for piece in pieces:
        if not is_text:
            yield piece
            continue
        rest += piece
        try:
            text, used = codecs.utf_8_decode(rest, "strict", False)
        except UnicodeDecodeError:
            is_text = False
            yield rest
            continue
        rest = rest[used:]
        if text:
            yield text
    if is_text and rest:
        yield rest


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut text into lines without their ends; the last one counts though nothing ends it."""
    rest: list[str] = []
    after_return = False  # the last text ended in "\r": a "\n" at the start of the next belongs to it
    for given in texts:
        text = given[1:] if after_return and given.startswith("\n") else given
        after_return = given.endswith("\r")
        first, *others = _END_OF_LINE.split(text)
        rest.append(first)
        for other in others:
            yield "".join(rest)
            rest = [other]
    if last := "".join(rest):
        yield last


def _events(lines: Iterable[str]) -> Iterator[str]:
    """Give the data of each server-sent event; one that was not finished by an empty line is not given."""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield "\n".join(data)
            data = []
            continue
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
