"""The far end of a bare channel: `peer_socket.py echo|sink PATH` listens on a Unix socket until stopped."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from timing import ARRAY_BYTES


def echo(stream: socket.socket) -> None:
    """Send back whatever comes."""
    while data := stream.recv(1 << 16):
        stream.sendall(data)


def sink(stream: socket.socket) -> None:
    """Read as many bytes as the array has, and say so by one byte; again and again."""
    buffer = bytearray(1 << 20)
    missing = ARRAY_BYTES
    while got := stream.recv_into(buffer, min(missing, len(buffer))):
        missing -= got
        if not missing:
            stream.sendall(b".")
            missing = ARRAY_BYTES


def main() -> None:
    """Serve one connection after the other."""
    path = Path(sys.argv[2])
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o777)  # the account on the other side of the SSH server is another one
    listener.listen(4)
    sys.stdout.write("!")
    sys.stdout.flush()
    while True:
        stream, _ = listener.accept()
        with stream:
            (echo if sys.argv[1] == "echo" else sink)(stream)


if __name__ == "__main__":
    main()
