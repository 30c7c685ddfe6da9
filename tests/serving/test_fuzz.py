"""Whatever a caller sends, an app answers, and never with a 500."""

from __future__ import annotations

import enum
import uuid  # noqa: TC003 - read by FastAPI
from typing import Annotated, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from pydantic import BaseModel, Field
from schemathesis import GenerationMode

import fal_notebook as fal
from fal_agent.serving.http import build_application


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Inner(BaseModel):
    weights: list[float] = []
    data: dict[str, Any] = {}


class Input(BaseModel):
    prompt: str
    steps: Annotated[int, Field(ge=1, le=50)] = 4
    color: Color | None = None
    inner: Inner | None = None


class Sample(fal.App):
    @fal.endpoint("/model")
    def model(self, body: Input) -> Input:
        return body

    @fal.endpoint("/scalars")
    def scalars(
        self, prompt: str, steps: int = 4, color: Color | None = None, key: uuid.UUID | None = None
    ) -> dict[str, Any]:
        return {"prompt": prompt, "steps": steps, "color": color, "key": key}

    @fal.endpoint("/numbers")
    async def numbers(self, number: Annotated[float, Field(ge=0)], flag: bool = False) -> dict[str, Any]:
        return {"number": number, "flag": flag}

    @fal.endpoint("/items/{item}")
    def item(self, item: int, note: str = "") -> str:
        return f"{item} {note}"

    @fal.endpoint("/check", health_check=fal.HealthCheck())
    def check(self) -> None: ...


APPLICATION = build_application(Sample(_allow_init=True))
OPERATIONS = [
    result.ok()
    for result in schemathesis.openapi.from_asgi("/openapi.json", APPLICATION).get_all_operations()
]
FUZZING = settings(max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def test_the_document_tells_of_every_endpoint() -> None:
    assert {operation.path for operation in OPERATIONS} == {*Sample.get_endpoints(), "/health"}


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_no_request_makes_an_app_fail(operation: Any, mode: GenerationMode) -> None:
    """Neither one that fits the document nor one that does not."""

    @FUZZING
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call()

        assert response.status_code < 500, response.text
        assert "x-fal-request-id" in response.headers

    try:
        ask()
    except Unsatisfiable:
        pytest.skip("an operation without parameters has no request that does not fit")
