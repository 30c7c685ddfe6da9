"""Reading and writing SSH packets: fewer system calls, and an end to endless waiting.

Runs in the notebook; one of the files that import paramiko. The ciphers stay paramiko's; this only
replaces how bytes come from and go to the socket.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from paramiko import SSHException  # type: ignore[import-untyped]
from paramiko.packet import NeedRekeyException, Packetizer  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.framing import Buffer

__all__ = ["WatchfulPacketizer"]

CAPACITY = 512 << 10
MAX_PACKET = 256 << 10  # bytes; what OpenSSH allows
MAX_BANNER_LINE = 8 << 10


class WatchfulPacketizer(Packetizer):  # type: ignore[misc] # paramiko is untyped
    """Reads ahead into one buffer and knows when bytes last went either way.

    Attributes:
        received_at: when bytes last came, by the monotonic clock.
        sent_at: when the socket last took bytes.
        on_idle: called by the reading thread whenever 0.1 s pass without bytes.
        patience: seconds that a write may make no headway.
    """

    def __init__(self, sock: Any) -> None:
        """Read from and write to `sock`."""
        super().__init__(sock)
        self._sock = sock
        self._buffer = bytearray(CAPACITY)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self.received_at = self.sent_at = time.monotonic()
        self.patience = 15.0
        self.on_idle: Callable[[], None] = lambda: None

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Give exactly `n` bytes.

        Raises:
            EOFError: the connection ended.
            NeedRekeyException: nothing is there and new keys are due (with `check_rekey`).
            SSHException: the other side announces more than any SSH program sends.
        """
        if n > MAX_PACKET:
            raise SSHException(f"a packet of {n} bytes was announced: the other side is not speaking SSH")
        while self._end - self._start < n:
            if self.handshake_timed_out():
                raise EOFError
            if not self._fill() and check_rekey and self._start == self._end and self.need_rekey():
                raise NeedRekeyException
        start, self._start = self._start, self._start + n
        return bytes(self._view[start : self._start])

    def readline(self, timeout: float) -> str:
        """Give the next line, without its end; for the greeting, before packets begin."""
        deadline = time.monotonic() + timeout
        while (newline := self._buffer.find(b"\n", self._start, self._end)) < 0:
            if self._end - self._start > MAX_BANNER_LINE:
                raise SSHException(": the first line has no end")
            if not self._fill() and time.monotonic() > deadline:
                raise TimeoutError(": nothing came")
        line = bytes(self._view[self._start : newline])
        self._start = newline + 1
        return line.rstrip(b"\r").decode("utf-8", "replace")

    def write_all(self, out: Buffer) -> None:
        """Write every byte; raises EOFError when the connection ended or makes no headway."""
        view = memoryview(out)
        started = time.monotonic()
        while view:
            try:
                sent = self._sock.send(view)
            except TimeoutError:
                if self.closed or time.monotonic() - max(self.sent_at, started) > self.patience:
                    raise EOFError from None
                continue
            except OSError as error:
                raise EOFError("" if self.closed else error.strerror or str(error)) from error
            view = view[sent:]
            self.sent_at = time.monotonic()

    def _fill(self) -> bool:
        """Read what there is; False if nothing came for a moment."""
        if CAPACITY - self._end < CAPACITY // 4:
            rest = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, len(rest)
            self._view[: self._end] = rest
        elif self._start == self._end:
            self._start = self._end = 0
        try:
            received = self._sock.recv_into(self._view[self._end :])
        except TimeoutError:
            if self.closed:
                raise EOFError from None
            self.on_idle()
            return False
        except OSError as error:
            raise EOFError("" if self.closed else error.strerror or str(error)) from error
        if not received:
            raise EOFError("the other side hung up")
        self._end += received
        self.received_at = time.monotonic()
        return True
