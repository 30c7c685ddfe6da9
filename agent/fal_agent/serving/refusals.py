"""Answers that a layer around an app gives in the app's place.

Runs in the process that serves an app. A websocket that is not accepted yet is answered too: its handshake
fails with the status.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starlette.types import Receive, Scope, Send

__all__ = ["header_values", "refuse", "refuse_any_origin"]

_DENIAL = "websocket.http.response"  # the ASGI extension by which a handshake is answered
_POLICY_VIOLATION = 1008  # the websocket close code; before the handshake, servers make 403 of any


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    status: int,
    detail: str,
    headers: Iterable[tuple[str, str]] = (),
) -> None:
    """Answer a request or a websocket's handshake with `{"detail": ...}`."""
    if scope["type"] == "websocket":
        await receive()  # its beginning, which comes before any answer
        if _DENIAL not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": detail[:100]})
            return
    given: Mapping[str, str] = dict(headers)
    await JSONResponse({"detail": detail}, status, given)(scope, receive, send)


async def refuse_any_origin(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    status: int,
    detail: str,
    headers: Iterable[tuple[str, str]] = (),
) -> None:
    """Do the same, and let pages of every origin read why, as they may read the app's own answers."""
    shared = list(headers)
    for origin in header_values(scope, b"origin")[:1]:
        shared += [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Credentials", "true"),
            ("Vary", "Origin"),
        ]
    await refuse(scope, receive, send, status=status, detail=detail, headers=shared)


def header_values(scope: Scope, name: bytes) -> list[str]:
    """Give what a request has under a header's name (lower case), in order."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
