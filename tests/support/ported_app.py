"""An app as people write them for the fal SDK, with only its import changed: much of what they use."""

from __future__ import annotations

import abc
import asyncio
import json
import logging
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import BackgroundTasks, Depends, Header, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

import fal_notebook as fal
from fal_notebook.exceptions import AppException, FieldException
from fal_notebook.toolkit import FalBaseModel, File, Hidden

logger = logging.getLogger(__name__)
lock = threading.Lock()
jobs: dict[str, int] = {}
T = TypeVar("T")


class Style(str, Enum):
    """How it looks."""

    plain = "plain"
    fancy = "fancy"


class Input(FalBaseModel):
    """What is wanted."""

    FIELD_ORDERS = ["prompt", "style"]
    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="The prompt", examples=["a cat"])
    count: int = Field(default=1, ge=1, le=8)
    style: Style = Style.plain
    format: Literal["png", "jpeg"] = "png"
    seed: int | None = None
    trace: bool = Hidden(Field(default=False))

    @field_validator("prompt")
    @classmethod
    def no_shouting(cls, value: str) -> str:
        """Refuse capitals."""
        if value.isupper():
            raise ValueError("do not shout")
        return value


class Item(BaseModel):
    """One of what was made."""

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    at: float = Field(default_factory=time.time)
    text: str = ""


class Page(BaseModel, Generic[T]):
    """Several of them."""

    items: list[T]
    who: str


@dataclass
class Config:
    """Settings that the whole app shares."""

    suffix: str = "!"


CONFIG = Config()


class Engine(abc.ABC):
    """What makes texts."""

    @abc.abstractmethod
    def make(self, text: str) -> str:
        """Make one."""


class Shouting(Engine):
    """Makes them loud."""

    def make(self, text: str) -> str:
        """Make one."""
        return text.upper() + CONFIG.suffix


class User:
    """Who asks."""

    def __init__(self, x_user: Annotated[str, Header()] = "nobody") -> None:
        self.name = x_user


def known_user(user: Annotated[User, Depends()]) -> User:
    """Refuse some."""
    if user.name == "evil":
        raise HTTPException(status_code=401, detail="not you")
    return user


@fal.cached
def load_engine() -> Engine:
    """Stand for what takes long to load."""
    return Shouting()


class Common:
    """What several apps share."""

    def label(self, text: str) -> str:
        """Give it a label."""
        return f"<{text}>"


class Ported(Common, fal.App, keep_alive=300, max_multiplexing=4):
    """The app."""

    machine_type = ["GPU-H100", "S"]
    request_timeout = 60
    startup_timeout = 600

    async def setup(self) -> None:
        """Load, and keep something going."""
        self.engine, self.pool, self.ticks = load_engine(), ThreadPoolExecutor(2), 0

        async def tick() -> None:
            while True:
                self.ticks += 1
                await asyncio.sleep(0.01)

        self.ticking = asyncio.create_task(tick())
        await self.generate(Input(prompt="warm"), Response(), User())

    async def teardown(self) -> None:
        """Let go."""
        self.ticking.cancel()
        print("torn down", flush=True)

    @fal.endpoint("/")
    async def generate(
        self, input: Input, response: Response, user: Annotated[User, Depends(known_user)]
    ) -> Page[Item]:
        """Make what is wanted."""
        with lock:
            loop = asyncio.get_running_loop()
            text = await loop.run_in_executor(self.pool, self.engine.make, input.prompt)
        logger.info("made %s", text)
        response.headers["x-fal-billable-units"] = str(input.count)
        return Page[Item](items=[Item(text=self.label(text)) for _ in range(input.count)], who=user.name)

    @fal.endpoint("/fail")
    def fail(self, kind: str) -> dict[str, Any]:
        """Fail in one of several ways."""
        if kind == "http":
            raise HTTPException(status_code=400, detail={"reason": "bad"})
        if kind == "app":
            raise AppException(message="no good", status_code=418)
        if kind == "field":
            raise FieldException("prompt", "no such prompt")
        raise ZeroDivisionError(kind)

    @fal.endpoint("/stream")
    def stream(self, input: Input) -> StreamingResponse:
        """Give word by word."""

        def events() -> Any:
            for word in input.prompt.split():
                yield f"data: {json.dumps({'word': word})}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @fal.endpoint("/later")
    def later(self, tasks: BackgroundTasks, number: int = Query(1, ge=0)) -> dict[str, Any]:
        """Do something when the answer is gone."""
        before = dict(jobs)
        tasks.add_task(jobs.__setitem__, "number", number)
        return {"before": before, "has_ticked": self.ticks > 0}

    @fal.endpoint("/file")
    def file(self, file: File, request: Request) -> FileResponse:
        """Give a file back that was given by URL, and say who asked."""
        path = file.save(Path(tempfile.mkdtemp()) / "given.txt", overwrite=True)
        return FileResponse(path, headers={"x-agent": request.headers.get("user-agent", "")})

    @fal.realtime("/realtime", buffering=5)
    async def count(self, input: Input) -> AsyncIterator[Item]:
        """Count."""
        for number in range(input.count):
            yield Item(id=str(number), at=0.0, text=input.prompt)
