"""Make the FastAPI application that serves an `App`.

Runs in the process that serves an app. Every HTTP endpoint is a POST route; `GET /health`,
`GET /openapi.json` and the store of files are always there.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Optional

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount, WebSocketRoute

from fal_agent.errors import FalServerlessException
from fal_agent.runtime.app import BaseServable
from fal_agent.runtime.requests import REQUEST_ID_HEADER, answering, context_from_headers
from fal_agent.runtime.toolkit.files import FILES_URL
from fal_agent.serving.failures import FailureMiddleware, add_failure_handlers, report
from fal_agent.serving.files import FILES_PATH, files_route
from fal_agent.serving.metrics import Metrics
from fal_agent.serving.openapi import describe
from fal_agent.serving.scalars import ScalarRoute
from fal_agent.serving.signatures import as_function
from fal_agent.serving.websockets import raw_endpoint, realtime_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from fal_agent.runtime.routes import RouteSignature

__all__ = ["HINTS_HEADER", "build_application", "document"]

HINTS_HEADER = "X-Fal-Runner-Hints"
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]+")  # what may become part of a URL
_BEGINNINGS = ("http.response.start", "websocket.accept")  # the messages that carry an answer's headers


def build_application(app: BaseServable, metrics: Optional[Metrics] = None) -> FastAPI:
    """Give the ASGI application that serves an app; its lifespan sets the app up and tears it down.

    Args:
        app: the app.
        metrics: where its requests are counted; None: counted apart.

    Raises:
        ValueError: the app has no routes, two at one path, or a websocket endpoint that cannot be served.
    """
    routes = app.collect_routes()
    if not routes:
        raise ValueError(
            f"{type(app).__name__} must have at least one route: mark a method with @fal.endpoint('/')"
        )
    websockets = {signature: function for signature, function in routes.items() if signature.is_websocket}
    metrics = Metrics() if metrics is None else metrics
    root_path = os.environ.get("FAL_APP_ROOT_PATH", "").rstrip("/")
    application = _Application(
        websockets,
        title=getattr(app, "app_name", None) or type(app).__name__,
        version=str(app.version),
        lifespan=app.lifespan,
        middleware=[  # the first is the outermost
            Middleware(_RequestMiddleware, served=app, metrics=metrics, root_path=root_path),
            Middleware(
                CORSMiddleware,
                allow_origins=["*"],
                allow_methods=["*"],
                allow_headers=["*"],
                allow_credentials=True,
                expose_headers=[REQUEST_ID_HEADER, HINTS_HEADER],
            ),
            Middleware(FailureMiddleware),
        ],
    )
    application.state.metrics = metrics
    application.servers = [{"url": root_path}] if root_path else []
    application.router.route_class = ScalarRoute
    add_failure_handlers(application)
    _add_routes(application, app, routes)
    health = _health_endpoint(app)
    application.add_api_route("/health", health, name="health", methods=["GET"])
    application.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)  # HTTP wants it
    application.router.routes.append(
        Mount(FILES_PATH, files_route())
    )  # last: what the app has there is its own
    return application


def _add_routes(
    application: FastAPI, app: BaseServable, routes: dict[RouteSignature, Callable[..., Any]]
) -> None:
    for signature, function in routes.items():
        if signature.realtime_mode is not None:
            realtime = realtime_endpoint(app, function, signature)
            application.router.routes.append(WebSocketRoute(signature.path, realtime))
        elif signature.is_websocket:
            application.add_api_websocket_route(signature.path, raw_endpoint(function, signature))
        else:
            handler = as_function(function)
            application.add_api_route(signature.path, handler, name=handler.__name__, methods=["POST"])


def document(app: BaseServable) -> dict[str, Any]:
    """Give the OpenAPI document of an app that need not be served.

    Raises:
        FalServerlessException: it cannot be made; the reason is the `__cause__`.
    """
    try:
        return build_application(app).openapi()
    except Exception as error:
        raise FalServerlessException(
            f"Failed to generate OpenAPI metadata for function {type(app).__name__}: {error}"
        ) from error


class _Application(FastAPI):
    """A FastAPI application whose document tells of websockets too."""

    def __init__(self, websockets: dict[RouteSignature, Callable[..., Any]], **options: Any) -> None:
        super().__init__(**options)
        self._websockets = websockets

    def openapi(self) -> dict[str, Any]:
        """Give the OpenAPI document, made on first use."""
        if self.openapi_schema is None:
            self.openapi_schema = describe(self, self._websockets)
        return self.openapi_schema


def _health_endpoint(app: BaseServable) -> Callable[..., Any]:
    async def health() -> Any:
        if type(app).health is BaseServable.health:
            return app.health()  # not in a thread, of which a busy app may have none left
        if inspect.iscoroutinefunction(app.health):
            return await app.health()
        return await run_in_threadpool(app.health)

    return health


class _RequestMiddleware:
    """Makes a request the current one, and labels its answer with its id and with the runner's hints."""

    def __init__(self, app: ASGIApp, served: BaseServable, metrics: Metrics, root_path: str) -> None:
        self._app, self._served, self._metrics, self._root_path = app, served, metrics, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request or websocket on."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        if self._root_path:
            scope["root_path"] = self._root_path
        is_http = scope["type"] == "http"
        headers = _headers(scope)
        context = context_from_headers(headers)
        request_id = context.request_id or ""

        async def labelled(message: Message) -> None:
            if message["type"] in _BEGINNINGS:
                headers = list(message.get("headers", ()))
                if all(name.lower() != REQUEST_ID_HEADER.encode() for name, _ in headers):
                    headers.append((REQUEST_ID_HEADER.encode(), request_id.encode()))
                hints = await _hints(self._served) if is_http else b""
                if hints:
                    headers.append((HINTS_HEADER.lower().encode(), hints))
                message = {**message, "headers": headers}
            await send(message)
            if message.get("more_body"):
                await asyncio.sleep(
                    0
                )  # a client that is gone takes everything at once, and nobody else has a turn

        request = context if is_http else None
        before = FILES_URL.set(_files_url(scope, headers, self._root_path))
        try:
            with answering(self._served, request, request_id), self._metrics.counting(scope) as count:
                await self._app(scope, receive, count(labelled))
        finally:
            FILES_URL.reset(before)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _files_url(scope: Scope, headers: Mapping[str, str], root_path: str) -> Optional[str]:
    """Give the URL of the store of files as whoever asks here can reach it; None if that cannot be known."""
    host = headers.get("host", "")
    if not _HOST.fullmatch(host):
        return FILES_URL.get()
    scheme = "https" if scope["scheme"] in {"https", "wss"} else "http"
    return f"{scheme}://{host}{root_path}{FILES_PATH}"


async def _hints(app: BaseServable) -> bytes:
    """Give the hints as a header's value; empty if there are none or they cannot be had."""
    if type(app).provide_hints is BaseServable.provide_hints:
        return b""
    try:
        hints: Any = app.provide_hints()
        hints = await hints if inspect.isawaitable(hints) else hints
        return b",".join(part for hint in hints if (part := _encoded(str(hint))))
    except NotImplementedError:
        return b""
    except Exception as error:  # noqa: BLE001 - reported; the answer itself is good and must go out
        report(error, f"{type(app).__name__}.provide_hints()")
        return b""


def _encoded(hint: str) -> bytes:
    try:
        encoded = hint.strip().encode("latin-1")
    except UnicodeEncodeError:
        encoded = None
    if encoded is None or not hint.strip().isprintable():
        sys.stderr.write(f"WARNING: the hint {hint!r} cannot stand in a header, and is left out\n")
        return b""
    return encoded
