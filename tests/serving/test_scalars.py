"""Endpoints whose plain parameters are scalars: in the query, in a JSON body, or in both."""

from __future__ import annotations

import enum
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Optional

import pytest
from fastapi import BackgroundTasks, Depends, Header, Query, Request, Response
from pydantic import BaseModel, Field

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.apps import Served

    Serve = Callable[..., Served]

JSON = {"content-type": "application/json"}


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Model(BaseModel):
    x: int


def seven(n: int = 7) -> int:
    return n


class Scalars(fal.App):  # with `Optional`, since people write that too
    @fal.endpoint("/")
    def generate(self, prompt: str, steps: int = 4, color: Optional[Color] = None) -> dict[str, Any]:  # noqa: UP045
        return {"prompt": prompt, "steps": steps, "color": color}

    @fal.endpoint("/async")
    async def generate_async(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "id": self.current_request.request_id}  # type: ignore[union-attr]

    @fal.endpoint("/nullable")
    def nullable(self, value: Optional[int], other: Optional[int] = 3) -> list[Any]:  # noqa: UP045
        return [value, other]

    @fal.endpoint("/types")
    def types(self, number: float, flag: bool, key: uuid.UUID, anything=None) -> list[Any]:  # type: ignore[no-untyped-def]
        return [number, flag, key, anything]

    @fal.endpoint("/bounds")
    def bounds(
        self, steps: Annotated[int, Field(gt=0, le=10)] = 2, model_json: str = "", json: str = ""
    ) -> int:
        return steps

    @fal.endpoint("/injected")
    def injected(  # noqa: PLR0917 - one of each kind
        self,
        prompt: str,
        request: Request,
        response: Response,
        tasks: BackgroundTasks,
        tags: Annotated[list[str], Query()],
        x_token: Annotated[str, Header()] = "none",
        extra: int = Depends(seven),
    ) -> list[Any]:
        response.headers["x-own"] = "yes"
        return [prompt, request.method, x_token, extra, tags]

    @fal.endpoint("/model")
    def model(self, body: Model, scale: int = 1) -> int:
        return body.x * scale

    @fal.endpoint("/items/{item}")
    def item(self, item: int, note: str) -> list[Any]:
        return [item, note]

    @fal.endpoint("/nothing")
    def nothing(self) -> str:
        return "nothing"


@pytest.mark.parametrize("path", ["/?prompt=a&steps=5&color=red"])
def test_scalars_come_in_the_query(serve: Serve, path: str) -> None:
    """As FastAPI reads them."""
    assert serve(Scalars).client.post(path).json() == {"prompt": "a", "steps": 5, "color": "red"}


def test_scalars_come_in_a_json_body(serve: Serve) -> None:
    client = serve(Scalars).client

    assert client.post("/", json={"prompt": "a"}).json() == {"prompt": "a", "steps": 4, "color": None}
    assert client.post("/", json={"prompt": "a", "steps": 5, "color": "blue", "more": 1}).json() == {
        "prompt": "a",
        "steps": 5,
        "color": "blue",
    }
    assert client.post("/async", json={"prompt": "a"}, headers={"x-fal-request-id": "r"}).json() == {
        "prompt": "a",
        "id": "r",
    }


def test_the_body_goes_before_the_query_and_both_may_be_mixed(serve: Serve) -> None:
    client = serve(Scalars).client

    assert client.post("/?steps=9", json={"prompt": "a"}).json()["steps"] == 9
    assert client.post("/?prompt=query&steps=9", json={"prompt": "body"}).json()["prompt"] == "body"


def test_null_is_a_value(serve: Serve) -> None:
    client = serve(Scalars).client

    assert client.post("/nullable", json={"value": None, "other": None}).json() == [None, None]
    assert client.post("/nullable", json={"value": 1}).json() == [1, 3]
    assert client.post("/", json={"prompt": None}).status_code == 422


def test_values_of_a_body_keep_their_types(serve: Serve) -> None:
    client, key = serve(Scalars).client, str(uuid.uuid4())

    assert client.post("/types", json={"number": 1, "flag": False, "key": key, "anything": [{}]}).json() == [
        1.0,
        False,
        key,
        [{}],
    ]
    assert client.post("/", json={"prompt": 5}).json()["detail"][0]["type"] == "string_type"


def test_what_is_wrong_is_told_with_its_place(serve: Serve) -> None:
    client = serve(Scalars).client

    in_query = client.post("/?steps=x").json()["detail"]
    in_body = client.post("/?color=green", json={"steps": "x"}).json()["detail"]

    assert [(item["loc"], item["type"]) for item in in_query] == [
        (["query", "prompt"], "missing"),
        (["query", "steps"], "int_parsing"),
    ]
    assert [(item["loc"], item["type"]) for item in in_body] == [
        (["body", "prompt"], "missing"),
        (["body", "steps"], "int_parsing"),
        (["query", "color"], "enum"),
    ]


def test_bounds_hold_and_names_of_pydantic_are_ordinary_ones(serve: Serve) -> None:
    client = serve(Scalars).client

    assert client.post("/bounds", json={"steps": 10, "model_json": "a", "json": "b"}).json() == 10
    assert client.post("/bounds", json={"steps": 11}).json()["detail"][0]["type"] == "less_than_equal"
    assert client.post("/bounds?steps=0").json()["detail"][0]["type"] == "greater_than"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"[1]", "dict_type"),
        (b'"text"', "dict_type"),
        (b"{", "json_invalid"),
        (b"\xff", "json_invalid"),
        (b"[" * 100_000, "json_invalid"),
        (b"9" * 5000, "json_invalid"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(serve: Serve, content: bytes, kind: str) -> None:
    told = serve(Scalars).client.post("/?prompt=a", content=content, headers=JSON)

    assert told.status_code == 422
    assert told.json()["detail"][0]["type"] == kind


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_said_to_be_json_is_not_read(serve: Serve, kind: str) -> None:
    headers = {"content-type": kind} if kind else {}

    assert serve(Scalars).client.post("/?prompt=a", content=b"{oops", headers=headers).status_code == 200


def test_an_empty_body_is_none(serve: Serve) -> None:
    assert serve(Scalars).client.post("/?prompt=a", content=b" ", headers=JSON).status_code == 200


def test_everything_else_is_still_injected(serve: Serve) -> None:
    told = serve(Scalars).client.post(
        "/injected?tags=a&tags=b&n=1", json={"prompt": "p"}, headers={"x-token": "t"}
    )

    assert told.json() == ["p", "POST", "t", 1, ["a", "b"]]
    assert told.headers["x-own"] == "yes"


def test_a_handler_that_takes_the_request_may_get_any_body(serve: Serve) -> None:
    """It may read the body itself, so nothing in it is an error."""
    told = serve(Scalars).client.post("/injected?prompt=p&tags=a", content=b"[1", headers=JSON)

    assert told.json()[0] == "p"


def test_beside_a_model_scalars_stay_in_the_query(serve: Serve) -> None:
    client = serve(Scalars).client

    assert client.post("/model?scale=3", json={"x": 2}).json() == 6
    assert client.post("/model", json={"x": 2, "scale": 3}).json() == 2


def test_parameters_of_the_path_stay_there(serve: Serve) -> None:
    assert serve(Scalars).client.post("/items/3", json={"note": "n", "item": 4}).json() == [3, "n"]


def test_an_endpoint_without_parameters_ignores_the_body(serve: Serve) -> None:
    assert serve(Scalars).client.post("/nothing", content=b"{", headers=JSON).json() == "nothing"


def test_the_document_tells_of_both_ways(serve: Serve) -> None:
    paths = Scalars(_allow_init=True).openapi()["paths"]

    operation = paths["/"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert [(item["name"], item["in"], item["required"]) for item in operation["parameters"]] == [
        ("prompt", "query", False),
        ("steps", "query", False),
        ("color", "query", False),
    ]
    assert (list(schema["properties"]), schema["required"]) == (["prompt", "steps", "color"], ["prompt"])
    assert operation["requestBody"]["required"] is False
    assert list(
        paths["/injected"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    ) == ["prompt"]
    assert "requestBody" not in paths["/nothing"]["post"]
