"""Requests to apps: `run`, `submit`, `stream` and `ws`, as people use them from `fal.apps`.

Runs in the notebook. An app is given by the name under which it was spawned, by what `spawn()` gave, or by
its URL. Streams and websockets are read by the thread that iterates.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fal_notebook import app_registry
from fal_notebook.app_events import decoded
from fal_notebook.app_http import (
    CONNECT_TIMEOUT,
    Exchange,
    answer_value,
    check,
    client_options,
    encoded,
    joined,
    translated,
    websocket_url,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fal_notebook.app_registry import AppInfo

__all__ = ["Completed", "InProgress", "RequestHandle", "run", "stream", "submit", "ws"]


@dataclass(frozen=True)
class InProgress:
    """The request is on its way, or being answered."""


@dataclass(frozen=True)
class Completed:
    """The answer is there, or an error; `get()` gives it."""


class RequestHandle:
    """A request that `submit` sent.

    Attributes:
        request_id: 32 hex digits; the app sees them as `current_request.request_id`.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.request_id = exchange.request_id
        self._exchange = exchange

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the answer and give it: what its JSON says, a text, or bytes.

        Args:
            timeout: seconds to wait now; None waits until the answer comes. The request goes on.

        Raises:
            AppClientError: the answer is an error.
            CallTimeoutError: no answer within the timeout of the request, or within this one.
            CallCancelledError: `cancel()` was called.
            HostError: the app could not be reached, or the connection broke.
        """
        return answer_value(check(self._exchange.response(timeout)))

    def status(self) -> InProgress | Completed:
        """Say how far it is, without waiting."""
        return Completed() if self._exchange.is_done else InProgress()

    def iter_events(self) -> Iterator[InProgress | Completed]:
        """Give each status as it is reached; the last is a `Completed`, after errors too."""
        if not self._exchange.is_done:
            yield InProgress()
            self._exchange.wait()
        yield Completed()

    def cancel(self) -> bool:
        """Give the request up, so that the app sees its caller go away; False if it had ended."""
        return self._exchange.cancel()

    def __repr__(self) -> str:
        return f"<RequestHandle {self.request_id} {type(self.status()).__name__}>"


def run(
    application: str | AppInfo,
    arguments: Any = None,
    *,
    path: str = "/",
    timeout: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Call an endpoint of an app and wait for the answer.

    Args:
        application: the name of a spawned app, what `spawn()` gave, or a URL. As in the fal SDK, an owner may
            stand before the name ("me/my-app"), and a path after it ("me/my-app/edit").
        arguments: the body: a dictionary, a model, or anything else that JSON can hold; None for none.
        path: of the endpoint.
        timeout: seconds until the whole answer must be there; None waits.
        headers: to send along.

    Returns:
        What the answer's JSON says; its text or bytes where it is not JSON; None where it is empty.

    Raises:
        AppClientError: the answer is an error.
        CallTimeoutError: it took too long; the request was given up.
        ConfigurationError: no app has that name.
        FalSerializationError: JSON cannot hold the arguments.
        HostError: the app cannot be reached, or the connection broke.
    """
    url, path, known = _resolve(application, path)
    exchange = Exchange("POST", url, path, arguments, timeout=timeout, headers={**known, **(headers or {})})
    return answer_value(check(exchange.response_or_nothing()))


def submit(
    application: str | AppInfo,
    arguments: Any = None,
    *,
    path: str = "/",
    timeout: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> RequestHandle:
    """Call an endpoint of an app without waiting for the answer; see `run` for the arguments.

    Raises:
        ConfigurationError: no app has that name.
        FalSerializationError: JSON cannot hold the arguments.
    """
    url, path, known = _resolve(application, path)
    headers = {**known, **(headers or {})}
    return RequestHandle(Exchange("POST", url, path, arguments, timeout=timeout, headers=headers))


def stream(
    application: str | AppInfo,
    arguments: Any = None,
    *,
    path: str = "/stream",
    timeout: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """Call an endpoint that streams, and iterate over what comes.

    Server-sent events and lines of JSON are given one by one, decoded (an event that is not JSON as its
    text); other text as it arrives, other content as bytes. Ending the iteration ends the request.

    Args:
        application: as for `run`.
        arguments: as for `run`.
        path: of the endpoint.
        timeout: seconds between two pieces; None waits.
        headers: to send along.

    Raises:
        AppClientError, CallTimeoutError, ConfigurationError, FalSerializationError, HostError: as `run`.
    """
    import httpx

    url, path, known = _resolve(application, path)
    body, sending = encoded(arguments, {**known, **(headers or {})})
    limit = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
    target = joined(url, path)
    with (
        translated(target),
        httpx.Client(timeout=limit, **client_options(url)) as client,
        client.stream("POST", target, content=body, headers=sending) as response,
    ):
        if not response.is_success:
            response.read()
        check(response)
        yield from decoded(response.headers.get("content-type", ""), response.iter_bytes())


@contextlib.contextmanager
def ws(
    application: str | AppInfo,
    path: str = "/realtime",
    *,
    headers: Mapping[str, str] | None = None,
    **codecs: Any,
) -> Iterator[Any]:
    """Open a connection to a realtime endpoint: it has `send`, `recv` and `run`.

    Args:
        application: as for `run`.
        path: of the endpoint.
        headers: to send along.
        codecs: `encode_message` and `decode_message`, where the endpoint has its own.
    """
    from fal_notebook.realtime_client import connect_realtime

    url, path, known = _resolve(application, path)
    connection = connect_realtime(websocket_url(url, path), headers={**known, **(headers or {})}, **codecs)
    try:
        yield connection
    finally:
        connection.close()


def _resolve(application: str | AppInfo, path: str) -> tuple[str, str, dict[str, str]]:
    """Give an app's URL, the path of an endpoint, and the headers to send."""
    if isinstance(application, str):
        if application.startswith(("http://", "https://")):
            return application, path, {}
        application, above = app_registry.find_endpoint(application)
        path = above + ("" if above and path == "/" else path)
    return application.url, path, dict(application.headers)
