"""Streams and commands through a running `ssh`, by the protocol that its ControlMaster speaks.

Runs in the notebook; standard library only. A request hands file descriptors to that process, which copies
between them and a channel: no process is started per stream, and a refusal is told from an end.
The messages are described in the file PROTOCOL.mux of OpenSSH.

Unix sockets of the machine are reached by forwards: `ssh` connects to them directly since version 9.4 only.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

from fal_notebook.hosts.ssh_link import ChannelRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer

__all__ = ["Forwards", "MuxSession", "MuxStream", "is_served", "open_session"]

HELLO, NEW_SESSION, OPEN_FORWARD, CLOSE_FORWARD, NEW_TCP = 1, 0x10000002, 0x10000006, 0x10000007, 0x10000008
OK, DENIED, FAILED, EXIT, OPENED = 0x80000001, 0x80000002, 0x80000003, 0x80000004, 0x80000006
VERSION = 4
LOCAL = 1  # the kind of forwarding that listens here
STREAM_LOCAL = 0xFFFFFFFE  # in a port's place: the host is the path of a Unix socket
NO_ESCAPE = 0xFFFFFFFF
MAX_FORWARDS = 32  # kept; each is one socket
MAX_MESSAGE = 256 << 10  # bytes
MAX_STDERR = 1 << 20  # bytes of standard error that are kept, the last ones
CONNECT_FAILED = 2


def is_served(path: str, timeout: float) -> bool:
    """Whether an `ssh` with an authenticated connection serves a control socket."""
    try:
        _control(path, timeout).close()
    except OSError:
        return False
    return True


class Forwards:
    """Unix sockets in a private folder here, each of which leads to one of the machine's.

    Args:
        path: the control socket.
        folder: where they are.
        lost: says in words how the connection ended; None if it stands.
    """

    def __init__(self, path: str, folder: str, lost: Callable[[], str | None]) -> None:
        self._path, self._folder, self._lost = path, folder, lost
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}  # the machine's socket -> ours; the one used last at the end
        self._numbers = itertools.count()

    def open(self, target: str, timeout: float) -> MuxStream:
        """Open a stream to a Unix socket of the machine, an absolute path.

        Raises:
            ChannelRefused: the server said no.
            OSError: the connection is gone; TimeoutError, if no answer came.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._lock:
                sock.connect(self._ours(target, timeout))
            self._wait_for_answer(timeout)
            if _wait_for_bytes(sock, 0.0) and not sock.recv(1, socket.MSG_PEEK):
                raise ChannelRefused(CONNECT_FAILED, "open failed")
        except ChannelRefused:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionResetError(self._lost() or f"ssh took no connection: {error}") from error
        return MuxStream(sock, sock, self._lost)

    def _ours(self, target: str, timeout: float) -> str:
        if target not in self._known:
            while len(self._known) >= MAX_FORWARDS:
                oldest = next(iter(self._known))
                ours = self._known.pop(oldest)
                self._ask(CLOSE_FORWARD, ours, oldest, timeout)
                with contextlib.suppress(OSError):  # ssh removed it
                    os.unlink(ours)  # noqa: PTH108 - beside the other calls on sockets
            ours = f"{self._folder}/{next(self._numbers)}"
            self._ask(OPEN_FORWARD, ours, target, timeout)
            self._known[target] = ours
        self._known[target] = self._known.pop(target)
        return self._known[target]

    def _ask(self, kind: int, ours: str, target: str, timeout: float) -> None:
        places = (
            _text(ours) + struct.pack("!I", STREAM_LOCAL) + _text(target) + struct.pack("!I", STREAM_LOCAL)
        )
        content = struct.pack("!II", 0, LOCAL) + places
        _request(self._path, kind, content, (), lost=self._lost, timeout=timeout).close()

    def _wait_for_answer(self, timeout: float) -> None:
        """Have the server answer something else; as it answers in order, it has answered before then.

        A connection to no port at all is refused by every server, whatever it allows.
        """
        ours, theirs = socket.socketpair()
        content = struct.pack("!I", 0) + _text("") + _text("127.0.0.1") + struct.pack("!I", 0)
        with ours, theirs, contextlib.suppress(ChannelRefused):
            _request(self._path, NEW_TCP, content, (theirs, theirs), lost=self._lost, timeout=timeout).close()


def open_session(path: str, command: str, *, lost: Callable[[], str | None], timeout: float) -> MuxSession:
    """Run a line in the user's login shell.

    Args:
        path: the control socket.
        command: the line.
        lost: says in words how the connection ended; None if it stands.
        timeout: seconds for the server to take the command.

    Raises:
        ChannelRefused: the server said no.
        OSError: the connection is gone; TimeoutError, if no answer came.
    """
    content = struct.pack("!I", 0) + _text("") + struct.pack("!5I", 0, 0, 0, 0, NO_ESCAPE)
    content += _text("") + _text(command)
    pairs = [socket.socketpair() for _ in range(3)]
    try:
        theirs = [pair[1] for pair in pairs]
        control = _request(path, NEW_SESSION, content, theirs, lost=lost, timeout=timeout)
    except BaseException:
        for ours, _ in pairs:
            ours.close()
        raise
    finally:
        for _, other in pairs:
            other.close()
    (stdin, _), (stdout, _), (stderr, _) = pairs
    return MuxSession(control, stdin, stdout, stderr, lost)


class MuxStream:
    """A duplex stream of bytes through one channel; one thread reads, any number write."""

    def __init__(
        self, ours_in: socket.socket, ours_out: socket.socket, lost: Callable[[], str | None]
    ) -> None:
        """Write to one socket and read from the other, which may be the same; `lost` as in `Forwards`."""
        self._in, self._out, self._lost = ours_in, ours_out, lost
        self._sending = threading.Lock()
        self._closed = False

    def sendall(self, data: Buffer, /) -> None:
        """Send every byte, waiting as long as the other side takes none."""
        with self._sending:
            try:
                self._in.sendall(data)
            except OSError as error:
                raise self._broken(error) from error

    def recv(self, size: int, /, *, timeout: float | None = None) -> bytes:
        """Wait for bytes, at most `size`; b"" at the end of the stream.

        Raises:
            TimeoutError: nothing came within `timeout` seconds.
            OSError: the connection broke, or the stream was closed here.
        """
        try:
            if timeout is not None and not _wait_for_bytes(self._out, timeout):
                raise TimeoutError(f"nothing arrived within {timeout:g} s")
            data = self._out.recv(size)
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise self._broken(error) from error
        if not data and (self._closed or not self._has_ended()):
            raise self._broken(None)
        return data

    def end_input(self) -> None:
        """Tell the other side that no more bytes will come from here."""
        with contextlib.suppress(OSError):  # it has gone already
            self._in.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the stream; waiting threads are let go. May be called more than once."""
        self._closed = True
        for sock in (self._in, self._out):
            with contextlib.suppress(OSError):  # the other side was first
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _has_ended(self) -> bool:
        """Tell the end of the channel from the end of the connection, which look the same here."""
        return self._lost() is None

    def _broken(self, error: Exception | None) -> OSError:
        if self._closed:
            return OSError("the stream is closed")
        reason = self._lost()
        if reason is not None:
            return ConnectionResetError(reason)
        return BrokenPipeError(f"the stream is closed ({error})" if error else "the stream is closed")


class MuxSession(MuxStream):
    """A command's input, output and end."""

    def __init__(
        self,
        control: socket.socket,
        stdin: socket.socket,
        stdout: socket.socket,
        stderr: socket.socket,
        lost: Callable[[], str | None],
    ) -> None:
        """Take over our ends, and the connection on which `ssh` tells how the command ended."""
        super().__init__(stdin, stdout, lost)
        self._control = control
        self._status: int | None = None
        self._is_gone = False
        self._errors = b""
        self._listener = threading.Thread(
            target=self._listen, args=(stderr,), name="fal-ssh-stderr", daemon=True
        )
        self._listener.start()

    @property
    def exit_status(self) -> int | None:
        """How the command ended; None as long as that is not known, -1 if a signal did it."""
        self._hear(0.0)
        return self._status if self._status is not None or not self._is_gone else -1

    @property
    def standard_error(self) -> bytes:
        """What the command wrote there, the last `MAX_STDERR` bytes."""
        return self._errors

    def wait_until_gone(self, timeout: float) -> bool:
        """Wait for the end of the command and of its standard error; False if they do not come."""
        self._hear(timeout)
        self._listener.join(timeout)
        return self._is_gone and not self._listener.is_alive()

    def close(self) -> None:
        """End the stream and the command's input and output."""
        super().close()
        self._control.close()

    def _has_ended(self) -> bool:
        return self._hear(0.0) or super()._has_ended()

    def _hear(self, timeout: float) -> bool:
        """Read what `ssh` says about the command; gives whether it told the status."""
        while not self._is_gone and self._status is None:
            if self._closed or not _wait_for_bytes(self._control, timeout):
                break
            message = _receive(self._control)
            if message is None:
                self._is_gone = True
            elif message[0] == EXIT:
                self._status = int(struct.unpack_from("!I", message[1], 4)[0])
                self._is_gone = True
        return self._status is not None

    def _listen(self, errors: socket.socket) -> None:
        with errors:
            while data := errors.recv(1 << 16):
                self._errors = (self._errors + data)[-MAX_STDERR:]


def _wait_for_bytes(sock: socket.socket, timeout: float) -> bool:
    """Wait until a socket has bytes or an end; False after `timeout` seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(timeout, 0.0) * 1000))


def _request(
    path: str,
    kind: int,
    content: bytes,
    sockets: Sequence[socket.socket],
    *,
    lost: Callable[[], str | None],
    timeout: float,
) -> socket.socket:
    """Ask for something, handing over sockets; gives the connection on which it was granted."""
    try:
        control = _control(path, timeout)
    except OSError as error:
        raise ConnectionResetError(lost() or f"ssh takes no request: {error}") from error
    try:
        _send(control, kind, content)
        for sock in sockets:
            rights = array.array("i", [sock.fileno()])
            control.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())])
        answer = _receive(control)
        if answer is None:
            raise ConnectionResetError(lost() or "ssh gave no answer")
        if answer[0] in (FAILED, DENIED):
            size = struct.unpack_from("!I", answer[1], 4)[0]
            raise ChannelRefused(CONNECT_FAILED, answer[1][8 : 8 + size].decode("utf-8", "replace"))
        if answer[0] not in (OPENED, OK):
            raise ConnectionResetError(f"ssh gave an answer that was not expected: {answer[0]:#x}")
    except TimeoutError as error:
        control.close()
        raise TimeoutError(f"the server did not open a channel within {timeout:g} s") from error
    except BaseException:
        control.close()
        raise
    control.settimeout(None)
    return control


def _control(path: str, timeout: float) -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.settimeout(timeout)
    try:
        control.connect(path)
        _send(control, HELLO, struct.pack("!I", VERSION))
        hello = _receive(control)
        if hello is None or hello[0] != HELLO:
            raise ConnectionResetError("no ssh serves this control socket")
    except BaseException:
        control.close()
        raise
    return control


def _text(text: str) -> bytes:
    data = os.fsencode(text)
    return struct.pack("!I", len(data)) + data


def _send(control: socket.socket, kind: int, content: bytes) -> None:
    control.sendall(struct.pack("!II", 4 + len(content), kind) + content)


def _receive(control: socket.socket) -> tuple[int, bytes] | None:
    """Read one message; None at the end of the connection."""
    head = _exactly(control, 8)
    if head is None:
        return None
    size, kind = struct.unpack("!II", head)
    if not 4 <= size <= MAX_MESSAGE:  # noqa: PLR2004 - the kind is part of it
        raise ConnectionResetError("ssh sent a message of an impossible size")
    content = _exactly(control, size - 4)
    return None if content is None else (kind, content)


def _exactly(control: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        piece = control.recv(size - len(data))
        if not piece:
            return None
        data += piece
    return data
