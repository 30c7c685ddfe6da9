"""An answer's body on its way through the gateway: a small one passes whole or not at all.

Runs in the gateway process. Servers send head and body apart, and a runner may be killed in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import httpx

from fal_agent.serving.gateway_headers import RawHeaders, first

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["parts_of"]

_SMALL = 64 << 10  # bytes


async def parts_of(response: httpx.Response, headers: RawHeaders) -> Optional[AsyncIterator[bytes]]:
    """Give an answer's body in parts, one of up to 64 KiB as a whole; None if that broke off."""
    parts = response.stream.__aiter__()  # type: ignore[union-attr] # of an asynchronous transport
    size = first(headers, b"content-length") or b""
    if not size.isdigit() or int(size) > _SMALL:
        return parts
    try:
        whole = b"".join([part async for part in parts])
    except httpx.TransportError:
        return None
    return _one(whole)


async def _one(part: bytes) -> AsyncIterator[bytes]:
    yield part
