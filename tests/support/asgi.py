"""One request to an ASGI application, with the test at the other end of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message

__all__ = ["Asked", "let_others_run"]


async def let_others_run() -> None:
    """Give every task that can go on the chance to; nothing here waits for a clock."""
    for _ in range(20):
        await asyncio.sleep(0)


class Asked:
    """A request, or the opening of a websocket, that an application is answering.

    Attributes:
        task: what answers.
        sent: what it has said.
    """

    def __init__(
        self,
        application: ASGIApp,
        *,
        kind: str = "http",
        path: str = "/",
        headers: Iterable[tuple[str, str]] = (),
        **scope: Any,
    ) -> None:
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        given = {
            "type": kind,
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in headers],
            **scope,
        }
        self.task = asyncio.ensure_future(application(given, self._incoming.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def say(self, kind: str, **more: Any) -> None:
        """Send something to the application."""
        self._incoming.put_nowait({"type": kind, **more})

    def leave(self) -> None:
        """Go away."""
        self.say("http.disconnect")

    @property
    def status(self) -> int | None:
        """Of the answer, once it has begun."""
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        """What has come of the answer."""
        return b"".join(message.get("body", b"") for message in self.sent[1:])
