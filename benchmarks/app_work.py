"""What the application of the apps benchmark does, whoever serves it."""

from __future__ import annotations

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel

__all__ = ["Prompt", "echo", "size"]


class Prompt(BaseModel):
    """What is asked."""

    prompt: str


async def echo(websocket: WebSocket) -> None:
    """Send back whatever comes, until the client leaves."""
    await websocket.accept()
    try:
        while True:
            await websocket.send_bytes(await websocket.receive_bytes())
    except WebSocketDisconnect:
        return


def size(prompt: Prompt) -> dict[str, int]:
    """Answer with the length of what came."""
    return {"length": len(prompt.prompt)}
