"""Follow what passes on an HTTP/1.1 connection, so that its sudden end can be told for what it is.

Runs in the notebook. No sockets here, and nothing is changed: bytes that were read are shown to `Exchanges`
before they are passed on. Whatever is not plain HTTP/1.1 (several requests at once, another protocol) is no
longer followed, and passes all the same.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    Reading = Generator[None, None, None]

__all__ = ["KEPT", "Ending", "Exchanges", "is_whole_head", "may_be_http", "plain_answer"]

KEPT = 1 << 20  # bytes of a request that are kept, so that it can be sent to another runner too
TRIES = 2  # times that a request is sent again
MOST_OF_A_HEAD = 64 << 10  # bytes
_BEGINNING = re.compile(rb"[\r\n]*(?:[A-Z]{1,24}(?: |$)|$)")
_SWITCHED, _FIRST_FINAL = 101, 200
_BODILESS = (204, 304)
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
        self._asked, self._answered = _Pieces(), _Pieces()
        self._requests, self._answers = self._read_requests(), self._read_answers()
        self._is_followed = self._is_over = True
        self._is_request_whole = self._has_answer_begun = False
        self._is_last = self._is_session = self._is_between_frames = False
        self._kept: bytearray | None = None
        self._tries = 0
        self._method = b""

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked that was not answered."""
        return self._is_followed and self._is_over

    @property
    def awaits_request(self) -> bool:
        """Whether the rest of a request is to come."""
        return self._is_followed and not (self._is_over or self._is_request_whole or self._is_session)

    @property
    def is_unanswered(self) -> bool:
        """Whether nothing has been said to what was asked last."""
        return self._is_followed and not (self._is_over or self._has_answer_begun)

    def ask(self, data: bytes) -> None:
        """Take note of bytes of the client's."""
        with self._lock, self._following():
            if self._is_session:
                return
            if self._is_over:
                self._is_over = self._is_request_whole = self._has_answer_begun = False
                self._kept, self._tries = bytearray(), 0
                if not may_be_http(data):
                    raise ValueError("not HTTP")
            elif self._is_request_whole:
                raise ValueError("a second request before the answer to the first")
            if self._kept is not None and not self._has_answer_begun:
                self._kept += data
                if len(self._kept) > KEPT:
                    self._kept = None
            self._asked.give(data)
            next(self._requests)

    def answer(self, data: bytes) -> None:
        """Take note of bytes of the app's; before the client gets them."""
        with self._lock, self._following():
            if self._is_over:
                raise ValueError("an answer to nothing")
            if not self._has_answer_begun and not data.startswith(b"HTTP/1."[: len(data)]):
                raise ValueError("not HTTP/1")
            self._has_answer_begun, self._kept = True, None
            self._answered.give(data)
            next(self._answers)

    def ending(self, *, is_broken: bool) -> Ending:
        """Say what it means that the app's side ended now; `is_broken`: not in an orderly way."""
        with self._lock:
            if not self._is_followed:
                return Ending.UNKNOWN
            if self._is_over:
                return Ending.WHOLE if self._is_last else Ending.IDLE
            if self._is_session:
                return Ending.SESSION_CUT if self._is_between_frames else Ending.CUT
            if not self._has_answer_begun:
                return Ending.UNANSWERED
            return Ending.WHOLE if self._is_last and not is_broken else Ending.CUT

    def again(self) -> bool:
        """Whether the last request can be sent anew, as far as it has come; counts as a try."""
        with self._lock:
            if not self._is_followed or self._kept is None or self._tries == TRIES:
                return False
            self._tries += 1
            return True

    @property
    def kept(self) -> bytes:
        """The last request as far as it has come; nothing if it is not kept any more."""
        with self._lock:
            return bytes(self._kept or b"")

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        if not self._is_followed:
            self._kept = None
        try:
            yield
        except (ValueError, StopIteration):  # the generators have no end while they are followed
            self._is_followed, self._kept = False, None

    def _read_requests(self) -> Reading:
        read = self._asked
        while True:
            first, fields = yield from read.head()
            self._method = first.split(b" ", 1)[0]
            if read.has_body(fields):
                yield from read.body(fields)
            self._is_request_whole = True
            if read.has_more:
                raise ValueError("a second request before the answer to the first")
            yield

    def _read_answers(self) -> Reading:
        read = self._answered
        while True:
            first, fields = yield from read.head()
            version, status = first[:8], int(first[9:12])
            if status == _SWITCHED:
                self._is_session = True
                yield from self._read_session()
            elif status >= _FIRST_FINAL:
                yield from self._read_final(status, version, fields)
                if read.has_more or not self._is_request_whole:
                    raise ValueError("the two sides are not in step")
                yield

    def _read_final(self, status: int, version: bytes, fields: dict[bytes, bytes]) -> Reading:
        read = self._answered
        if self._method != b"HEAD" and status not in _BODILESS:
            if not read.has_body(fields) and b"content-length" not in fields:
                self._is_last = True  # its body lasts as long as the connection
                yield from read.everything()
            yield from read.body(fields)
        self._is_last = version != b"HTTP/1.1" or b"close" in fields.get(b"connection", b"").lower()
        self._is_over = True

    def _read_session(self) -> Reading:
        """Read the app's websocket frames up to its farewell."""
        read = self._answered
        while True:
            self._is_between_frames = True
            kind, size = yield from read.take(2)
            self._is_between_frames = False
            size &= 0x7F
            if size >= _SHORT:
                size = int.from_bytes((yield from read.take(2 if size == _SHORT else 8)), "big")
            yield from read.skip(size)
            if kind & 0x0F == _FRAME_CLOSE:
                self._is_over = self._is_last = True
                yield from read.everything()


class _Pieces:
    """Bytes of one direction as they come; those who read take turns with whoever brings them."""

    def __init__(self) -> None:
        self._data, self._at = b"", 0

    @property
    def has_more(self) -> bool:
        return self._at < len(self._data)

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

    def line(self) -> Generator[None, None, bytes]:
        taken = b""
        while True:
            end = self._data.find(b"\n", self._at) + 1
            taken += self._data[self._at : end or None]
            self._at = end or len(self._data)
            if end:
                return taken.rstrip(b"\r\n")
            if len(taken) > MOST_OF_A_HEAD:
                raise ValueError("a line without an end")
            yield

    def everything(self) -> Reading:
        while True:
            self._at = len(self._data)
            yield

    def head(self) -> Generator[None, None, tuple[bytes, dict[bytes, bytes]]]:
        """Read the first line and the fields, by names in lower case."""
        first, fields, size = b"", dict[bytes, bytes](), 0
        while True:
            line = yield from self.line()
            size += len(line)
            if size > MOST_OF_A_HEAD:
                raise ValueError("a head without an end")
            if not first:
                first = line
                if first and b"HTTP/1." not in first:
                    raise ValueError("not HTTP/1")
            elif not line:
                return first, fields
            else:
                name, _, value = line.partition(b":")
                name = name.strip().lower()
                fields[name] = b", ".join(filter(None, (fields.get(name), value.strip())))

    def has_body(self, fields: dict[bytes, bytes]) -> bool:
        return b"transfer-encoding" in fields or fields.get(b"content-length", b"0") != b"0"

    def body(self, fields: dict[bytes, bytes]) -> Reading:
        if b"transfer-encoding" not in fields:
            yield from self.skip(_count(fields.get(b"content-length", b"0"), 10))
            return
        if not fields[b"transfer-encoding"].lower().endswith(b"chunked"):
            raise ValueError("a body whose end cannot be seen")
        while size := _count((yield from self.line()).partition(b";")[0].strip(), 16):
            yield from self.skip(size + 2)
        while (yield from self.line()):  # trailers
            pass


def _count(digits: bytes, base: int) -> int:
    if not digits.isalnum():
        raise ValueError("not a number")
    return int(digits, base)
