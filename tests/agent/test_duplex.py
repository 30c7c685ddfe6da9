"""Messages over a stream, from any thread."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
from typing import Any

import pytest
from support.waiting import until

from fal_agent.duplex import Duplex, uninterrupted
from fal_agent.errors import ProtocolError
from fal_agent.framing import FrameDecoder
from fal_agent.wire import Log, Message, Ping, Pong, decode

TIMEOUT = 10.0


class Pair:
    """A duplex on one end of a socket pair, and the bare other end."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(TIMEOUT)
        self.messages: queue.SimpleQueue[tuple[Message, list[bytes]]] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.duplex = Duplex(self.ours, lambda *item: self.messages.put(item), self.ends.put, name="test")
        self.duplex.start()

    def close(self) -> None:
        self.duplex.close()
        self.theirs.close()


@pytest.fixture
def pair() -> Any:
    """A connection that ends with the test."""
    made = Pair()
    yield made
    made.close()


def test_a_small_message_passes_between_the_parts_of_a_large_blob(pair: Pair) -> None:
    """An interrupt must not wait for an upload of gigabytes."""
    data = bytes(32 << 20)
    sender = threading.Thread(target=pair.duplex.send_blob, args=("big", data), kwargs={"part_size": 1024})
    sender.start()
    time.sleep(0.05)  # the socket's buffer is full by now, so the sender is in the midst of it
    small = threading.Thread(target=pair.duplex.send, args=(Ping(7),))
    small.start()
    time.sleep(0.05)

    decoder, received, before_ping = FrameDecoder(), 0, -1
    while received < len(data) or before_ping < 0:
        for frame in decoder.feed(pair.theirs.recv(1 << 16)):
            if isinstance(decode(frame), Ping):
                before_ping = received
            else:
                received += len(frame.buffers[0])

    sender.join(TIMEOUT)
    small.join(TIMEOUT)
    assert received == len(data)
    assert before_ping < 8 << 20  # what had left, and one part: not the whole blob


def test_a_blob_that_is_withdrawn_stops(pair: Pair) -> None:
    withdrawn = threading.Event()
    sender = threading.Thread(
        target=pair.duplex.send_blob,
        args=("big", bytes(64 << 20)),
        kwargs={"part_size": 1024, "stop": withdrawn.is_set},
    )
    sender.start()
    arrived = len(pair.theirs.recv(4096))
    withdrawn.set()
    pair.theirs.settimeout(0.05)
    while sender.is_alive():
        try:
            arrived += len(pair.theirs.recv(1 << 16))
        except TimeoutError:
            sender.join(0.05)

    assert arrived < 32 << 20


def test_messages_arrive_with_their_buffers(pair: Pair) -> None:
    Duplex(pair.theirs, lambda *_: None, lambda _: None, name="other").send(Log("r", "stdout"), [b"hello"])

    message, buffers = pair.messages.get(timeout=TIMEOUT)

    assert message == Log("r", "stdout")
    assert buffers == [b"hello"]


def test_a_clean_end_is_no_problem_and_half_a_message_is(pair: Pair) -> None:
    other = Pair()
    pair.theirs.close()
    assert pair.ends.get(timeout=TIMEOUT) is None

    other.theirs.sendall(b"fn")
    other.theirs.close()
    assert isinstance(other.ends.get(timeout=TIMEOUT), EOFError)
    other.close()


def test_a_stream_that_the_other_side_has_ended_is_closed(pair: Pair) -> None:
    pair.theirs.close()

    assert pair.ends.get(timeout=TIMEOUT) is None
    until(lambda: pair.ours.fileno() == -1)


def test_nonsense_ends_the_connection_with_a_protocol_error(pair: Pair) -> None:
    pair.theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    assert isinstance(pair.ends.get(timeout=TIMEOUT), ProtocolError)


def test_ctrl_c_does_not_cut_a_message_in_two() -> None:
    """The main thread may be interrupted at any moment; the stream must stay in step."""
    steps = []

    def send() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            steps.append("sent whole")

    with pytest.raises(KeyboardInterrupt):
        send()
    assert steps == ["sent whole"]


def test_a_message_sent_to_a_closed_connection_is_an_error(pair: Pair) -> None:
    pair.theirs.close()
    pair.ends.get(timeout=TIMEOUT)

    def send_on() -> None:
        for number in range(1000):
            pair.duplex.send(Pong(number))

    with pytest.raises(OSError, match=r"Broken pipe|closed"):
        send_on()
