"""Raw websocket endpoints: what they must look like, and how their failures end a connection.

Runs in the process that serves an app. Realtime endpoints, which exchange messages, are not raw.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fastapi import WebSocket, params
from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect, WebSocketState

from fal_agent.serving.failures import report
from fal_agent.serving.signatures import resolved_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.runtime.routes import RouteSignature

__all__ = ["raw_endpoint", "realtime_endpoint"]

_INTERNAL_ERROR = 1011  # the websocket close code for it


def raw_endpoint(function: Callable[..., Any], signature: RouteSignature) -> Callable[..., Any]:
    """Give what FastAPI calls for a raw websocket endpoint.

    Raises:
        ValueError: the endpoint is not `async def` or has no parameter for the connection.
    """
    parameters = resolved_parameters(function)
    names = [name for name, parameter in parameters.items() if _is_connection(parameter)]
    if not names or not inspect.iscoroutinefunction(function):
        raise ValueError(_what_is_wrong(function, signature, has_connection=bool(names)))

    async def handle(**given: Any) -> None:
        websocket: WebSocket = given[names[0]]
        try:
            await function(**given)
        except WebSocketDisconnect:
            return  # the other side is gone, which is no error
        except WebSocketException:
            raise  # says itself how to close
        except Exception as error:  # noqa: BLE001 - reported, and the other side is told
            report(error, f"websocket {signature.path}")
            await _close(websocket)

    # An annotation that is a string may name what FastAPI cannot find.
    handle.__signature__ = inspect.Signature(  # type: ignore[attr-defined] # read by FastAPI
        [
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                annotation=WebSocket if name in names else parameter.annotation,
            )
            for name, parameter in parameters.items()
        ]
    )
    handle.__name__ = function.__name__
    return handle


def realtime_endpoint(
    app: Any, function: Callable[..., Any], signature: RouteSignature
) -> Callable[[WebSocket], Any]:
    """Give what Starlette calls for a realtime endpoint."""
    handler = function.original_func.__get__(app)  # type: ignore[attr-defined] # set by `realtime`

    async def handle(websocket: WebSocket) -> None:
        from fal_agent.serving.realtime import serve_realtime

        await serve_realtime(app, signature, handler, websocket)

    return handle


async def _close(websocket: WebSocket) -> None:
    if websocket.application_state != WebSocketState.DISCONNECTED:
        try:
            await websocket.close(_INTERNAL_ERROR)
        except (RuntimeError, OSError, WebSocketDisconnect):
            return  # it was closed from the other side meanwhile


def _is_connection(parameter: inspect.Parameter) -> bool:
    if isinstance(parameter.default, (params.Param, params.Depends)):
        return False
    annotation = parameter.annotation
    if isinstance(annotation, str):
        return annotation.strip("\"' ").endswith("WebSocket")
    return isinstance(annotation, type) and issubclass(annotation, WebSocket)


def _what_is_wrong(function: Callable[..., Any], signature: RouteSignature, *, has_connection: bool) -> str:
    needs = [] if inspect.iscoroutinefunction(function) else ["be defined with `async def`"]
    needs += [] if has_connection else ["have a parameter annotated `fastapi.WebSocket`"]
    name = function.__name__
    return (
        f"the websocket endpoint {name}() at {signature.path!r} must {' and '.join(needs)}. "
        f"Its signature is {name}{inspect.signature(function)}. It should look like this:\n\n"
        f"    @fal.endpoint({signature.path!r}, is_websocket=True)\n"
        f"    async def {name}(self, websocket: fastapi.WebSocket) -> None:\n"
        f"        await websocket.accept()\n"
        f"        ..."
    )
