"""A Unix socket on the other side of a link that echoes, swallows, pours or ignores.

Runs as a process of its own, so that what is measured or strained is the link and not this test run. The
first byte of a connection says what it does: `e` echoes, `s` counts the n bytes that an 8-byte number
announces and answers `k`, `g` gives n bytes, `i` reads nothing until the connection ends.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.hosts.base import ByteStream

__all__ = ["count_bytes", "echo", "pour", "read_exactly", "socket_server"]

PIECE = 1 << 18


@contextmanager
def socket_server(path: Path) -> Iterator[str]:
    """Serve at `path`, which every user may connect to; gives the path as text."""
    process = subprocess.Popen([sys.executable, __file__, str(path)], stdin=subprocess.PIPE)
    try:
        while not path.exists():
            assert process.poll() is None, "the socket server did not start"
            time.sleep(0.01)
        yield str(path)
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def read_exactly(stream: ByteStream, size: int) -> bytes:
    """Read `size` bytes; fewer only if the stream ends."""
    pieces = []
    while size and (data := stream.recv(min(size, PIECE))):
        pieces.append(data)
        size -= len(data)
    return b"".join(pieces)


def echo(stream: ByteStream, data: bytes) -> bytes:
    """Send `data` to a connection that echoes and give what comes back, meanwhile."""
    sender = threading.Thread(target=stream.sendall, args=(b"e" + data,))
    sender.start()
    came = read_exactly(stream, len(data))
    sender.join()
    return came


def count_bytes(stream: ByteStream, size: int) -> None:
    """Send `size` bytes and wait until the other side has counted them."""
    stream.sendall(b"s" + size.to_bytes(8, "big"))
    piece = bytes(1 << 20)
    for start in range(0, size, len(piece)):
        stream.sendall(memoryview(piece)[: size - start])
    assert stream.recv(1) == b"k"


def pour(stream: ByteStream, size: int) -> None:
    """Ask for `size` bytes and read them."""
    stream.sendall(b"g" + size.to_bytes(8, "big"))
    left = size
    while left:
        data = stream.recv(PIECE)
        assert data, f"{left} of {size} bytes did not come"
        left -= len(data)


def _serve(connection: socket.socket) -> None:
    kind = connection.recv(1)
    try:
        if kind == b"e":
            while data := connection.recv(PIECE):
                connection.sendall(data)
        elif kind == b"i":
            threading.Event().wait()
        else:
            _transfer(connection, kind, int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big"))
    except OSError:
        return  # the other side left in the middle
    finally:
        connection.close()


def _transfer(connection: socket.socket, kind: bytes, left: int) -> None:
    buffer = bytearray(PIECE)
    while left > 0:
        if kind == b"g":
            connection.sendall(buffer[:left])
            left -= len(buffer)
        else:
            received = connection.recv_into(buffer)
            if not received:
                return
            left -= received
    if kind == b"s":
        connection.sendall(b"k")


def _main(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    beside = path.with_suffix(".new")
    listener.bind(str(beside))
    beside.chmod(0o777)
    listener.listen(64)
    beside.rename(path)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _end_with_parent() -> None:
    import os

    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
