"""What the sockets of a forwarded app's clients, and its streams, are told and asked.

Runs in the notebook.
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fal_notebook.hosts.base import ByteStream

__all__ = [
    "ONE_PIECE",
    "PROBES",
    "break_off",
    "end_input",
    "shut",
    "tune",
    "wait_until_gone",
    "was_unread",
]

# Clients that are gone without a trace are noticed within two minutes (Linux names; others use defaults).
PROBES = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
ONE_PIECE = 16 << 10  # bytes that a Unix socket takes as one, which is read or is not


def tune(client: socket.socket, *, receive_timeout: float, send_timeout: float) -> None:
    """Set a client's socket up; its timeouts, in seconds, raise BlockingIOError."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("SO_RCVTIMEO", receive_timeout), ("SO_SNDTIMEO", send_timeout)):
        whole = int(seconds)
        span = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), span)
    for option, value in PROBES:
        if hasattr(socket, option):
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def shut(end: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """End directions of a socket; threads that wait on it are let go. The file stays open."""
    with contextlib.suppress(OSError):  # it is not connected any more
        end.shutdown(how)


def break_off(stream: ByteStream) -> None:
    """End a stream at once; threads that wait on it are let go."""
    if isinstance(stream, socket.socket):
        shut(stream)  # closed once no thread uses its file descriptor
        return
    with contextlib.suppress(OSError):
        stream.close()


def end_input(stream: ByteStream) -> None:
    """Tell the app that no more bytes will come, by whatever the stream has for it."""
    end = getattr(stream, "end_input", None)
    if end is None and isinstance(stream, socket.socket):
        end = functools.partial(stream.shutdown, socket.SHUT_WR)
    if end is not None:
        with contextlib.suppress(OSError):  # it is gone, as the other thread will find
            end()


def wait_until_gone(client: socket.socket) -> None:
    """Wait until a client that has ended its side is reset, or is shut in both directions."""
    watch = select.poll()
    watch.register(client, 0)  # errors and hang-ups are always told
    watch.poll()


def was_unread(stream: ByteStream, problem: OSError | None) -> bool:
    """Whether the other side ended without having read the last piece that was sent to it.

    Linux says so of a Unix socket on this machine. A process that is being killed still takes connections,
    for a moment, which nobody will serve.
    """
    is_told = (
        isinstance(stream, socket.socket) and stream.family == socket.AF_UNIX and sys.platform == "linux"
    )
    return is_told and isinstance(problem, ConnectionResetError)
