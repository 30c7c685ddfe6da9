"""A network of its own for an SSH server, joined to this machine by a wire that delays, loses or is cut.

Needs root and /dev/net/tun. The namespace has no name and the interfaces are those of a process that ends
with ours, so a test run that is killed leaves nothing behind.

Run as a script it is the wire: two TAP interfaces, and frames carried from one to the other. It takes
commands as lines of JSON, `{"delay": seconds, "loss": share, "cut": bool}`, and ends with its input.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["ShapedLink"]

_TUNSETIFF, _TAP, _NO_PACKET_INFO = 0x400454CA, 0x0002, 0x1000
_NEW_NETWORK = 0x40000000
_FRAME = 65600


class ShapedLink:
    """The namespace and its wire.

    Attributes:
        there: the address over there.
    """

    def __init__(self) -> None:
        self._wire = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._wire.stdout is not None
        self.there = self._wire.stdout.readline().decode().strip()
        if not self.there:
            raise RuntimeError("the wire did not come up; what it wrote is above")

    @staticmethod
    def is_possible() -> bool:
        """Whether this process may make one."""
        return os.geteuid() == 0 and Path("/dev/net/tun").exists() and shutil.which("nsenter") is not None

    @property
    def prefix(self) -> list[str]:
        """Words before a command that is to run over there."""
        return ["nsenter", f"--net=/proc/{self._wire.pid}/ns/net"]

    def shape(self, *, delay: float = 0.0, loss: float = 0.0, cut: bool = False) -> None:
        """Set what the wire does from now on.

        Args:
            delay: seconds that a frame takes, in each direction.
            loss: share of the frames that are lost, 0 to 1.
            cut: nothing passes.
        """
        assert self._wire.stdin is not None
        self._wire.stdin.write(json.dumps({"delay": delay, "loss": loss, "cut": cut}).encode() + b"\n")
        self._wire.stdin.flush()

    def close(self) -> None:
        """Take the wire away; the namespace goes with its last process."""
        assert self._wire.stdin is not None
        self._wire.stdin.close()
        self._wire.wait(timeout=10)


def _tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14s", name.encode(), _TAP | _NO_PACKET_INFO, b""))
    return fd


def _address(name: str, address: str) -> None:
    subprocess.run(["ip", "addr", "add", f"{address}/30", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)


def _make() -> tuple[int, int, str]:
    """The two ends and the far one's address; this process moves to the far network."""
    numbers = random.sample(range(250), 20)
    near, number = next(found for n in numbers if (found := _first_end(n)) is not None)
    _address(f"falw{number}", f"10.213.{number}.1")
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace can be made")
    far = _tap("eth0")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    there = f"10.213.{number}.2"
    _address("eth0", there)
    return near, far, there


def _first_end(number: int) -> tuple[int, int] | None:
    """The near end; None if another wire has the number."""
    try:
        return _tap(f"falw{number}"), number
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return None


def _carry(near: int, far: int) -> None:
    """Carry frames until the input ends; their order stays."""
    shape = {"delay": 0.0, "loss": 0.0, "cut": False}
    waiting: list[tuple[float, int, int, bytes]] = []
    due_last, number = {near: 0.0, far: 0.0}, 0
    poll = select.epoll()
    for fd in (near, far, 0):
        poll.register(fd, select.EPOLLIN)
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, out, frame = heapq.heappop(waiting)
            _put(out, frame)
        for fd, _ in poll.poll(max(0.0, waiting[0][0] - now) if waiting else -1):
            if fd == 0:
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                shape = json.loads(line)
                continue
            out = far if fd == near else near
            for frame in _frames(fd):
                if shape["cut"] or random.random() < shape["loss"]:
                    continue
                if not shape["delay"] and not waiting:
                    _put(out, frame)
                    continue
                due = due_last[out] = max(due_last[out], time.monotonic() + shape["delay"])
                number += 1
                heapq.heappush(waiting, (due, number, out, frame))


def _frames(fd: int) -> list[bytes]:
    frames = []
    try:
        while len(frames) < 64:
            frames.append(os.read(fd, _FRAME))
    except BlockingIOError:
        pass
    return frames


def _put(fd: int, frame: bytes) -> None:
    try:
        os.write(fd, frame)
    except OSError:  # as on a wire: the frame is lost
        return


if __name__ == "__main__":
    near_end, far_end, far_address = _make()
    print(far_address, flush=True)
    _carry(near_end, far_end)
