"""A `FalBaseModel` validates as any model does, and its schema says how a form is to show it."""

from __future__ import annotations

import pydantic
import pytest

from fal_notebook.toolkit import FalBaseModel, Field, Hidden


class Request(FalBaseModel):
    FIELD_ORDERS = ["prompt", "size"]

    seed: int = 1
    size: int = Field(default=512, alias="imageSize")
    prompt: str = Field(description="what to draw")
    debug: bool = Hidden(Field(default=False, json_schema_extra={"ui": {"important": False}}))
    trace: list[str] = Hidden(Field(default_factory=list))


def test_it_validates_as_any_model() -> None:
    request = Request(prompt="a cat", imageSize=4, debug=True)

    assert (request.prompt, request.size, request.debug, request.trace) == ("a cat", 4, True, [])
    with pytest.raises(pydantic.ValidationError, match="prompt"):
        Request(imageSize=4)


def test_fields_are_listed_in_the_order_that_was_asked_for() -> None:
    properties = Request.model_json_schema()["properties"]

    assert list(properties) == ["prompt", "imageSize", "seed", "debug", "trace"]
    assert list(Request.model_json_schema(by_alias=False)["properties"])[:2] == ["prompt", "size"]
    assert properties["prompt"]["description"] == "what to draw"


def test_hidden_fields_are_marked_and_no_others() -> None:
    properties = Request.model_json_schema()["properties"]

    assert [name for name, shown in properties.items() if shown.get("ui", {}).get("hidden")] == [
        "debug",
        "trace",
    ]


def test_a_model_inside_another_and_one_that_inherits_keep_theirs() -> None:
    class Longer(Request):
        SCHEMA_IGNORES = {"seed"}

        steps: int = 3

    class Outer(pydantic.BaseModel):
        items: list[Longer]

    properties = Outer.model_json_schema()["$defs"]["Longer"]["properties"]

    assert list(properties) == ["prompt", "imageSize", "seed", "debug", "trace", "steps"]
    assert properties["seed"]["ui"] == {"hidden": True}
    assert properties["debug"]["ui"]["hidden"]


def test_a_field_that_is_hidden_needs_a_default() -> None:
    with pytest.raises(ValueError, match="needs a default"):
        Hidden(Field(description="required"))
    with pytest.raises(TypeError, match="not bool"):
        Hidden(False)
