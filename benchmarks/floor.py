"""The floor: two processes that exchange cloudpickle over a Unix socket, and nothing else.

No environment, no output, no errors, no second call at a time: what remains is what pickling, two
context switches and a socket cost on this machine. Every ratio in docs/benchmarks.md is against it.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
from timing import noop, p50, p95, report, samples

LENGTH = struct.Struct("!I")


def read(stream: socket.socket) -> bytes:
    """One message: four bytes of length, then the pickle; b"" at the end of the stream."""
    head = stream.recv(LENGTH.size, socket.MSG_WAITALL)
    return stream.recv(LENGTH.unpack(head)[0], socket.MSG_WAITALL) if head else b""


def write(stream: socket.socket, data: bytes) -> None:
    """Send one message in one go."""
    stream.sendall(LENGTH.pack(len(data)) + data)


def serve(path: str) -> None:
    """The other process. A message holds (function, arguments); a function of None is the last one again."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    sys.stdout.write("!")
    sys.stdout.flush()
    stream, _ = listener.accept()
    last: Any = None
    while data := read(stream):
        function, arguments = cloudpickle.loads(data)
        last = function or last
        write(stream, cloudpickle.dumps(last(*arguments)))


def connect(path: str) -> socket.socket:
    """Start the other process and reach it."""
    other = subprocess.Popen([sys.executable, __file__, "serve", path], stdout=subprocess.PIPE)
    if not other.stdout or not other.stdout.read(1):  # it says so when it listens
        raise RuntimeError("the other process did not start")
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(path)
    return stream


def call(stream: socket.socket, function: object, *arguments: object) -> object:
    """One call and its answer."""
    write(stream, cloudpickle.dumps((function, arguments)))
    return cloudpickle.loads(read(stream))


def main() -> None:
    """Measure one round."""
    # by value, as the function of a notebook's cell travels
    cloudpickle.register_pickle_by_value(sys.modules["timing"])
    with tempfile.TemporaryDirectory() as folder:
        stream = connect(str(Path(folder) / "floor.sock"))
        every = samples(lambda: call(stream, noop, 1), count=2_000)
        once = samples(lambda: call(stream, None, 1), count=2_000)
        stream.close()
    report({"floor p50": p50(every), "floor p95": p95(every), "floor, function sent once p50": p50(once)})


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        main()
