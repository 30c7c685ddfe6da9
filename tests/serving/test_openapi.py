"""The OpenAPI document: what is added to FastAPI's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fastapi  # noqa: TC002 - read by FastAPI
import pytest
from pydantic import BaseModel

import fal_notebook as fal
from fal_agent.errors import FalServerlessException
from fal_agent.runtime.routes import RouteSignature, mark
from fal_agent.serving.http import build_application

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.apps import Served

    Serve = Callable[..., Served]


class Inner(BaseModel):
    z: int
    a: int


class Properties(BaseModel):
    properties: Inner | None = None
    first: int = 0


class Input(BaseModel):
    prompt: str
    inner: Inner


class Output(BaseModel):
    text: str


def realtime(signature: RouteSignature) -> Callable[[Any], Any]:
    """Mark a method as the realtime decorator does."""

    def marker(original: Any) -> Any:
        async def run(self: Any, websocket: Any) -> None: ...

        run.__name__, run.__doc__ = original.__name__, original.__doc__
        run.original_func = original  # type: ignore[attr-defined]
        return mark(run, signature)

    return marker


class Documented(fal.App):
    @fal.endpoint("/z")
    def last(self, body: Input) -> Output: ...

    @fal.endpoint("/a")
    def first(self, body: Properties) -> Output: ...

    @fal.endpoint("/a", is_websocket=True)
    async def first_raw(self, websocket: fastapi.WebSocket) -> None: ...

    @fal.endpoint("/raw", is_websocket=True)
    async def raw(self, websocket: fastapi.WebSocket) -> None: ...

    @realtime(
        RouteSignature(
            "/realtime",
            is_websocket=True,
            input_modal=Input,
            output_modal=Output,
            realtime_mode="unary",
            content_type="application/msgpack",
            buffering=5,
            session_timeout=10,
            max_batch_size=4,
        )
    )
    def live(self, body: Input) -> Output:
        """Answer at once."""

    @realtime(RouteSignature("/untyped", is_websocket=True, realtime_mode="bidi"))
    async def untyped(self, inputs: Any) -> Any: ...


@pytest.fixture
def document() -> dict[str, Any]:
    return Documented(_allow_init=True).openapi()


def test_the_document_is_served_too(serve: Serve, document: dict[str, Any]) -> None:
    assert serve(Documented).client.get("/openapi.json").json() == document


def test_paths_are_in_the_order_of_routes_and_websockets_last(document: dict[str, Any]) -> None:
    assert document["x-fal-order-paths"] == ["/a", "/z", "/health", "/raw", "/realtime", "/untyped"]


def test_asking_again_repeats_nothing() -> None:
    application = build_application(Documented(_allow_init=True))

    first = application.openapi()

    assert application.openapi() == first
    assert len(set(first["x-fal-order-paths"])) == len(first["x-fal-order-paths"])


def test_properties_have_an_order(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    assert schemas["Inner"]["x-fal-order-properties"] == ["z", "a"]
    assert schemas["Input"]["x-fal-order-properties"] == ["prompt", "inner"]
    assert schemas["Properties"]["x-fal-order-properties"] == ["properties", "first"]
    assert set(schemas["Properties"]["properties"]) == {"properties", "first"}


def test_properties_within_all_of_have_an_order_too() -> None:
    def extra(schema: dict[str, Any]) -> None:
        schema["allOf"] = [{"type": "object", "properties": {"z": {}, "a": {}}}]

    class Combined(BaseModel):
        model_config = {"json_schema_extra": extra}

    class Combining(fal.App):
        @fal.endpoint("/")
        def run(self, body: Any) -> None: ...

    Combining.run.__annotations__["body"] = Combined
    schema = Combining(_allow_init=True).openapi()["components"]["schemas"]["Combined"]

    assert schema["allOf"][0]["x-fal-order-properties"] == ["z", "a"]


def test_a_raw_websocket_has_its_type_and_nothing_of_realtime(document: dict[str, Any]) -> None:
    assert document["paths"]["/raw"] == {
        "x-fal-protocol": {
            "type": "websocket",
            "operationId": "raw",
            "config": {"buffering": None, "sessionTimeout": None, "maxBatchSize": 1},
        }
    }


def test_a_path_may_have_an_endpoint_and_a_websocket(document: dict[str, Any]) -> None:
    shared = document["paths"]["/a"]

    assert shared["x-fal-protocol"]["operationId"] == "first_raw"
    assert shared["post"]["operationId"].startswith("first")


def test_a_realtime_route_has_its_settings_and_a_mirror_of_its_models(document: dict[str, Any]) -> None:
    route = document["paths"]["/realtime"]

    assert route["x-fal-protocol"] == {
        "type": "realtime",
        "operationId": "live",
        "config": {"buffering": 5, "sessionTimeout": 10, "maxBatchSize": 4},
        "contentType": "application/msgpack",
        "realtimeMode": "unary",
    }
    post = route["post"]
    assert post["operationId"] == "live_post"
    assert post["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Input"
    }
    assert post["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Output"
    }
    assert {"Input", "Output"} <= set(document["components"]["schemas"])


def test_a_realtime_route_without_models_has_no_mirror(document: dict[str, Any]) -> None:
    route = document["paths"]["/untyped"]

    assert set(route) == {"x-fal-protocol"}
    assert "contentType" not in route["x-fal-protocol"]


def test_the_mirror_is_not_served(serve: Serve) -> None:
    assert serve(Documented).client.post("/realtime", json={}).status_code == 404


def test_a_document_that_cannot_be_made_says_so_with_its_cause() -> None:
    class Empty(fal.App):
        pass

    with pytest.raises(
        FalServerlessException, match="Failed to generate OpenAPI metadata for function"
    ) as info:
        Empty(_allow_init=True).openapi()

    assert isinstance(info.value.__cause__, ValueError)
