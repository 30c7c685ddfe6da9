"""Routes whose plain parameters are all scalars: they come in the query or as one JSON object.

Runs in the process that serves an app. FastAPI reads scalars from the query alone; here the body may
hold them too, some or all, and a value in the body goes before one in the query. Everything else about
a route (other parameters, the answer, the documentation) is FastAPI's.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

from fastapi import Depends, Request, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from fal_agent.serving.signatures import resolved_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.responses import Response

__all__ = ["ScalarRoute"]

_VALUES = "fal_scalar_values"  # name of the parameter that stands for all scalars
_MISSING = object()


class ScalarRoute(APIRoute):
    """A route that also takes its scalars from a JSON body.

    Attributes:
        scalars: names of the parameters that may come in the body; empty if FastAPI reads the body.
    """

    scalars: tuple[str, ...] = ()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Give what answers a request: FastAPI calls it once, when the route is made."""
        fields = _scalar_fields(self)
        if not fields:
            return super().get_route_handler()
        self.scalars = tuple(field.name for field in fields)
        # A handler that takes the request may read the body itself, so then nothing in it is an error.
        reader = _Reader(fields, is_strict=self.dependant.request_param_name is None)
        inner = APIRoute(
            self.path,
            _with_reader(self.endpoint, reader, self.scalars),
            response_model=self.response_model,
            status_code=self.status_code,
            response_class=self.response_class,
            methods=self.methods,
            name=self.name,
        )
        return inner.get_route_handler()


def _scalar_fields(route: APIRoute) -> list[Any]:
    endpoint = route.endpoint
    if route.body_field is not None or inspect.isgeneratorfunction(endpoint):
        return []
    if inspect.isasyncgenfunction(endpoint):
        return []
    plain = {name for name, parameter in resolved_parameters(endpoint).items() if not _is_declared(parameter)}
    return [field for field in route.dependant.query_params if field.name in plain]


def _is_declared(parameter: inspect.Parameter) -> bool:
    """Whether a parameter says by itself where it comes from (Query, Header, Depends and so on)."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    return any(isinstance(item, (params.Param, params.Depends)) for item in (parameter.default, *metadata))


def _annotated(info: Any) -> Any:
    return Annotated[info.annotation, info]  # the type with its bounds


class _Reader:
    """Reads and validates the scalars of one request.

    Args:
        fields: FastAPI's description of each.
        is_strict: whether a JSON body that is not an object is an error.
    """

    def __init__(self, fields: list[Any], *, is_strict: bool) -> None:
        self._fields = {field.name: field.field_info for field in fields}
        self._adapters: dict[str, TypeAdapter[Any]] = {
            name: TypeAdapter(_annotated(info)) for name, info in self._fields.items()
        }
        self._is_strict = is_strict

    async def read(self, request: Request) -> dict[str, Any]:
        """Give the value of each scalar.

        Raises:
            RequestValidationError: one is missing or wrong, or the body is not a JSON object.
        """
        body = await self._body(request)
        values: dict[str, Any] = {}
        errors: list[Any] = []
        for name, info in self._fields.items():
            place, given = "body", _MISSING if body is None else body.get(name, _MISSING)
            if given is _MISSING:
                place, given = "query", request.query_params.get(name, _MISSING)
            if given is not _MISSING:
                try:
                    values[name] = self._adapters[name].validate_python(given)
                except ValidationError as error:
                    errors += [
                        {**item, "loc": (place, name, *item["loc"])}
                        for item in error.errors(include_url=False)
                    ]
            elif info.is_required():
                place = "query" if body is None else "body"
                errors.append(_problem("missing", (place, name), "Field required", body))
            else:
                values[name] = info.get_default(call_default_factory=True)
        if errors:
            raise RequestValidationError(errors, body=body)
        return values

    async def _body(self, request: Request) -> Optional[dict[str, Any]]:
        """Give the JSON object in the body; None if there is no JSON."""
        if not _is_json(request.headers.get("content-type", "")):
            return None
        content = await request.body()
        if not content.strip():
            return None
        problem = None
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            place = ("body", getattr(error, "pos", 0))
            problem = _problem("json_invalid", place, "JSON decode error", {}, error=str(error))
            body = None
        else:
            if isinstance(body, dict):
                return body
            problem = _problem("dict_type", ("body",), "Input should be a valid dictionary", body)
        if self._is_strict:
            raise RequestValidationError([problem], body=body)
        return None


def _problem(kind: str, place: tuple[Any, ...], message: str, given: Any, **context: Any) -> dict[str, Any]:
    problem = {"type": kind, "loc": place, "msg": message, "input": given}
    return {**problem, "ctx": context} if context else problem


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


def _with_reader(
    function: Callable[..., Any], reader: _Reader, scalars: tuple[str, ...]
) -> Callable[..., Any]:
    """Make the function that FastAPI calls: its scalars come from the reader, the rest as ever."""

    async def call_async(**given: Any) -> Any:
        return await function(**given.pop(_VALUES), **given)

    def call(**given: Any) -> Any:
        return function(**given.pop(_VALUES), **given)

    chosen: Any = call_async if inspect.iscoroutinefunction(function) else call
    others = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in resolved_parameters(function).items()
        if name not in scalars
    ]
    values = inspect.Parameter(_VALUES, inspect.Parameter.KEYWORD_ONLY, default=Depends(reader.read))
    chosen.__name__ = getattr(function, "__name__", "endpoint")
    chosen.__signature__ = inspect.Signature([*others, values])  # what FastAPI reads
    return cast("Callable[..., Any]", chosen)
