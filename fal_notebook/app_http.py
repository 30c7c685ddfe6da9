"""One request to an app and its answer, over HTTP.

Runs in the notebook. Every request goes through one event loop in a thread of its own, so that whoever
waits for an answer can be interrupted, and giving up closes the connection: the app then knows.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import threading
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fal_agent.errors import (
    AppClientError,
    CallCancelledError,
    CallTimeoutError,
    FalSerializationError,
    HostUnreachableError,
    LinkLostError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx

__all__ = [
    "CONNECT_TIMEOUT",
    "Exchange",
    "answer_value",
    "check",
    "client_options",
    "encoded",
    "is_json",
    "is_loopback",
    "joined",
    "translated",
    "websocket_url",
]

REQUEST_ID = "x-fal-request-id"  # what `App.current_request` calls the request
CONNECT_TIMEOUT = 30.0  # seconds for a TCP connection
MAX_DETAIL = 2000  # characters of an answer that an error quotes
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Exchange:
    """A request that is on its way, or was answered.

    Args:
        method: "POST" or another.
        url: of the app.
        path: at the app.
        arguments: what goes into the body as JSON; None for no body.
        timeout: seconds until the whole answer must be there; None waits.
        headers: to send along.

    Attributes:
        request_id: the app sees it as `current_request.request_id`.

    Raises:
        FalSerializationError: JSON cannot hold the arguments.
    """

    def __init__(
        self,
        method: str,
        url: str,
        path: str,
        arguments: Any = None,
        *,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        body, sending = encoded(arguments, headers or {})
        self.request_id = sending.setdefault(REQUEST_ID, uuid.uuid4().hex)
        request = {"method": method, "url": joined(url, path), "content": body, "headers": sending}
        sender = _sender()
        self._future = asyncio.run_coroutine_threadsafe(sender.send(request, timeout), sender.loop)

    @property
    def is_done(self) -> bool:
        """Whether there is an answer, or an error, or it was cancelled."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done; False if it is not after `timeout` seconds."""
        return bool(concurrent.futures.wait([self._future], timeout).done)

    def response(self, timeout: float | None = None) -> httpx.Response:
        """Wait for the answer, whatever its status.

        Args:
            timeout: seconds to wait now; None waits until the answer comes. The request goes on.

        Raises:
            CallTimeoutError: no answer within the timeout of the request, or within this one.
            CallCancelledError: `cancel()` was called.
            HostError: the app could not be reached, or the connection broke.
        """
        if not self.wait(timeout):
            raise CallTimeoutError(f"there is no answer after {timeout:g} s; the request goes on")
        if self._future.cancelled():
            raise CallCancelledError(f"the request {self.request_id} was cancelled")
        return self._future.result()

    def response_or_nothing(self) -> httpx.Response:
        """Wait for the answer as `response` does; whoever is interrupted gives the request up."""
        try:
            return self.response()
        except KeyboardInterrupt:
            self.cancel()
            raise

    def cancel(self) -> bool:
        """Give the request up, so that the app sees its caller go away; False if it had ended."""
        return self._future.cancel()


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
    if is_json(response):
        return json.loads(response.content)
    if _kind(response).startswith("text/"):
        return response.text
    return response.content or None


def is_json(response: httpx.Response) -> bool:
    """Say whether an answer holds JSON."""
    kind = _kind(response)
    return bool(response.content) and (kind == "application/json" or kind.endswith("+json"))


def client_options(url: str) -> dict[str, Any]:
    """Give what an httpx client of `url` needs: no proxy to this machine, no certificates without TLS."""
    import httpx

    return {"trust_env": not is_loopback(url), "verify": httpx.URL(url).scheme == "https"}


def is_loopback(url: str) -> bool:
    """Say whether a URL leads to this machine, where no proxy is to be asked."""
    return urlsplit(url).hostname in _LOOPBACK


def websocket_url(url: str, path: str) -> str:
    """Give the address of a websocket of the app at `url`."""
    return "ws" + joined(url, path).removeprefix("http")


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


def joined(url: str, path: str) -> str:
    """Give the address of a path of the app at `url`."""
    return f"{url.rstrip('/')}/{path.lstrip('/')}"


def encoded(arguments: Any, headers: Mapping[str, str]) -> tuple[bytes | None, dict[str, str]]:
    """Write a request's body, and the headers that go with it.

    Raises:
        FalSerializationError: JSON cannot hold the arguments.
    """
    if arguments is None:
        return None, dict(headers)
    sending = {"content-type": "application/json", **headers}
    try:
        return json.dumps(arguments).encode(), sending
    except (TypeError, ValueError):
        pass  # there are models, dates or the like in it
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(Any).dump_json(arguments, by_alias=True), sending
    except ValueError as error:
        raise FalSerializationError(f"the arguments cannot be written as JSON: {error}") from error


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


def _kind(response: httpx.Response) -> str:
    return str(response.headers.get("content-type", "")).partition(";")[0].strip().lower()


def _detail(response: httpx.Response) -> str:
    text = response.text
    with contextlib.suppress(ValueError):  # it is not JSON
        found = json.loads(text)
        if isinstance(found, dict) and "detail" in found:
            text = found["detail"] if isinstance(found["detail"], str) else json.dumps(found["detail"])
    return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}..."
