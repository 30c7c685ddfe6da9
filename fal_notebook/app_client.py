"""An app as an object whose methods are its endpoints: spawn it, wait for it, call it, end it.

Runs in the notebook. The client knows the app's class, so that answers become what the methods say that
they return.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import threading
import time
from typing import TYPE_CHECKING, Any

from fal_agent.errors import AppClientError, CallTimeoutError, HostError
from fal_agent.runtime.routes import marked_methods
from fal_agent.serving.signatures import return_annotation
from fal_notebook.app_http import Exchange, answer_value, check, is_json, is_loopback, websocket_url

if TYPE_CHECKING:
    import queue
    from collections.abc import Callable, Iterator, Mapping

    import httpx

    from fal_agent.runtime.app import App
    from fal_agent.runtime.routes import RouteSignature

__all__ = ["AppClient", "AppClientError", "LogPrinter", "wait_until_healthy"]

HEALTH_PATH = "/health"
STARTING = (404, 500)  # statuses of an app that may yet become healthy
NO_ANSWER = 504  # the status that an error has when there was no answer
SHORTEST_REQUEST = 0.05  # seconds that a health request gets though the time is over
LOG_PATIENCE = 1.0  # seconds that an error waits for the log that explains it
LOG_QUIET = 0.25  # seconds without an entry after which the log is taken to be complete
END_PATIENCE = 5.0  # seconds that the end of a client waits for the app's


def wait_until_healthy(
    url: str,
    *,
    health_request_timeout: float = 30,
    startup_timeout: float = 60,
    health_check_interval: float = 0.5,
    headers: Mapping[str, str] | None = None,
    problem: Callable[[], BaseException | None] = lambda: None,
) -> None:
    """Ask `GET {url}/health` until the answer is a success.

    No answer, a broken connection, 404 and 500 mean that the app is still starting.

    Args:
        url: of the app.
        health_request_timeout: seconds for one request.
        startup_timeout: seconds for all of it; at least one request is made.
        health_check_interval: seconds between two requests.
        headers: to send along.
        problem: gives the reason why the app will never be healthy, as soon as there is one. It is asked
            between requests and while one takes long, and what it gives is raised at once.

    Raises:
        AppClientError: another status, or the time is over: then the message says how many requests were
            made and what became of the last one, whose status is `status_code` (504 if it had no answer).
        BaseException: what `problem` gave.
    """
    deadline = time.monotonic() + startup_timeout
    attempts = 0
    while True:
        attempts += 1
        seconds = max(min(health_request_timeout, deadline - time.monotonic()), SHORTEST_REQUEST)
        exchange = Exchange("GET", url, HEALTH_PATH, timeout=seconds, headers=headers)
        try:
            while not exchange.wait(max(health_check_interval, SHORTEST_REQUEST)):
                _raise(problem())
        finally:
            exchange.cancel()
        _raise(problem())
        last = _health(exchange)
        if last is None:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
            raise AppClientError(
                f"{url} did not become healthy within {startup_timeout:g} s ({times}); the last one: {last}. "
                "Look at its logs, or give it more time with startup_timeout",
                last.status_code,
                last.headers,
            ) from last
        time.sleep(min(health_check_interval, left))


def _health(exchange: Exchange) -> AppClientError | None:
    """Give what kept the app from being healthy this time; raises what will not change."""
    try:
        check(exchange.response())
    except (CallTimeoutError, HostError) as error:
        return AppClientError(str(error), NO_ANSWER)
    except AppClientError as error:
        if error.status_code not in STARTING:
            raise
        return error
    return None


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


class LogPrinter:
    """Prints the entries of a log as they come, in a thread, until `close()`.

    Args:
        entries: a queue of objects with a `message`.
    """

    def __init__(self, entries: queue.Queue[Any]) -> None:
        self._entries = entries
        self._last = time.monotonic()  # when there was something to print
        self._end = object()
        self._thread = threading.Thread(target=self._print, name="logs of an app", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until nothing has come for a moment, but not for long."""
        start = time.monotonic()
        while (now := time.monotonic()) < start + LOG_PATIENCE:
            quiet_at = max(start, self._last) + LOG_QUIET
            if now >= quiet_at:
                return
            time.sleep(min(quiet_at, start + LOG_PATIENCE) - now)

    def close(self) -> None:
        """Print what has come so far, and end."""
        self._entries.put(self._end)
        self._thread.join(END_PATIENCE)

    def _print(self) -> None:
        while (entry := self._entries.get()) is not self._end:
            message = str(entry.message)
            print(message, end="" if message.endswith("\n") else "\n", flush=True)  # noqa: T201 - what it is for
            self._last = time.monotonic()


class AppClient:
    """A client of an app: one callable attribute for each endpoint, named like the method.

    An HTTP endpoint takes the body (a dictionary, a model, or nothing) or the body's fields as keywords, and
    gives what the method's return annotation says. A realtime endpoint gives a connection with `send`,
    `recv`, `run` and `close`; one that is a raw websocket gives a connection of the library `websockets`.

    Args:
        app_class: the class of the app.
        url: where it is served.
        application: how it is called there.
        headers: to send with every request.
        timeout: seconds that a request may take; None waits.
        logs: waited for before an error is raised.

    Attributes:
        url: where it is served.
        application: how it is called there.
    """

    def __init__(
        self,
        app_class: type[App],
        url: str,
        *,
        application: str = "",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        logs: LogPrinter | None = None,
    ) -> None:
        self.url, self.application = url, application
        self._name, self._headers, self._timeout, self._logs = app_class.__name__, headers, timeout, logs
        self._endpoints = {
            name: self._websocket(signature) if signature.is_websocket else self._http(function, signature)
            for name, function, signature in marked_methods(app_class)
        }

    @classmethod
    @contextlib.contextmanager
    def connect(
        cls,
        app_class: type[App],
        *,
        health_request_timeout: float = 30,
        startup_timeout: float = 60,
        health_check_interval: float = 0.5,
    ) -> Iterator[AppClient]:
        """Spawn an app, print its logs, wait until it is healthy, and end it after the block.

        Raises:
            AppClientError: it did not become healthy; see `wait_until_healthy` for the arguments.
            BaseException: what its `setup` raised.
        """
        spawned = app_class.spawn(quiet=True)
        logs = LogPrinter(spawned.logs)
        try:
            try:
                spawned.wait(
                    health_request_timeout=health_request_timeout,
                    startup_timeout=startup_timeout,
                    health_check_interval=health_check_interval,
                )
            except Exception:
                logs.settle()
                raise
            yield cls(
                app_class,
                spawned.url,
                application=spawned.application,
                headers=spawned.headers,
                logs=logs,
            )
        finally:
            spawned.stream.cancel()
            concurrent.futures.wait([spawned.future], END_PATIENCE)  # `teardown` may have something to say
            logs.close()

    def health(self) -> Any:
        """Give what the app says of itself at `/health`."""
        return answer_value(self._send("GET", HEALTH_PATH))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        endpoints: dict[str, Callable[..., Any]] = self.__dict__.get("_endpoints", {})
        if name in endpoints:
            return endpoints[name]
        known = ", ".join(endpoints) or "none"
        raise AttributeError(f"{self.__dict__.get('_name')} has no endpoint {name!r}; there are: {known}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._endpoints})

    def __repr__(self) -> str:
        return f"<AppClient of {self._name} at {self.url}>"

    def _http(self, function: Callable[..., Any], signature: RouteSignature) -> Callable[..., Any]:
        build = functools.cache(functools.partial(_builder, function))

        def call(body: Any = None, /, **fields: Any) -> Any:
            if body is not None and fields:
                raise TypeError("give the body of a request, or its fields as keywords, but not both")
            return build()(self._send("POST", signature.path, fields or body))

        call.__name__ = getattr(function, "__name__", "call")
        call.__doc__ = function.__doc__
        return call

    def _websocket(self, signature: RouteSignature) -> Callable[..., Any]:
        def open_connection(**codecs: Any) -> Any:
            url, headers = websocket_url(self.url, signature.path), dict(self._headers or {})
            if signature.realtime_mode is None:
                return _raw_connection(url, headers)
            from fal_notebook.realtime_client import connect_realtime

            names = ("encode_message", "decode_message")
            return connect_realtime(
                url, headers=headers, **{name: getattr(signature, name) for name in names} | codecs
            )

        return open_connection

    def _send(self, method: str, path: str, arguments: Any = None) -> httpx.Response:
        exchange = Exchange(method, self.url, path, arguments, timeout=self._timeout, headers=self._headers)
        response = exchange.response_or_nothing()
        if not response.is_success and self._logs is not None:
            self._logs.settle()
        return check(response)


def _builder(function: Callable[..., Any]) -> Callable[[httpx.Response], Any]:
    """Give what makes an answer into what the function says that it returns."""
    annotation = return_annotation(function)
    if annotation is inspect.Signature.empty or isinstance(annotation, str):
        return answer_value
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError
    from starlette.responses import Response

    if isinstance(annotation, type) and issubclass(annotation, Response):
        return answer_value
    try:
        adapter = TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return answer_value

    def build(response: httpx.Response) -> Any:
        return adapter.validate_json(response.content) if is_json(response) else answer_value(response)

    return build


def _raw_connection(url: str, headers: Mapping[str, str]) -> Any:
    from websockets.sync.client import connect

    options: dict[str, Any] = {}
    if is_loopback(url) and "proxy" in inspect.signature(connect).parameters:
        options["proxy"] = None  # before version 15 there was none
    return connect(url, additional_headers=headers, **options)
