"""Requests to apps: `run`, `submit`, `stream` and `ws`, as people use them from `fal.apps`.

Runs in the notebook. Every request goes through one event loop in a thread of its own, so that whoever
waits for an answer can be interrupted, and giving up closes the connection: the app then knows. Streams and
websockets are read by the thread that iterates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import uuid
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fal_agent.errors import (
    AppClientError,
    CallCancelledError,
    CallTimeoutError,
    FalSerializationError,
    HostUnreachableError,
    LinkLostError,
)
from fal_notebook import app_registry
from fal_notebook.app_events import decoded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from concurrent.futures import Future

    import httpx

    from fal_notebook.app_registry import AppInfo

__all__ = [
    "Completed",
    "InProgress",
    "RequestHandle",
    "answer_value",
    "check",
    "client_options",
    "run",
    "send",
    "stream",
    "submit",
    "translated",
    "websocket_url",
    "ws",
]

REQUEST_ID = "x-fal-request-id"  # what `App.current_request` calls the request
CONNECT_TIMEOUT = 30.0  # seconds for a TCP connection
MAX_DETAIL = 2000  # characters of an answer that an error quotes
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


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

    def __init__(self, request_id: str, future: Future[httpx.Response]) -> None:
        self.request_id = request_id
        self._future = future

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
        return answer_value(check(self.response(timeout)))

    def response(self, timeout: float | None = None) -> httpx.Response:
        """Wait for the answer as it is, whatever its status; raises what `get` does."""
        try:
            return self._future.result(timeout)
        except CancelledError:
            raise CallCancelledError(f"the request {self.request_id} was cancelled") from None
        except TimeoutError as error:
            if self._future.done():  # its own
                raise
            raise CallTimeoutError(f"there is no answer after {timeout:g} s; the request goes on") from error

    def status(self) -> InProgress | Completed:
        """Say how far it is, without waiting."""
        return Completed() if self._future.done() else InProgress()

    def iter_events(self) -> Iterator[InProgress | Completed]:
        """Give each status as it is reached, the last a `Completed`, which comes for errors too."""
        if not self._future.done():
            yield InProgress()
            with contextlib.suppress(BaseException if self._future.cancelled() else CancelledError):
                self._future.exception()
        yield Completed()

    def cancel(self) -> bool:
        """Give the request up, so that the app sees its caller go away; False if it had ended."""
        return self._future.cancel()

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
        application: the name of a spawned app, what `spawn()` gave, or a URL.
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
    url, known = _resolve(application)
    sent = send("POST", url, path, arguments, timeout=timeout, headers={**known, **(headers or {})})
    return answer_value(check(sent))


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
    url, known = _resolve(application)
    return _start("POST", url, path, arguments, timeout, {**known, **(headers or {})})


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

    url, known = _resolve(application)
    body, sending = _encoded(arguments, {**known, **(headers or {})})
    limit = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
    target = _joined(url, path)
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

    url, known = _resolve(application)
    connection = connect_realtime(websocket_url(url, path), headers={**known, **(headers or {})}, **codecs)
    try:
        yield connection
    finally:
        connection.close()


# ---------------------------------------------------------------- for the clients of apps


def send(
    method: str,
    url: str,
    path: str,
    arguments: Any = None,
    *,
    timeout: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """Send a request and wait for the answer, whatever its status; whoever is interrupted gives it up."""
    handle = _start(method, url, path, arguments, timeout, dict(headers or {}))
    try:
        return handle.response()
    except KeyboardInterrupt:
        handle.cancel()
        raise


def check(response: httpx.Response) -> httpx.Response:
    """Give the answer back.

    Raises:
        AppClientError: its status is not one of success.
    """
    if response.is_success:
        return response
    request = response.request
    message = (
        f"{request.method} {request.url} was answered with {response.status_code} "
        f"{response.reason_phrase}".rstrip()
    )
    detail = _detail(response)
    raise AppClientError(
        f"{message}: {detail}" if detail else message, response.status_code, dict(response.headers)
    )


def answer_value(response: httpx.Response) -> Any:
    """Give what an answer holds: decoded JSON, text, bytes, or None if it is empty."""
    kind = _kind(response)
    if not response.content:
        return "" if kind.startswith("text/") else None
    if kind == "application/json" or kind.endswith("+json"):
        return json.loads(response.content)
    return response.text if kind.startswith("text/") else response.content


def client_options(url: str) -> dict[str, Any]:
    """Give what an httpx client of `url` needs: no proxy to this machine, no certificates without TLS."""
    import httpx

    parsed = httpx.URL(url)
    return {"trust_env": parsed.host not in _LOOPBACK, "verify": parsed.scheme == "https"}


def websocket_url(url: str, path: str) -> str:
    """Give the address of a websocket of the app at `url`."""
    return "ws" + _joined(url, path).removeprefix("http")


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Raise errors of ours for those of httpx."""
    import httpx

    try:
        yield
    except httpx.TimeoutException as error:
        raise CallTimeoutError(f"{url} did not answer in time ({type(error).__name__})") from error
    except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise HostUnreachableError(f"no app can be reached at {url}: {error}") from error
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        raise LinkLostError(f"the connection to {url} broke before the answer was whole: {reason}") from error


# ---------------------------------------------------------------- the loop that sends


class _Sender:
    """An event loop in a thread, and the connections that it keeps open between requests."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._clients: dict[tuple[tuple[str, Any], ...], httpx.AsyncClient] = {}
        threading.Thread(target=self.loop.run_forever, name="requests to apps", daemon=True).start()

    async def send(self, request: dict[str, Any], timeout: float | None) -> httpx.Response:
        url = request["url"]
        with translated(url):
            try:
                return await asyncio.wait_for(self._client(url).request(**request), timeout)
            except asyncio.TimeoutError:
                raise CallTimeoutError(f"{url} did not answer within {timeout:g} s") from None

    def _client(self, url: str) -> httpx.AsyncClient:
        import httpx

        options = client_options(url)
        key = tuple(options.items())
        if key not in self._clients:
            self._clients[key] = httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
                **options,
            )
        return self._clients[key]


_senders: dict[int, _Sender] = {}  # by process: a forked child has no thread of its parent's
_making = threading.Lock()


def _sender() -> _Sender:
    with _making:
        if os.getpid() not in _senders:
            _senders[os.getpid()] = _Sender()
        return _senders[os.getpid()]


def _start(
    method: str, url: str, path: str, arguments: Any, timeout: float | None, headers: dict[str, str]
) -> RequestHandle:
    request_id = headers.setdefault(REQUEST_ID, uuid.uuid4().hex)
    body, headers = _encoded(arguments, headers)
    request = {"method": method, "url": _joined(url, path), "content": body, "headers": headers}
    sender = _sender()
    return RequestHandle(
        request_id, asyncio.run_coroutine_threadsafe(sender.send(request, timeout), sender.loop)
    )


def _resolve(application: str | AppInfo) -> tuple[str, dict[str, str]]:
    if isinstance(application, str):
        if application.startswith(("http://", "https://")):
            return application, {}
        application = app_registry.find(application)
    return application.url, dict(application.headers)


def _joined(url: str, path: str) -> str:
    return f"{url.rstrip('/')}/{path.lstrip('/')}"


def _encoded(arguments: Any, headers: dict[str, str]) -> tuple[bytes | None, dict[str, str]]:
    if arguments is None:
        return None, headers
    headers = {"content-type": "application/json", **headers}
    try:
        return json.dumps(arguments).encode(), headers
    except (TypeError, ValueError):
        pass  # there are models, dates or the like in it
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(Any).dump_json(arguments, by_alias=True), headers
    except ValueError as error:
        raise FalSerializationError(f"the arguments cannot be written as JSON: {error}") from error


def _kind(response: httpx.Response) -> str:
    return str(response.headers.get("content-type", "")).partition(";")[0].strip().lower()


def _detail(response: httpx.Response) -> str:
    text = response.text
    with contextlib.suppress(ValueError):  # it is not JSON
        found = json.loads(text)
        if isinstance(found, dict) and "detail" in found:
            text = found["detail"] if isinstance(found["detail"], str) else json.dumps(found["detail"])
    return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}..."
