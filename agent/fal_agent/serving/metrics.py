"""Count an app's requests, and give the counts in Prometheus's text format.

Runs in the process that serves an app. If the app's environment has `prometheus_client`, the metrics that
the app itself registered there are given too.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.requests import Request
    from starlette.types import Message, Scope, Send

__all__ = ["Metrics", "metrics_application"]

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_UNKNOWN = "unknown"  # stands for all paths without a route, of which there is no end


class Metrics:
    """How many requests there are and were, and how long they took. Belongs to one event loop."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._answers: Counter[tuple[str, str]] = Counter()  # by path and status
        self._seconds: Counter[str] = Counter()  # by path

    @contextmanager
    def counting(self, scope: Scope) -> Iterator[Callable[[Send], Send]]:
        """Count a request or websocket; gives what wraps its `send`, to see the status."""
        status, started = "", time.perf_counter()

        def watching(send: Send) -> Send:
            async def watched(message: Message) -> None:
                nonlocal status
                status = str(message.get("status", status))
                await send(message)

            return watched

        self._in_flight += 1
        try:
            yield watching
        finally:
            self._in_flight -= 1
            path = getattr(scope.get("route"), "path", _UNKNOWN)
            self._answers[path, status or scope["type"]] += 1
            self._seconds[path] += time.perf_counter() - started  # type: ignore[assignment] # floats add up too

    def text(self) -> str:
        """Give the counts in Prometheus's text format."""
        lines = ["# TYPE fal_requests_in_flight gauge", f"fal_requests_in_flight {self._in_flight}"]
        lines.append("# TYPE fal_requests_total counter")
        for (path, status), count in sorted(self._answers.items()):
            lines.append(f'fal_requests_total{{path="{_escaped(path)}",status="{status}"}} {count}')
        lines.append("# TYPE fal_request_seconds_total counter")
        for path, seconds in sorted(self._seconds.items()):
            lines.append(f'fal_request_seconds_total{{path="{_escaped(path)}"}} {seconds:.6f}')
        return "\n".join(lines) + "\n"


def metrics_application(counts: Metrics) -> Starlette:
    """Give the ASGI application that answers `GET /metrics`."""

    async def metrics(_request: Request) -> Response:
        return Response(counts.text() + _of_the_app(), media_type=_CONTENT_TYPE)

    return Starlette(routes=[Route("/metrics", metrics)])


def _of_the_app() -> str:
    client = sys.modules.get("prometheus_client")  # if the app did not import it, it registered nothing
    return "" if client is None else str(client.generate_latest().decode())


def _escaped(path: str) -> str:
    return path.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
