"""Which headers of a request or an answer pass the gateway, and its own answers.

Runs in the gateway process. Always true: what concerns one connection only stays on it; all else passes
in its order, repetitions included.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CROSS_ORIGIN",
    "HINTS_HEADER",
    "HINT_HEADER",
    "RawHeaders",
    "detail_answer",
    "end_to_end",
    "first",
    "hints_in",
    "without",
]

RawHeaders = list[tuple[bytes, bytes]]  # names in lower case

HINT_HEADER = b"x-fal-runner-hint"
HINTS_HEADER = b"x-fal-runner-hints"
CROSS_ORIGIN = {  # as apps allow it themselves
    "allow_origins": ["*"],
    "allow_methods": ["*"],
    "allow_headers": ["*"],
    "allow_credentials": True,
    "expose_headers": ["x-fal-request-id", "X-Fal-Runner-Hints"],
}
_ONE_HOP = frozenset(
    [
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    ]
)


def first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> Optional[bytes]:
    """Give the first value of a header, named in lower case."""
    return next((value for key, value in headers if key.lower() == name), None)


def without(headers: Iterable[tuple[bytes, bytes]], *names: bytes) -> RawHeaders:
    """Give the headers except for some, named in lower case."""
    return [(key.lower(), value) for key, value in headers if key.lower() not in names]


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """Give the headers that do not concern one connection only: RFC 9110, 7.6.1."""
    headers = list(headers)
    named = {
        token.strip().lower()
        for key, value in headers
        if key.lower() == b"connection"
        for token in value.split(b",")
    }
    return without(headers, *_ONE_HOP, *(named - {b"content-length", b"host"}))


def hints_in(value: bytes) -> list[str]:
    """Read a header of hints."""
    return [hint for part in value.decode("latin-1").split(",") if (hint := part.strip())]


def detail_answer(detail: str, headers: RawHeaders) -> tuple[RawHeaders, bytes]:
    """Give headers and body of an answer of the gateway itself."""
    body = json.dumps({"detail": detail}).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return [*about, *headers], body
