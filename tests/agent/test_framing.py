"""The codec of frames: any cut of a stream gives the same frames, and garbage an error in bounded memory."""

from __future__ import annotations

import array
import json
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fal_agent.errors import ProtocolError
from fal_agent.framing import MAX_BODY, MAX_BUFFERS, MAX_HEADER, Frame, FrameDecoder, encode_frame

PREFIX = struct.Struct("!2sHII")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
headers = st.dictionaries(st.text(), json_values, max_size=5)
frames = st.tuples(headers, st.lists(st.binary(max_size=300), max_size=5))


def fed(decoder: FrameDecoder, data: bytes) -> list[Frame] | ProtocolError:
    """The frames that a piece gives, or the error."""
    try:
        return decoder.feed(data)
    except ProtocolError as error:
        return error


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted(cut % (len(stream) + 1) for cut in cuts)
    return [stream[start:end] for start, end in zip([0, *ends], [*ends, len(stream)], strict=True)]


@given(st.lists(frames, max_size=6), st.lists(st.integers(min_value=0), max_size=12))
def test_frames_survive_any_cut_of_the_stream(sent: list[Any], cuts: list[int]) -> None:
    """A socket may split the bytes anywhere, even inside the length of a frame."""
    stream = b"".join(encode_frame(header, buffers) for header, buffers in sent)
    decoder = FrameDecoder()

    received = [frame for piece in pieces(stream, cuts) for frame in decoder.feed(piece)]

    assert received == [Frame(header, buffers) for header, buffers in sent]
    assert decoder.pending_bytes == 0


@given(st.lists(frames, min_size=1, max_size=3))
@settings(max_examples=25)
def test_frames_survive_byte_by_byte(sent: list[Any]) -> None:
    stream = b"".join(encode_frame(header, buffers) for header, buffers in sent)
    decoder = FrameDecoder()

    received = [frame for index in range(len(stream)) for frame in decoder.feed(stream[index : index + 1])]

    assert received == [Frame(header, buffers) for header, buffers in sent]


@given(frames, st.data())
def test_a_frame_that_is_not_whole_gives_nothing_and_is_kept(sent: Any, data: st.DataObject) -> None:
    stream = encode_frame(*sent)
    cut = data.draw(st.integers(0, len(stream) - 1))
    decoder = FrameDecoder()

    assert decoder.feed(stream[:cut]) == []
    assert decoder.pending_bytes == cut
    assert decoder.feed(stream[cut:]) == [Frame(*sent)]


@given(st.binary(max_size=200), st.lists(st.integers(min_value=0), max_size=5))
def test_garbage_gives_an_error_or_waits_but_never_a_frame_of_its_own(
    garbage: bytes, cuts: list[int]
) -> None:
    assume(not garbage.startswith(b"fn"[: len(garbage)]))
    decoder = FrameDecoder()

    outcomes = [fed(decoder, piece) for piece in [*pieces(garbage, cuts), b"\0" * 12]]

    assert isinstance(outcomes[-1], ProtocolError)
    assert all(outcome == [] or isinstance(outcome, ProtocolError) for outcome in outcomes)
    assert decoder.pending_bytes == 0


@given(
    st.integers(0, 65535),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=2000),
)
def test_any_announced_lengths_are_refused_or_bound_the_memory(
    count: int, header: int, body: int, rest: bytes
) -> None:
    """Whatever a peer announces, what is kept is never more than the longest frame."""
    decoder = FrameDecoder()
    refused = count > MAX_BUFFERS or header > MAX_HEADER or body > MAX_BODY

    outcome = fed(decoder, PREFIX.pack(b"fn", count, header, body) + rest)

    assert isinstance(outcome, ProtocolError) or not refused
    assert decoder.pending_bytes <= (0 if isinstance(outcome, ProtocolError) else 12 + len(rest))


@given(frames, st.data())
def test_a_changed_byte_never_raises_anything_but_a_protocol_error(sent: Any, data: st.DataObject) -> None:
    stream = bytearray(encode_frame(*sent))
    stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))

    outcome = fed(FrameDecoder(), bytes(stream) + encode_frame({}))

    assert isinstance(outcome, list) or str(outcome)


def test_memory_stays_below_a_few_frames_however_much_arrives() -> None:
    """A stream of the longest frames, in pieces that never meet a frame's end."""
    frame = encode_frame({"x": "y" * (MAX_HEADER - 8)}, [b"z" * MAX_BODY])
    stream = frame * 3
    decoder = FrameDecoder()
    tracemalloc.start()
    kept = 0
    for _ in range(4):
        for start in range(0, len(stream), 65_521):
            decoder.feed(stream[start : start + 65_521])
            kept = max(kept, decoder.pending_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert kept <= len(frame)
    assert peak < 6 * len(frame)


def test_a_frame_that_never_ends_is_not_copied_again_with_every_piece() -> None:
    """Else a long frame in small pieces would take time with the square of its length."""
    frame = encode_frame({}, [b"z" * MAX_BODY])
    decoder = FrameDecoder()
    looked = []
    cut = decoder._cut
    decoder._cut = lambda view: looked.append(len(view)) or cut(view)  # type: ignore[method-assign]
    for start in range(0, len(frame), 1000):
        decoder.feed(frame[start : start + 1000])

    assert len(looked) <= 3


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"1",
        b"null",
        b'"fn"',
        b"",
        b"{",
        b'{"a":1}x',
        b'{"a":}',
        b'\xff{"a":1}',
        '{"é":1}'.encode(),
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_a_header_that_is_not_a_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="header"):
        FrameDecoder().feed(PREFIX.pack(b"fn", 0, len(text), 0) + text)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    for lengths, body in [((1, 2), 4), ((5,), 4), ((), 4), ((2**32 - 1, 5), 4)]:
        table = struct.pack(f"!{len(lengths)}I", *lengths)
        with pytest.raises(ProtocolError, match="do not add up"):
            FrameDecoder().feed(PREFIX.pack(b"fn", len(lengths), 2, body) + table + b"{}" + b"z" * body)


def test_after_an_error_the_stream_stays_broken() -> None:
    """What follows garbage could be anything; guessing where a frame begins would be worse."""
    decoder = FrameDecoder()
    with pytest.raises(ProtocolError, match="does not speak this protocol"):
        decoder.feed(b"HTTP/1.1 400 Bad Request")

    with pytest.raises(ProtocolError, match="does not speak this protocol"):
        decoder.feed(encode_frame({}))


def test_the_longest_frame_passes_and_one_byte_more_does_not() -> None:
    longest = {"x": "y" * (MAX_HEADER - 8)}
    assert len(json.dumps(longest, separators=(",", ":"))) == MAX_HEADER

    assert FrameDecoder().feed(encode_frame(longest, [b"z" * MAX_BODY]))[0].header == longest
    assert len(FrameDecoder().feed(encode_frame({}, [b""] * MAX_BUFFERS))[0].buffers) == MAX_BUFFERS
    for header, buffers in [
        ({"x": "y" * (MAX_HEADER - 7)}, []),
        ({}, [b"z" * MAX_BODY, b"z"]),
        ({}, [b""] * (MAX_BUFFERS + 1)),
    ]:
        with pytest.raises(ProtocolError, match="travels as blobs"):
            encode_frame(header, buffers)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer_is_taken_by_both_ends(kind: Any) -> None:
    stream = encode_frame({"a": 1}, [kind(b"12345"), kind(b"")])
    decoder = FrameDecoder()

    received = decoder.feed(kind(stream[:9])) + decoder.feed(kind(stream[9:]))

    assert received == [Frame({"a": 1}, [b"12345", b""])]


def test_a_view_of_larger_items_counts_in_bytes() -> None:
    """An array's own view has a length in items: a frame that trusted it would break the stream."""
    numbers = array.array("d", [1.0, 2.0, 3.0])

    (frame,) = FrameDecoder().feed(encode_frame({}, [memoryview(numbers), b"x"]))

    assert frame.buffers == [numbers.tobytes(), b"x"]


def test_frames_do_not_share_memory_with_what_was_fed() -> None:
    """A reader may use its buffer again for the next bytes."""
    stream = bytearray(encode_frame({}, [b"12345"]))
    (frame,) = FrameDecoder().feed(stream)
    stream[-5:] = b"-----"

    assert frame.buffers == [b"12345"]
