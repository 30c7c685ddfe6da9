"""The application of the apps benchmark, as FastAPI alone serves it."""

from __future__ import annotations

from app_work import echo, size
from fastapi import FastAPI

__all__ = ["app"]

app = FastAPI()
app.post("/")(size)
app.websocket("/echo")(echo)
