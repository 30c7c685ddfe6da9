"""A network link with a delay, to a port of this machine: real TCP over two TAP devices (Linux, root).

`slow_link.py DELAY PORT` makes a network namespace, joins it to this one by a pair of TAP devices
whose frames wait DELAY milliseconds each way, and forwards what reaches the far end to 127.0.0.1:PORT.
It prints the address and port of the far end, and works until its standard input ends. Nothing has
a name in the file system and the devices are not persistent, so nothing is left behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time

NEAR, FAR = "10.78.94.1", "10.78.94.2"
CLONE_NEWNET = 0x40000000
TUNSETIFF, TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000
FRAME = 65_600

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raise the error of a system call that libc reports by -1."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def tap(name: str) -> int:
    """A TAP device in the current network namespace; it goes when the descriptor is closed."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH14s", name.encode(), TAP_WITHOUT_HEADER, b""))
    return fd


def configure(name: str, address: str) -> None:
    """Give a device its address and switch it on."""
    for command in (["addr", "add", f"{address}/30", "dev", name], ["link", "set", name, "up"]):
        subprocess.run(["ip", *command], check=True)


def build() -> tuple[int, int, socket.socket]:
    """Both ends of the link, and a listening socket on the far one."""
    near = tap("falslow0")
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    check(libc.unshare(CLONE_NEWNET))
    far = tap("falslow1")
    configure("falslow1", FAR)
    listener = socket.create_server((FAR, 0), backlog=64)
    check(libc.setns(home, CLONE_NEWNET))  # a socket stays in the namespace where it was made
    os.close(home)
    configure("falslow0", NEAR)
    return near, far, listener


def relay(near: int, far: int, delay: float) -> None:
    """Carry frames both ways, each `delay` seconds late, in order."""
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    poll = select.epoll()
    for fd in (near, far):
        poll.register(fd, select.EPOLLIN)
    while True:
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, out, frame = heapq.heappop(waiting)
            os.write(out, frame)
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else -1
        for fd, _ in poll.poll(pause):
            number += 1
            frame = os.read(fd, FRAME)
            heapq.heappush(waiting, (time.monotonic() + delay, number, far if fd == near else near, frame))


def forward(listener: socket.socket, port: int) -> None:
    """Join each connection at the far end with one to 127.0.0.1:`port`."""
    while True:
        outer, _ = listener.accept()
        inner = socket.create_connection(("127.0.0.1", port))
        for a, b in ((outer, inner), (inner, outer)):
            a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=pump, args=(a, b), daemon=True).start()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way until either side ends."""
    try:
        while data := source.recv(1 << 18):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()  # either side broke: so is the connection
        target.close()


def main() -> None:
    """Run the link until standard input ends."""
    delay, port = float(sys.argv[1]) / 1000, int(sys.argv[2])
    near, far, listener = build()
    threading.Thread(target=relay, args=(near, far, delay), daemon=True).start()
    threading.Thread(target=forward, args=(listener, port), daemon=True).start()
    sys.stdout.write(f"{FAR} {listener.getsockname()[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
