"""Both ends of a forwarded port in the hands of a test."""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING

from support.waiting import until

if TYPE_CHECKING:
    from fal_notebook.forwarding import Forwarder

__all__ = ["Peer", "connect", "fill", "read_all"]

PIECE = bytes(1 << 20)


class Peer:
    """A stand-in for an app: the test holds the other end of each stream that was dialled."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []

    def dial(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.settimeout(20)
        self.ends.append(theirs)
        return ours

    def end(self, number: int = 0) -> socket.socket:
        until(lambda: len(self.ends) > number)
        return self.ends[number]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends:
            end.close()


def connect(forwarder: Forwarder) -> socket.socket:
    return socket.create_connection(("127.0.0.1", forwarder.port), 20)


def read_all(end: socket.socket) -> bytes:
    pieces = []
    while piece := end.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def fill(end: socket.socket) -> int:
    """Send until nothing more is taken; gives the number of bytes."""
    end.setblocking(False)
    sent = 0
    while select.select([], [end], [], 0.5)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += end.send(PIECE)
    end.setblocking(True)
    end.settimeout(20)
    return sent
