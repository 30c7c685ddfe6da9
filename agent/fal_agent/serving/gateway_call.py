"""A request, or the opening of a websocket, as the gateway passes it on or refuses it.

Runs in the gateway process. Always true: what a runner gets is what the client sent, but for the headers of
the client's connection, with an id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from fal_agent.runtime.requests import REQUEST_ID_HEADER, context_from_headers
from fal_agent.serving.gateway_headers import (
    HINT_HEADER,
    RawHeaders,
    detail_answer,
    end_to_end,
    first,
    without,
)

if TYPE_CHECKING:
    from starlette.types import Scope, Send

    from fal_agent.errors import AppException
    from fal_agent.serving.gateway_body import Body

__all__ = ["RETRIES", "Call", "call_of", "refuse", "refuse_opening"]

RETRIES = 2  # times that a request is tried again
_ID = REQUEST_ID_HEADER.encode()


@dataclass(eq=False)
class Call:
    """What is asked, and how far it has come.

    Attributes:
        method: of HTTP.
        target: path and query, as the client wrote them.
        headers: those that pass.
        request_id: what it is called in logs.
        hint: names the runners that are preferred; empty for none.
        body: None for a websocket, and for a request that cannot have one.
        retries: times that it may still be tried again.
        has_begun: whether some of the answer may have been sent.
    """

    method: str
    target: bytes
    headers: RawHeaders
    request_id: bytes
    hint: str
    body: Optional[Body] = None
    retries: int = RETRIES
    has_begun: bool = False

    @property
    def can_repeat(self) -> bool:
        """Whether it can be tried once more."""
        return self.retries > 0 and (self.body is None or self.body.is_replayable)

    def labelled(self, headers: RawHeaders) -> RawHeaders:
        """Give an answer's headers with the request's id."""
        return headers if first(headers, _ID) is not None else [*headers, (_ID, self.request_id)]


def call_of(scope: Scope) -> Call:
    """Read what is asked."""
    given: RawHeaders = list(scope["headers"])
    context = context_from_headers({k.decode("latin-1").lower(): v.decode("latin-1") for k, v in given})
    request_id = (context.request_id or "").encode()
    query = scope["query_string"]
    headers = [*without(end_to_end(given), b"expect", _ID), (_ID, request_id)]
    if first(given, b"transfer-encoding") is not None:  # its length is not known, whatever else is said of it
        headers = [*without(headers, b"content-length"), (b"transfer-encoding", b"chunked")]
    return Call(
        method=scope.get("method", "GET"),
        target=scope["raw_path"] + (b"?" + query if query else b""),
        headers=headers,
        request_id=request_id,
        hint=(first(given, HINT_HEADER) or b"").decode("latin-1").strip(),
    )


async def refuse(call: Call, send: Send, refusal: AppException) -> None:
    """Say why a request is not answered by a runner."""
    if call.has_begun:
        return  # too late for a status: the server breaks an unfinished answer off
    headers, body = detail_answer(refusal.message, call.labelled([]))
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse_opening(send: Send, scope: Scope, status: int, headers: RawHeaders, body: bytes) -> None:
    """Answer a websocket's opening with a status; with 403 where the server can do no better."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
