"""Apps of a notebook on the other side: their class travels by value, `App` itself by reference."""

from __future__ import annotations

import json
import subprocess
import sys

CELLS = """
import abc
import enum
import sys
from typing import Optional

import fal_notebook as fal
from pydantic import BaseModel


class Size(enum.Enum):
    small = "small"
    large = "large"


class Input(BaseModel):
    prompt: str
    size: Size = Size.small


class Output(BaseModel):
    text: str


SUFFIX = "!"


# ABCs of Python 3.10 cannot have a keyword of that name.
NAMED = {"name": "the-base"} if sys.version_info >= (3, 11) else {}


class Base(fal.App, abc.ABC, keep_alive=7, **NAMED):
    machine_type = "GPU"

    @fal.endpoint("/check", health_check=fal.HealthCheck(timeout_seconds=4))
    def check(self) -> dict:
        return {}

    @fal.endpoint("/gone")
    def gone(self) -> None: ...


class Mixin:
    @fal.endpoint("/other", health_check=fal.HealthCheck())
    def other(self) -> None: ...


class __(Mixin, Base, max_multiplexing=3):
    app_name = "the-app"
    request_timeout = 0
    image = None

    def setup(self):
        self.suffix = SUFFIX

    def other(self) -> None: ...  # no route any more: else there were two health checks

    def gone(self) -> None: ...

    @fal.endpoint("/")
    def generate(self, body: Input) -> Output:
        return Output(text=body.prompt + self.suffix)

    @fal.endpoint("/scalar")
    def scalar(self, prompt: str, size: Optional[Size] = None) -> dict:
        return {"prompt": prompt, "size": size}
"""

SENDER = (
    CELLS
    + """
import base64, sys
import cloudpickle

sys.stdout.write(base64.b64encode(cloudpickle.dumps(__, protocol=5)).decode())
"""
)

RECEIVER = """
import asyncio, base64, json, sys
import pickle
import fal_agent.runtime.app
import httpx
from fal_agent.serving.http import build_application

cls = pickle.loads(base64.b64decode(sys.stdin.read()))
app = cls(_allow_init=True)
application = build_application(app)


async def answers():
    client = httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://x")
    async with app.lifespan(application), client:
        model = await client.post("/", json={"prompt": "hi"})
        scalar = await client.post("/scalar", json={"prompt": "hi", "size": "large"})
        return [model.json(), scalar.json()]


config = cls.get_health_check_config()
print(json.dumps({
    "is_app": issubclass(cls, fal_agent.runtime.app.App),
    "app_name": cls.app_name,
    "base_name": next(base for base in cls.__mro__ if base.__name__ == "Base").app_name,
    "host_kwargs": {name: repr(value) for name, value in cls.host_kwargs.items()},
    "machine_type": cls.machine_type,
    "endpoints": cls.get_endpoints(),
    "routes": [signature.path for signature in app.collect_routes()],
    "check": [config.path, config.timeout_seconds],
    "same_check": cls.host_kwargs["health_check_config"] is config,
    "answers": asyncio.run(answers()),
}))
"""


def python(code: str, given: str = "") -> str:
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_class_of_a_notebook_is_the_same_on_the_other_side() -> None:
    """The subclass hook runs again there, on a class that is still empty."""
    arrived = json.loads(python(RECEIVER, python(SENDER)))

    assert arrived["is_app"]
    assert (arrived["app_name"], arrived["base_name"]) == ("the-app", "the-base")
    assert arrived["machine_type"] == "GPU"
    assert arrived["endpoints"] == ["/check", "/", "/scalar"]
    assert arrived["routes"] == ["/", "/check", "/scalar"]
    assert arrived["check"] == ["/check", 4]
    assert arrived["same_check"]
    kwargs = arrived["host_kwargs"]
    assert (kwargs["keep_alive"], kwargs["max_multiplexing"], kwargs["request_timeout"]) == ("7", "3", "0")
    assert kwargs["resolver"] == "'uv'"
    assert arrived["answers"] == [{"text": "hi!"}, {"prompt": "hi", "size": "large"}]


TEXTS = """
from __future__ import annotations

import base64, sys
from typing import Annotated

import cloudpickle
from fastapi import Depends, Header
from pydantic import BaseModel

import fal_notebook as fal
from fal_agent.serving.signatures import resolved_annotations


class User(BaseModel):
    name: str


Limit = Annotated[int, Header()]


class Page:
    def __init__(self, limit: Limit = 7):
        self.limit = limit


class Greeting:
    def __call__(self, page: Annotated[Page, Depends()]) -> str:
        return f"hello x {page.limit}"


def user(body: User, greeting: Annotated[str, Depends(Greeting())]) -> User:
    return User(name=f"{greeting} {body.name}")


class __(fal.App, name="texts"):
    @fal.endpoint("/")
    def generate(self, who: Annotated[User, Depends(user)], page: Page = Depends(Page)) -> dict:
        return {"text": who.name, "limit": page.limit}

    @fal.endpoint("/scalar")
    def scalar(self, prompt: str) -> dict:
        return {"prompt": prompt}


with resolved_annotations(__):
    sent = cloudpickle.dumps(__, protocol=5)
assert user.__annotations__["body"] == "User"
sys.stdout.write(base64.b64encode(sent).decode())
"""


def test_texts_of_what_an_endpoint_depends_on_travel_too() -> None:
    """What they name is named by no code that travels."""
    receiver = RECEIVER[: RECEIVER.index("config =")] + "print(json.dumps(asyncio.run(answers())))\n"
    receiver = receiver.replace('json={"prompt": "hi"}', 'json={"name": "you"}, headers={"limit": "3"}', 1)

    arrived = json.loads(python(receiver, python(TEXTS)))

    assert arrived == [{"text": "hello x 3 you", "limit": 3}, {"prompt": "hi"}]
