"""Follow what passes on an HTTP/1.1 connection, so that its sudden end can be told for what it is.

Runs in the notebook. No sockets here, and nothing is changed: bytes that were read are shown to `Exchanges`
before they are passed on, which has httptools read them. Whatever is not plain HTTP/1.1 (several requests at
once, another protocol) is no longer followed, and passes all the same.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING

import httptools

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    Reading = Generator[None, None, None]

__all__ = ["KEPT", "Ending", "Exchanges", "is_whole_head", "may_be_http", "plain_answer"]

KEPT = 1 << 20  # bytes of a request that are kept, so that it can be sent to another runner too
TRIES = 2  # times that a request is sent again
MOST_OF_A_HEAD = 64 << 10  # bytes
_BEGINNING = re.compile(rb"[\r\n]*(?:[A-Z]{1,24}(?: |$)|$)")
_REFUSAL = re.compile(rb"HTTP/1\.[01] 503 ")
_FIRST_FINAL = 200  # status; those below are followed by another one
_FRAME_CLOSE, _SHORT, _LONG = 8, 126, 127  # of RFC 6455
_INTERNAL_ERROR = 1011


class Ending(enum.Enum):
    """What it means that the app's side ended now."""

    UNKNOWN = "what passes is not followed"
    IDLE = "nothing was asked that was not answered; the client may go on"
    WHOLE = "everything was said"
    UNANSWERED = "a request was asked, and nothing of an answer has come"
    CUT = "an answer is not whole"
    SESSION_CUT = "a websocket session ended between two messages, without a farewell"


def may_be_http(data: bytes | bytearray) -> bool:
    """Whether the first bytes of a client could begin a request."""
    return _BEGINNING.match(data) is not None


def is_whole_head(data: bytes | bytearray) -> bool:
    """Whether the head of a request is complete."""
    begun = data.lstrip(b"\r\n")
    return b"\r\n\r\n" in begun or b"\n\n" in begun


def plain_answer(status: int, detail: str) -> bytes:
    """Give an answer that says what happened as JSON and ends the connection."""
    body = json.dumps({"detail": detail}).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Access-Control-Allow-Origin: *\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


def farewell(reason: str) -> bytes:
    """Give the frame by which a server closes a websocket session with 1011; the reason is short."""
    payload = _INTERNAL_ERROR.to_bytes(2, "big") + reason.encode()[:120]
    return bytes([0x80 | _FRAME_CLOSE, len(payload)]) + payload


class Exchanges:
    """The requests and answers of one connection, and its websocket session; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests, self._answers = _Requests(), _Answers()
        self._frames = _Frames()
        self._is_followed = self._is_over = True
        self._has_answer_begun = self._is_session = False
        self._kept: bytearray | None = None
        self._tries = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked that was not answered."""
        return self._is_followed and self._is_over

    @property
    def awaits_request(self) -> bool:
        """Whether the rest of a request is to come."""
        return self._is_followed and not (self._is_over or self._requests.is_whole or self._is_session)

    def ask(self, data: bytes) -> None:
        """Take note of bytes of the client's."""
        with self._lock, self._following():
            if self._is_session or not self._is_followed:
                return
            if self._is_over:
                self._is_over = self._has_answer_begun = False
                self._kept, self._tries = bytearray(), 0
                self._requests.expect()
                if not may_be_http(data):
                    raise ValueError("not HTTP")
            elif self._requests.is_whole:
                raise ValueError("a second request before the answer to the first")
            if self._kept is not None and not self._has_answer_begun:
                self._kept += data
                if len(self._kept) > KEPT:
                    self._kept = None
            self._requests.feed(data)

    def answer(self, data: bytes) -> None:
        """Take note of bytes of the app's; before the client gets them."""
        with self._lock, self._following():
            if not self._is_followed:
                return
            if self._is_over:
                raise ValueError("an answer to nothing")
            if not self._has_answer_begun:
                if not data.startswith(b"HTTP/1."[: len(data)]):
                    raise ValueError("not HTTP/1")
                self._answers.expect(self._requests.method)
            self._has_answer_begun, self._kept = True, None
            frames = data if self._is_session else self._answers.feed(data)
            if frames is not None:
                self._is_session = True
                self._is_over = self._frames.feed(frames)
            elif self._answers.is_whole:
                if not self._requests.is_whole:
                    raise ValueError("the two sides are not in step")
                self._is_over = True

    def ending(self, *, is_broken: bool) -> Ending:
        """Say what it means that the app's side ended now; `is_broken`: not in an orderly way."""
        with self._lock:
            is_last = self._answers.is_last or self._is_session
            if not self._is_followed:
                return Ending.UNKNOWN
            if self._is_over:
                return Ending.WHOLE if is_last else Ending.IDLE
            if self._is_session:
                return Ending.SESSION_CUT if self._frames.is_between_two else Ending.CUT
            if not self._has_answer_begun:
                return Ending.UNANSWERED
            return Ending.WHOLE if is_last and not is_broken else Ending.CUT

    def again(self) -> bool:
        """Whether the last request can be sent anew, as far as it has come; counts as a try."""
        with self._lock:
            if not self._is_followed or self._kept is None or self._tries == TRIES:
                return False
            self._tries += 1
            return True

    def is_refusal(self, data: bytes) -> bool:
        """Whether these bytes of the app's begin an answer 503 to a request that can be sent anew."""
        with self._lock:
            awaits_answer = self._is_followed and not (self._is_over or self._has_answer_begun)
            can_repeat = self._kept is not None and self._tries < TRIES
            return awaits_answer and can_repeat and _REFUSAL.match(data) is not None

    @property
    def kept_size(self) -> int:
        """How many bytes of the last request are kept."""
        with self._lock:
            return len(self._kept or b"")

    @property
    def kept(self) -> bytes:
        """The last request as far as it has come; nothing if it is not kept any more."""
        with self._lock:
            return bytes(self._kept or b"")

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, httptools.HttpParserError):
            self._is_followed, self._kept = False, None


class _Requests:
    """Reads requests, one at a time; its other methods are called by the parser."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._count = 0
        self.method = b""
        self.is_whole = False

    def expect(self) -> None:
        self.is_whole, self._count = False, 0

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if upgrade.args[0] < len(data):
                raise ValueError("more than the request to change the protocol") from None
            self._parser = httptools.HttpRequestParser(self)  # the other one has stopped
        if self._count > 1:
            raise ValueError("a second request before the answer to the first")

    def on_message_begin(self) -> None:
        self._count += 1

    def on_headers_complete(self) -> None:
        self.method = self._parser.get_method()

    def on_message_complete(self) -> None:
        self.is_whole = True


class _Answers:
    """Reads answers, one at a time; its other methods are called by the parser."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._is_head_only = False
        self.is_whole = self.is_last = False  # it is there; the connection ends with it

    def expect(self, method: bytes) -> None:
        self.is_whole = self.is_last = False
        self._is_head_only = method == b"HEAD"

    def feed(self, data: bytes) -> bytes | None:
        """Read; gives what follows if the protocol changes here."""
        was_whole = self.is_whole
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return data[upgrade.args[0] :]
        if was_whole:
            raise ValueError("more than the answer")
        if self._is_head_only and self.is_whole:  # the parser would wait for the body that is spoken of
            self._parser = httptools.HttpResponseParser(self)
        return None

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() >= _FIRST_FINAL:
            self.is_last = not self._parser.should_keep_alive()
            self.is_whole = self._is_head_only

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= _FIRST_FINAL:
            self.is_whole = True


class _Frames:
    """Reads an app's websocket frames, as far as is needed to know where one ends."""

    def __init__(self) -> None:
        self._pieces = _Pieces()
        self._reading = self._read()
        self.is_between_two = True
        self._is_over = False

    def feed(self, data: bytes) -> bool:
        """Read; gives whether the app has said farewell."""
        self._pieces.give(data)
        next(self._reading)
        return self._is_over

    def _read(self) -> Reading:
        read = self._pieces
        while True:
            self.is_between_two = True
            kind, size = yield from read.take(2)
            self.is_between_two = False
            size &= 0x7F
            if size >= _SHORT:
                size = int.from_bytes((yield from read.take(2 if size == _SHORT else 8)), "big")
            yield from read.skip(size)
            if kind & 0x0F == _FRAME_CLOSE:
                self._is_over = True
                while True:  # what comes after it means nothing
                    yield


class _Pieces:
    """Bytes of one direction as they come; those who read take turns with whoever brings them."""

    def __init__(self) -> None:
        self._data, self._at = b"", 0

    def give(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def skip(self, count: int) -> Reading:
        while True:
            step = min(count, len(self._data) - self._at)
            self._at += step
            count -= step
            if not count:
                return
            yield

    def take(self, count: int) -> Generator[None, None, bytes]:
        taken = b""
        while True:
            piece = self._data[self._at : self._at + count - len(taken)]
            self._at += len(piece)
            taken += piece
            if len(taken) == count:
                return taken
            yield
