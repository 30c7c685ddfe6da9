"""The OpenAPI document of an app: FastAPI's, plus what FastAPI does not describe.

Runs in the process that serves an app. Added are the order of paths and properties, which JSON objects
do not promise to keep; websockets, which OpenAPI does not know; and the JSON bodies of scalar routes.
Keys beginning with `x-fal-` are those of the fal platform.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Optional

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from fal_agent.serving.scalars import ScalarRoute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastapi import FastAPI

    from fal_agent.runtime.routes import RouteSignature

__all__ = ["describe"]

_JSON = "application/json"


def describe(application: FastAPI, websockets: dict[RouteSignature, Callable[..., Any]]) -> dict[str, Any]:
    """Make the document.

    Args:
        application: the application; its HTTP routes are described as FastAPI does.
        websockets: the websocket routes, realtime ones too, with their handlers.
    """
    posts = {route.path for route in application.routes if isinstance(route, ScalarRoute)}
    mirrors = [
        mirror
        for signature, function in websockets.items()
        if signature.path not in posts and (mirror := _mirror(signature, function)) is not None
    ]
    document = get_openapi(
        title=application.title,
        version=application.version,
        openapi_version=application.openapi_version,
        routes=[*application.routes, *mirrors],
        servers=application.servers or None,
    )
    paths = document["paths"]
    for route in application.routes:
        if isinstance(route, ScalarRoute) and route.scalars:
            _add_body(paths[route.path_format]["post"], route.scalars)
    served = {route.path for route in application.routes if isinstance(route, APIRoute)}
    for signature, function in websockets.items():
        if signature.path not in served:  # to the end, in the order of routes, also what has a mirror already
            paths[signature.path] = paths.pop(signature.path, {})
        paths[signature.path]["x-fal-protocol"] = _protocol(signature, function)
    document["x-fal-order-paths"] = list(paths)
    for schema in _schemas(document):
        _order_properties(schema)
    return document


def _protocol(signature: RouteSignature, function: Callable[..., Any]) -> dict[str, Any]:
    is_realtime = signature.realtime_mode is not None
    protocol: dict[str, Any] = {
        "type": "realtime" if is_realtime else "websocket",
        "operationId": getattr(function, "__name__", "websocket"),
        "config": {
            "buffering": signature.buffering,
            "sessionTimeout": signature.session_timeout,
            "maxBatchSize": signature.max_batch_size,
        },
    }
    if is_realtime:
        if signature.content_type is not None:
            protocol["contentType"] = signature.content_type
        protocol["realtimeMode"] = signature.realtime_mode
    return protocol


def _mirror(signature: RouteSignature, function: Callable[..., Any]) -> Optional[APIRoute]:
    """Give a route that documents the models of a realtime one; it is never served."""
    given, answer = _model(signature.input_modal), _model(signature.output_modal)
    if signature.realtime_mode is None or (given is None and answer is None):
        return None

    def endpoint(**_: Any) -> None:
        """Stand for the realtime handler in the document."""

    name = function.__name__
    parameters = []
    if given is not None:
        parameters = [inspect.Parameter("body", inspect.Parameter.KEYWORD_ONLY, annotation=given)]
    endpoint.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # read by FastAPI
    endpoint.__doc__ = function.__doc__
    return APIRoute(
        signature.path,
        endpoint,
        methods=["POST"],
        name=name,
        operation_id=f"{name}_post",
        response_model=answer,
    )


def _model(modal: Any) -> Optional[type[BaseModel]]:
    return modal if isinstance(modal, type) and issubclass(modal, BaseModel) else None


def _add_body(operation: dict[str, Any], names: Iterable[str]) -> None:
    """Say that the scalars among a route's query parameters may come as a JSON object instead."""
    scalars = set(names)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "query" and parameter["name"] in scalars:
            properties[parameter["name"]] = parameter["schema"]
            if parameter.get("required"):
                required.append(parameter["name"])
            parameter["required"] = False  # it may be in the body
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    operation["requestBody"] = {
        "description": "The query parameters as one JSON object; those in the query may be left out here.",
        "required": False,
        "content": {_JSON: {"schema": schema}},
    }


def _schemas(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give every schema that stands by itself."""
    yield from document.get("components", {}).get("schemas", {}).values()
    for path in document["paths"].values():
        for operation in path.values():
            if not isinstance(operation, dict):
                continue
            parts = [operation.get("requestBody", {}), *operation.get("responses", {}).values()]
            for part in parts:
                for content in part.get("content", {}).values():
                    yield content.get("schema", {})


def _order_properties(schema: Any) -> None:
    """Note the order of properties, here and in the schemas within."""
    if not isinstance(schema, dict):
        return
    properties = schema.get("properties")
    if isinstance(properties, dict):
        schema["x-fal-order-properties"] = list(properties)
    for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
        for part in schema.get(key, ()):
            _order_properties(part)
    for key in ("items", "additionalProperties", "not"):
        _order_properties(schema.get(key))
    for key in ("properties", "patternProperties", "$defs"):
        for part in (schema.get(key) or {}).values():
            _order_properties(part)
