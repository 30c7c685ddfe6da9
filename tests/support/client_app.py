"""The app that real clients talk to: one endpoint for each way of talking. This module travels with it."""

# No `from __future__ import annotations`: a function that travels takes along the names that it uses, and
# those in its annotations only while they are no text.
import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import Request, WebSocket
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel

import fal_notebook as fal

__all__ = ["PAGE", "make_app"]

PATIENCE = 20.0  # seconds that a stream waits to be told to go on
PAGE = "<!doctype html><title>page</title><link rel=icon href=data:,><body>loaded"


class Clip(BaseModel):
    text: str
    times: int = 1


class Talks(fal.App, requirements=["pillow"], local_python_modules=[__name__]):
    """Answers whoever talks to it."""

    def setup(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.marks: list[str] = []

    @fal.endpoint("/")
    def greet(self, name: str, times: int = 1) -> dict[str, str]:
        return {"text": " ".join(["hello", *[name] * min(times, 10)])}

    @fal.endpoint("/repeat")
    def repeat(self, clip: Clip) -> dict[str, str]:
        return {"text": clip.text * min(max(clip.times, 0), 10)}

    @fal.endpoint("/drip")
    async def drip(self, gate: str, media_type: str = "text/plain") -> StreamingResponse:
        """Say a first thing, and the second when `/open` is called."""
        gates = self.gates
        gates[gate] = asyncio.Event()

        async def pieces() -> AsyncIterator[str]:
            yield 'data: "first"\n\n'
            await asyncio.wait_for(gates[gate].wait(), PATIENCE)
            yield 'data: "second"\n\n'

        return StreamingResponse(pieces(), media_type=media_type)

    @fal.endpoint("/open")
    async def open(self, gate: str) -> None:
        self.gates[gate].set()

    @fal.endpoint("/size")
    async def size(self, request: Request) -> dict[str, int]:
        return {"bytes": sum([len(piece) async for piece in request.stream()])}

    @fal.endpoint("/ws", is_websocket=True)
    async def echo(self, websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            await websocket.send({**message, "type": "websocket.send"})

    @fal.realtime("/realtime")
    def double(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"value": message["value"] * 2}

    # The official client has these two below the app's owner and alias.
    @fal.realtime("/me/talks/realtime")
    def double_for_official(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"value": message["value"] * 2}

    @fal.endpoint("/me/talks/ws", is_websocket=True)
    async def echo_for_official(self, websocket: WebSocket) -> None:
        await self.echo(websocket)

    @fal.endpoint("/picture")
    def picture(self, color: Literal["red", "blue"] = "red") -> dict[str, str]:
        from PIL import Image

        return {"url": fal.toolkit.upload_image(Image.new("RGB", (64, 48), color))}

    @fal.endpoint("/page")
    def page(self) -> HTMLResponse:
        return HTMLResponse(PAGE)

    @fal.endpoint("/mark")
    async def mark(self, request: Request) -> None:
        """Remember that somebody came in, whatever they bring."""
        self.marks.append(request.url.query)

    @fal.endpoint("/marks")
    async def marked(self) -> list[str]:
        return self.marks


def make_app(app_name: str, **settings: Any) -> type[fal.App]:
    """Give an app of this name; `settings` are class keywords."""

    class Named(Talks, name=app_name, **settings): ...

    return Named
