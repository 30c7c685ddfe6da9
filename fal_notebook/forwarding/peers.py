"""Which account of this machine a loopback connection comes from.

Runs in the notebook. A port of 127.0.0.1 can be dialled by everybody who has an account here; Linux tells
whose socket is at the other end.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

__all__ = ["GONE", "owner", "stranger"]

GONE = -1  # a client that has closed its socket belongs to nobody any more

_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _REQUEST = 4, 20, 1
_ANY_STATE, _NO_COOKIE = 0xFFFFFFFF, 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ERROR = 2  # type of an answer that holds a negative error number
_OWNER = _HEADER.size + 4 + 48 + 12  # behind four bytes, the socket's addresses, and three counters
_TIMEOUT = 1.0  # seconds


def owner(connection: socket.socket) -> int | None:
    """Give the user id of the process that dialled a TCP connection of this machine's loopback address.

    Returns:
        `GONE` if the client has closed its socket; None where the system does not tell, as it is not Linux.
    """
    try:
        (host, port), (own_host, own_port) = connection.getpeername(), connection.getsockname()
        addresses = struct.pack(
            "!HH16s16s", port, own_port, socket.inet_aton(host), socket.inet_aton(own_host)
        )
        cookie = struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
        question = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, _ANY_STATE)
        asked = question + addresses + cookie
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
            kernel.settimeout(_TIMEOUT)
            kernel.send(_HEADER.pack(_HEADER.size + len(asked), _SOCK_DIAG_BY_FAMILY, _REQUEST, 1, 0) + asked)
            answer = kernel.recv(4096)
        kind = _HEADER.unpack_from(answer)[1]
        if kind == _ERROR:
            number = struct.unpack_from("=i", answer, _HEADER.size)[0]
            return GONE if number == -errno.ENOENT else None
        uid, inode = struct.unpack_from("=II", answer, _OWNER)
    except (OSError, AttributeError, ValueError, struct.error):  # there is no such question here
        return None
    return int(uid) if inode else GONE


def stranger(connection: socket.socket) -> int | None:
    """Give whose connection this is if it is not ours or root's, or `GONE`; None too if nobody knows."""
    uid = owner(connection)
    return None if uid in (None, 0, os.getuid()) else uid
