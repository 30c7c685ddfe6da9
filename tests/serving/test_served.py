"""A function as something that can be served."""

from __future__ import annotations

import asyncio
import functools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pydantic import BaseModel

import fal_notebook as fal
from fal_agent.serving.http import build_application
from fal_agent.serving.served import ServedFunction, servable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class Input(BaseModel):
    x: int


class Output(BaseModel):
    y: int


@asynccontextmanager
async def client_of(served: ServedFunction) -> AsyncIterator[httpx.AsyncClient]:
    application = build_application(served)
    transport = httpx.ASGITransport(application)  # type: ignore[arg-type]
    async with (
        served.lifespan(application),
        httpx.AsyncClient(transport=transport, base_url="http://x") as client,
    ):
        yield client


def answers(served: ServedFunction, **request: Any) -> Any:
    """What the function answers to one request."""

    async def ask() -> Any:
        async with client_of(served) as client:
            return (await client.post("/", **request)).json()

    return asyncio.run(ask())


def double(body: Input) -> Output:
    return Output(y=body.x * 2)


async def double_later(body: Input) -> Output:
    return double(body)


async def load_later() -> int:
    return 10


def add(first: int, x: int, *, y: int = 1) -> int:
    return first + x + y


async def add_later(first: int, x: int, *, y: int = 1) -> int:
    return add(first, x, y=y)


def plus(x: int, y: int = 1) -> int:
    return x + y


class Adder:
    """A callable that is no function."""

    def __call__(self, x: int, y: int = 1) -> int:
        return x + y


@pytest.mark.parametrize("function", [double, double_later])
def test_its_annotations_are_those_of_the_route(function: Callable[..., Any]) -> None:
    """Though they are texts in this file, which is not the one that makes the route."""
    served = ServedFunction(function)

    assert answers(served, json={"x": 4}) == {"y": 8}
    assert answers(served, json={"x": "four"})["detail"][0]["type"] == "int_parsing"
    operation = served.openapi()["paths"]["/"]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/Output"}


@pytest.mark.parametrize("function", [add, add_later])
@pytest.mark.parametrize("setup", [lambda: 10, load_later])
def test_the_setup_functions_value_is_the_first_argument(
    function: Callable[..., Any], setup: Callable[[], Any]
) -> None:
    served = ServedFunction(function, setup)

    assert answers(served, json={"x": 1}) == 12
    assert answers(served, params={"x": 1, "y": 5}) == 16
    parameters = served.openapi()["paths"]["/"]["post"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["x", "y"]


@pytest.mark.parametrize("function", [functools.partial(add, 10), Adder(), fal.cached(plus)])
def test_other_callables_are_served_too(function: Any) -> None:
    assert answers(ServedFunction(function), json={"x": 1, "y": 2}) in (3, 13)


def test_an_app_stays_what_it_is() -> None:
    class Small(fal.App):
        @fal.endpoint("/")
        def run(self) -> None: ...

    assert isinstance(servable(Small), Small)
    assert servable(add).app_name == "add"  # type: ignore[attr-defined]
