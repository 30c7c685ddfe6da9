"""`fal.toolkit.FalBaseModel`: a model that says how a form is to show its fields.

Runs in workers; needs pydantic 2.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, Field, GetJsonSchemaHandler
from pydantic.fields import FieldInfo

__all__ = ["FalBaseModel", "Field", "Hidden"]

T = TypeVar("T")
_HIDDEN = "fal: hidden"


def Hidden(field: T) -> T:  # noqa: N802 - the SDK's name
    """Mark a field of a `FalBaseModel` as one that forms do not show.

    Used as in `flag: bool = Hidden(Field(default=False))`.

    Args:
        field: what `Field` gave, with a default: nobody could fill it in.

    Returns:
        The same field.

    Raises:
        TypeError: it is no field.
        ValueError: it has no default.
    """
    if not isinstance(field, FieldInfo):
        raise TypeError(
            f"Hidden takes what Field gives, as in Hidden(Field(default=1)), not {type(field).__name__}"
        )
    if field.is_required():
        raise ValueError("a hidden field needs a default or a default_factory, since nobody can fill it in")
    field.metadata = [*field.metadata, _HIDDEN]
    return field


class FalBaseModel(BaseModel):
    """A model whose JSON schema, and so an app's OpenAPI document, says how a form is to show it.

    Attributes:
        FIELD_ORDERS: names of the fields that come first, in this order; the others follow.
        SCHEMA_IGNORES: names of fields that are marked as `Hidden` marks them.
    """

    FIELD_ORDERS: ClassVar[list[str]] = []
    SCHEMA_IGNORES: ClassVar[set[str]] = set()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> Any:
        """Order and mark the properties of what pydantic makes."""
        schema = handler(core_schema)
        shown = handler.resolve_ref_schema(schema)
        properties: dict[str, Any] = shown.get("properties", {})
        keys = {name: _key(name, field, properties) for name, field in cls.model_fields.items()}
        for name, field in cls.model_fields.items():
            if keys[name] and (_HIDDEN in field.metadata or name in cls.SCHEMA_IGNORES):
                properties[keys[name]].setdefault("ui", {})["hidden"] = True
        first = [keys[name] for name in cls.FIELD_ORDERS if keys.get(name)]
        if first:
            shown["properties"] = {key: properties[key] for key in [*first, *properties]}
        return schema


def _key(name: str, field: FieldInfo, properties: dict[str, Any]) -> str:
    """What a schema calls a field; nothing if it leaves it out."""
    names = (field.serialization_alias, field.alias, name)
    return next((key for key in names if key is not None and key in properties), "")
