"""The client of a realtime endpoint: messages over one websocket.

Runs in the notebook. The connection lives in a thread with an event loop of its own, so that sending
never holds up receiving: with one of them blocked by a slow endpoint, the other goes on. Every wait can
be interrupted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import msgpack
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException

from fal_agent.errors import AppException, HostUnreachableError, LinkLostError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from types import TracebackType

__all__ = ["RealtimeConnection", "connect_realtime"]

_T = TypeVar("_T")
_MAX_MESSAGE = 256 * 1024 * 1024  # bytes
_PING_EVERY = 20.0  # seconds; keeps idle connections open on their way
_GOODBYE = 2.0  # seconds that `close` waits for the other side
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one since Python 3.11
_END = json.dumps({"type": "x-fal-end"})
_REFUSALS = {
    401: "it wants a key",
    403: "it has no such endpoint, or wants a key",
    404: "it has no such endpoint",
}
_NORMAL = 1000  # close codes of RFC 6455
_TOO_BIG = 1009


def connect_realtime(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    encode_message: Callable[[Any], bytes] | None = None,
    decode_message: Callable[[bytes], Any] | None = None,
    timeout: float = 30.0,
    max_message: int | None = _MAX_MESSAGE,
) -> RealtimeConnection:
    """Connect to a realtime endpoint.

    Args:
        url: `ws://HOST:PORT/PATH`; `http` means `ws`, and `https` means `wss`.
        headers: sent along when connecting, such as `Authorization`.
        encode_message: makes the bytes of a message; None is msgpack. It must suit the endpoint's
            `decode_message`.
        decode_message: opens the bytes of an answer; None is msgpack.
        timeout: seconds for the connection to open.
        max_message: bytes of the largest answer that is taken; None is no limit.

    Raises:
        ValueError: the URL is not one of a websocket.
        AppException: the server refused; `status_code` says how (403 and 404: there is no such endpoint).
        HostUnreachableError: no connection.
    """
    url = _websocket_url(url)
    thread = _LoopThread()
    try:
        socket = thread.run(_open(url, headers, timeout, max_message))
    except BaseException as error:
        thread.stop()
        told = _connecting_error(url, timeout, error)
        if told is None:
            raise
        raise told from error
    return RealtimeConnection(url, thread, socket, encode_message, decode_message)


class RealtimeConnection:
    """An open connection to a realtime endpoint, made by `connect_realtime`; use it in a `with` block.

    One thread may send while another receives. If a handler answers each input, receive the answers
    while sending many: an endpoint whose answers nobody takes stops taking inputs, and then `send` waits.

    Attributes:
        url: where it is connected to.
    """

    def __init__(
        self,
        url: str,
        thread: _LoopThread,
        socket: ClientConnection,
        encode_message: Callable[[Any], bytes] | None,
        decode_message: Callable[[bytes], Any] | None,
    ) -> None:
        self.url = url
        self._thread, self._socket = thread, socket
        self._encode, self._decode = encode_message or _pack, decode_message or _unpack
        self._unread: deque[bytes] = deque()  # answers that came before a close that `send` met
        self._over: Exception | None = None  # why nothing more can be received
        self._is_closed = False
        self._reading = asyncio.Lock()

    def send(self, message: Any) -> None:
        """Send a message: a dict, or a pydantic model; waits while the endpoint takes none.

        Raises:
            ValueError: the endpoint ended the session with an error; its text.
            LinkLostError: the connection is over.
        """
        plain = message.model_dump() if hasattr(message, "model_dump") else message
        self._send(bytes(self._encode(plain)))

    def end(self) -> None:
        """Say that no more messages come; what the endpoint still has to answer can be received.

        Raises:
            ValueError: the endpoint ended the session with an error; its text.
            LinkLostError: the connection is over.
        """
        self._send(_END)

    def recv(self, timeout: float | None = None) -> Any:
        """Wait for the next message and give it.

        Args:
            timeout: seconds to wait at most; None waits until it comes, or until interrupted.

        Raises:
            ValueError: the endpoint ended the session with an error; its text.
            EOFError: there are no more messages: the stream is complete, or the connection was closed.
            TimeoutError: none came in time; the connection is still good.
            LinkLostError: the connection broke.
        """
        if self._unread:
            return self._decode(self._unread.popleft())
        if self._over is not None:
            raise self._over
        return self._decode(self._run(self._receive(timeout)))

    def run(self, message: Any, timeout: float | None = None) -> Any:
        """Send a message and give the next answer; raises what `send` and `recv` raise.

        After a TimeoutError the late answer is still the next one.
        """
        self.send(message)
        return self.recv(timeout)

    def __iter__(self) -> Iterator[Any]:
        """Give the messages as they come, until the endpoint's stream is complete."""
        while True:
            try:
                message = self.recv()
            except EOFError:
                return
            yield message

    def close(self) -> None:
        """Close the connection; waits for the other side's goodbye, for at most two seconds."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._thread.run(self._socket.close())
        finally:
            self._thread.stop()

    def __enter__(self) -> RealtimeConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ in the connection's thread

    async def _receive(self, timeout: float | None) -> bytes:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.001, deadline - time.monotonic())
            try:
                frame = await asyncio.wait_for(self._next_frame(), left)
            except _TIMEOUTS:
                raise TimeoutError(f"no message from {self.url} within {timeout:g} s") from None
            except ConnectionClosed as closed:
                self._over = self._why(closed)
                raise self._over from closed
            if isinstance(frame, bytes):
                return frame
            self._over = _told(frame)
            if self._over is not None:
                raise self._over

    async def _next_frame(self) -> str | bytes:
        async with self._reading:
            if self._over is not None:
                raise self._over
            return await self._socket.recv()

    async def _transmit(self, frame: str | bytes) -> None:
        try:
            await self._socket.send(frame)
        except ConnectionClosed as closed:
            try:  # what the endpoint said last explains it
                while True:
                    self._unread.append(await self._receive(None))
            except EOFError:
                raise LinkLostError(f"{self.url} has ended the session, so nothing can be sent") from closed

    def _why(self, closed: ConnectionClosed) -> Exception:
        received, sent = closed.rcvd, closed.sent
        if self._is_closed or (received is not None and received.code == _NORMAL):
            return EOFError(f"the connection to {self.url} is closed: no more messages")
        if received is not None and received.code == _TOO_BIG:
            return LinkLostError(f"{self.url} closed the connection: a message was larger than it takes")
        if sent is not None and sent.code == _TOO_BIG:
            return LinkLostError(
                f"a message from {self.url} was too large, so the connection was closed: set `max_message`"
            )
        how = (
            f"code {received.code} {received.reason}".rstrip() if received is not None else "without goodbye"
        )
        return LinkLostError(
            f"the connection to {self.url} broke ({how}): connect again; if it breaks again, look at the "
            "endpoint's log"
        )

    # ------------------------------------------------------------ in the caller's thread

    def _send(self, frame: str | bytes) -> None:
        if self._over is not None and not isinstance(self._over, EOFError):
            raise self._over
        self._run(self._transmit(frame))

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._is_closed:
            work.close()
            raise LinkLostError(f"the connection to {self.url} was closed here: connect again")
        return self._thread.run(work)


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # so that nothing is asked of a loop that ends
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main()), name="fal-realtime-client", daemon=True
        )
        self._thread.start()
        self._started.wait()

    async def _main(self) -> None:
        self._end = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._end.wait()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run it there and wait for its result; an interrupt cancels it."""
        with self._lock:
            if self._loop is None:
                work.close()
                raise LinkLostError("the connection was closed here: connect again")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """End the thread, and whatever still waits there."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout=5)


async def _open(
    url: str, headers: Mapping[str, str] | None, timeout: float, max_message: int | None
) -> ClientConnection:
    return await connect(
        url,
        additional_headers=headers,
        open_timeout=timeout,
        # an endpoint that is busy does not read, so it answers pings late: that is no fault
        ping_interval=_PING_EVERY,
        ping_timeout=None,
        close_timeout=_GOODBYE,
        max_size=max_message,
        compression=None,
        proxy=None if urlsplit(url).hostname in _LOOPBACK else True,
    )


def _websocket_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ValueError(f"{url!r} is not the URL of a websocket: it looks like ws://127.0.0.1:8080/realtime")
    return urlunsplit(parts._replace(scheme=_SCHEMES[parts.scheme]))


def _connecting_error(url: str, timeout: float, error: BaseException) -> Exception | None:
    """Say what went wrong while connecting; None for what is not about the connection."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        hint = f": {_REFUSALS[status]}" if status in _REFUSALS else ""
        return AppException(f"{url} refused the connection with status {status}{hint}", status)
    if isinstance(error, InvalidURI):
        return ValueError(str(error))
    if isinstance(error, _TIMEOUTS):
        return HostUnreachableError(f"{url} did not answer within {timeout:g} s: is the app up?")
    if isinstance(error, (OSError, WebSocketException)):
        return HostUnreachableError(f"no connection to {url}: {error}. Is the app up?")
    return None


def _told(text: str) -> Exception | None:
    """Read a control message: what it ends the session with, None if it ends nothing."""
    try:
        message = json.loads(text)
        kind = message["type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ProtocolError(f"a text message that is no control message: {text[:200]!r}")
    if kind == "x-fal-error":
        return ValueError(message.get("reason") or message.get("error") or "the endpoint failed")
    if kind == "x-fal-end":
        return EOFError("the stream is complete: no more messages")
    return None


def _pack(message: Any) -> bytes:
    return bytes(msgpack.packb(message, use_bin_type=True))


def _unpack(frame: bytes) -> Any:
    return msgpack.unpackb(frame, raw=False, strict_map_key=False)
