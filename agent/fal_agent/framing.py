"""Turn messages into frames and bytes into frames, with no I/O.

Runs everywhere. A frame is a fixed prefix, a table of buffer lengths, a JSON header and the raw
buffers:

    prefix   "!2sHII"   magic b"fn", number of buffers, header length, total length of the buffers
    table    "!I" each  length of each buffer
    header   JSON       an object whose "type" names the message
    buffers  raw        never copied into the header

A frame is at most `MAX_HEADER` + `MAX_BODY` bytes long: that bounds the decoder's memory whatever a
peer sends. Anything larger travels as a blob, in parts (`fal_agent.wire.BlobPart`) that other
frames may come between.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from fal_agent.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["MAX_BODY", "MAX_BUFFERS", "MAX_HEADER", "Buffer", "Frame", "FrameDecoder", "encode_frame"]

Buffer = Union[bytes, bytearray, memoryview]

MAX_HEADER = 1 << 20
MAX_BODY = 2 << 20
MAX_BUFFERS = 4096

_MAGIC = b"fn"
_PREFIX = struct.Struct("!2sHII")
_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]  # allows no white space


def _make_dumps() -> Callable[[Any], str]:
    """Give `JSONEncoder.encode`, but keep the C encoder that this makes anew for each text."""
    slow = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, check_circular=False)
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return slow.encode
    quote = json.encoder.encode_basestring_ascii
    encode = make(None, slow.default, quote, None, ":", ",", False, False, True)
    return lambda value: "".join(encode(value, 0))


_dumps = _make_dumps()


class Frame(NamedTuple):
    """One decoded frame: the JSON header and its raw buffers, in order."""

    header: dict[str, Any]
    buffers: list[bytes]


def encode_frame(header: dict[str, Any], buffers: Sequence[Buffer] = ()) -> bytes:
    """Make the bytes of one frame, in one piece so that they leave in one write.

    Args:
        header: a JSON object.
        buffers: raw bytes, `MAX_BODY` in all at most, each contiguous.

    Raises:
        ProtocolError: the frame would be larger than a decoder accepts.
    """
    text = _dumps(header).encode("ascii")
    lengths = [buffer.nbytes if isinstance(buffer, memoryview) else len(buffer) for buffer in buffers]
    body = sum(lengths)
    if len(text) > MAX_HEADER or body > MAX_BODY or len(lengths) > MAX_BUFFERS:
        raise ProtocolError(
            f"a frame of {len(text)} + {body} bytes in {len(lengths)} buffers is over the limit of "
            f"{MAX_HEADER} + {MAX_BODY} bytes in {MAX_BUFFERS}; large data travels as blobs"
        )
    prefix = _PREFIX.pack(_MAGIC, len(lengths), len(text), body)
    if not lengths:
        return prefix + text
    return b"".join((prefix, struct.pack(f"!{len(lengths)}I", *lengths), text, *buffers))


class FrameDecoder:
    """Cut a stream of bytes into frames.

    Feed it bytes as they arrive, cut anywhere. It keeps at most one unfinished frame. After a
    `ProtocolError` the stream has no meaning any more: every later call raises the same error.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._needed = 0  # length that the unfinished frame must reach before it is worth looking again
        self._error: ProtocolError | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes of an unfinished frame that are kept, never more than one frame's limit."""
        return len(self._pending)

    def feed(self, data: Buffer) -> list[Frame]:
        """Take bytes and give the frames that they complete.

        Raises:
            ProtocolError: the bytes are not frames.
        """
        if self._error is not None:
            raise self._error
        if not self._pending:
            if type(data) is bytes and (frame := self._whole(data)) is not None:
                return [frame]
            view = memoryview(data)
            frames, used = self._try(view)
            self._pending += view[used:]
            return frames
        self._pending += data
        if len(self._pending) < self._needed:
            return []
        with memoryview(self._pending) as view:  # no copy: frames take what they keep
            frames, used = self._try(view)
        del self._pending[:used]
        return frames

    def _whole(self, data: bytes) -> Frame | None:
        """Give the frame that some bytes are, if they are one frame without errors: the usual case."""
        size = len(data)
        if size < _PREFIX.size:
            return None
        magic, count, header_length, body_length = _PREFIX.unpack_from(data)
        header_start = _PREFIX.size + 4 * count
        body_start = header_start + header_length
        if magic != _MAGIC or body_start + body_length != size:
            return None
        if count > MAX_BUFFERS or header_length > MAX_HEADER or body_length > MAX_BODY:
            return None
        lengths = struct.unpack_from(f"!{count}I", data, _PREFIX.size)
        if sum(lengths) != body_length:
            return None
        header = _parse_header(data[header_start:body_start])
        return Frame(header, _slices(data, body_start, lengths))

    def _try(self, view: memoryview) -> tuple[list[Frame], int]:
        try:
            return self._cut(view)
        except ProtocolError as error:
            self._error, self._pending = error, bytearray()
            raise

    def _cut(self, view: memoryview) -> tuple[list[Frame], int]:
        frames: list[Frame] = []
        start, available = 0, len(view)
        self._needed = _PREFIX.size
        while available - start >= _PREFIX.size:
            magic, count, header_length, body_length = _PREFIX.unpack_from(view, start)
            _check_prefix(magic, count, header_length, body_length)
            header_start = start + _PREFIX.size + 4 * count
            body_start = header_start + header_length
            end = body_start + body_length
            if end > available:
                self._needed = end - start
                break
            lengths = struct.unpack_from(f"!{count}I", view, start + _PREFIX.size) if count else ()
            if sum(lengths) != body_length:
                raise ProtocolError("a frame's buffer lengths do not add up")
            header = _parse_header(bytes(view[header_start:body_start]))
            frames.append(Frame(header, _slices(view, body_start, lengths)))
            start = end
            self._needed = _PREFIX.size
        return frames, start


def _check_prefix(magic: bytes, count: int, header_length: int, body_length: int) -> None:
    if magic != _MAGIC:
        raise ProtocolError(
            f"the other side sent {magic!r} where a frame begins; it does not speak this protocol"
        )
    if count > MAX_BUFFERS or header_length > MAX_HEADER or body_length > MAX_BODY:
        raise ProtocolError(
            f"a frame announces {header_length} + {body_length} bytes in {count} buffers: over the limit"
        )


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header, end = _scan(text.decode("ascii"), 0)
    except (ValueError, RecursionError, StopIteration) as error:
        raise ProtocolError(f"a frame's header is not JSON: {error}") from None
    if not isinstance(header, dict) or end != len(text):
        raise ProtocolError("a frame's header is not a JSON object")
    return header


def _slices(view: bytes | memoryview, start: int, lengths: Iterable[int]) -> list[bytes]:
    buffers = []
    for length in lengths:
        buffers.append(bytes(view[start : start + length]))
        start += length
    return buffers
