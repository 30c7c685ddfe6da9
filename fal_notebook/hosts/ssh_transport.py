"""An SSH connection whose streams keep flowing through every change of keys.

Runs in the notebook; one of the files that import paramiko, so it is imported on first use only.

Three rules hold here that paramiko's own transport breaks. The transport's thread never waits to send:
what it has to answer goes to an outbox that a writing thread empties. Between the first and the last
message of a key exchange nothing but that exchange is sent. After a channel's CLOSE nothing more is sent
on that channel, because OpenSSH ends the whole connection over it.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import paramiko  # type: ignore[import-untyped]
from paramiko import common

from fal_notebook.bell import Bell
from fal_notebook.hosts.ssh_certificates import SUFFIX
from fal_notebook.hosts.ssh_link import ChannelRefused
from fal_notebook.hosts.ssh_packets import WatchfulPacketizer
from fal_notebook.hosts.ssh_stream import FIRST_WINDOW, ChannelSocket, Stream

__all__ = ["LinkTransport"]

SPARE = 64 << 20  # bytes by which all streams together may widen their windows
MAX_PACKET = 1 << 15
LAST_KEX_MESSAGE = 49  # numbers from here on wait while keys change, and so does a service request
RSA_SIGNATURES = ("rsa-sha2-512", "rsa-sha2-256")
PROBE = b"keepalive@openssh.com"


class _Payload(NamedTuple):
    """A message in the one shape that a packetizer asks for."""

    content: bytes

    def asbytes(self) -> bytes:
        return self.content


class _Parcel(NamedTuple):
    payload: _Payload
    stream: Stream | None = None
    size: int = 0  # what its stream counts as queued
    last: bool = False  # the stream's CLOSE


class LinkTransport(paramiko.Transport):  # type: ignore[misc] # paramiko is untyped
    """One client connection; the module's docstring says what it does otherwise than its base.

    Attributes:
        heartbeat: seconds of silence before the server is asked for a sign of life; 0 (as long as the
            user is not yet authenticated): never.
        patience: seconds of silence after which the connection counts as dead.
    """

    _preferred_ciphers = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes192-ctr",
        "aes256-ctr",
    )
    _preferred_keys: tuple[str, ...]
    _channel_handler_table = {  # noqa: RUF012 - declared by the base class
        common.MSG_CHANNEL_SUCCESS: Stream.on_success,
        common.MSG_CHANNEL_FAILURE: Stream.on_failure,
        common.MSG_CHANNEL_DATA: Stream.on_data,
        common.MSG_CHANNEL_EXTENDED_DATA: Stream.on_extended_data,
        common.MSG_CHANNEL_WINDOW_ADJUST: Stream.on_window_adjust,
        common.MSG_CHANNEL_REQUEST: Stream.on_request,
        common.MSG_CHANNEL_EOF: Stream.on_eof,
        common.MSG_CHANNEL_CLOSE: Stream.on_close,
    }

    def __init__(
        self, sock: Any, *, known_key_types: tuple[str, ...] = (), certificates: bool = False
    ) -> None:
        """Take over a connected socket.

        Args:
            sock: a socket, or a `ChannelSocket` of another transport.
            known_key_types: host key types to ask for first, because they can be verified.
            certificates: ask for a certificate before any key, because there is an authority to trust.
        """
        super().__init__(sock, packetizer_class=WatchfulPacketizer)
        self.packetizer.on_idle = self._on_idle
        self.logger = logging.getLogger("fal_notebook.ssh")
        if not self.logger.handlers:
            self.logger.addHandler(logging.NullHandler())
        wanted = [a for t in known_key_types for a in (RSA_SIGNATURES if t == "ssh-rsa" else (t,))]
        usual = self._preferred_keys
        self._preferred_keys = tuple(
            [a for a in wanted if a in usual] + [a for a in usual if a not in wanted]
        )
        self._certificates = certificates
        self.heartbeat = 0.0
        self.patience = 15.0
        self._probe: _Parcel | None = None  # the sign of life that was asked for
        self._probe_asked_at = 0.0
        self._probe_sent_at = 0.0  # 0: it waits in the outbox
        self._ended = False
        self._closed_here = False
        self._said: str | None = None  # the server's parting words
        self._problem = ""  # why a write failed
        self._streams: dict[int, Stream] = {}
        self._spare, self._spare_lock = SPARE, threading.Lock()
        self._outbox: deque[_Parcel] = deque()
        self._bell = Bell()
        self._writer = threading.Thread(target=self._write, name="fal-ssh-writer", daemon=True)

    # -- what the link uses ---------------------------------------------------------------------------

    def open_stream(self, kind: str, details: bytes = b"", *, timeout: float) -> Stream:
        """Open a channel of `kind`; `details` is what its open message says beyond the common part.

        Raises:
            ChannelRefused: the server said no.
            TimeoutError: it said nothing within `timeout` seconds.
            OSError: the connection is gone.
        """
        with self.lock:
            number: int = self._next_channel()
            stream = Stream(self, number)
            self._streams[number] = stream  # the base holds its channels weakly
            self._channels.put(number, stream)
            self.channels_seen[number] = True
        if self._ended:
            stream._unlink()  # noqa: SLF001 - the base's name for it
        name = kind.encode("ascii")
        start = struct.pack("!BI", common.MSG_CHANNEL_OPEN, len(name)) + name
        self.post(start + struct.pack("!III", number, FIRST_WINDOW, MAX_PACKET) + details)
        try:
            stream.wait_until_open(timeout)
        except BaseException as error:  # an interrupt, too, must leave nothing open
            stream.close()
            if isinstance(error, ChannelRefused):
                self.forget(stream)
            raise
        return stream

    def open_tcp(self, host: str, port: int, *, timeout: float) -> ChannelSocket:
        """Open a TCP connection from the server onwards; errors as `open_stream`."""
        target, origin = host.encode(), b"127.0.0.1"
        details = struct.pack("!I", len(target)) + target + struct.pack("!I", port)
        details += struct.pack("!I", len(origin)) + origin + struct.pack("!I", 0)
        return self.open_stream("direct-tcpip", details, timeout=timeout).as_socket()

    def open_unix(self, path: str, *, timeout: float) -> Stream:
        """Open a connection to a Unix socket of the server; errors as `open_stream`."""
        target = path.encode()
        details = struct.pack("!I", len(target)) + target + struct.pack("!II", 0, 0)
        return self.open_stream("direct-streamlocal@openssh.com", details, timeout=timeout)

    def post(
        self, content: bytes, stream: Stream | None = None, *, size: int = 0, last: bool = False
    ) -> None:
        """Send a message, now or as soon as keys allow; never waits for a change of keys.

        Raises:
            OSError: the connection broke.
        """
        self._post(_Parcel(_Payload(content), stream, size, last))

    def forget(self, stream: Stream) -> None:
        """Let go of a stream that both sides have closed."""
        self._unlink_channel(stream.number)
        if self._streams.pop(stream.number, None) is not None:
            with self._spare_lock:
                self._spare += stream.window - FIRST_WINDOW

    def widen(self, size: int) -> int:
        """Say how many bytes of `size` a stream's window may grow by."""
        with self._spare_lock:
            given = min(size, self._spare)
            self._spare -= given
        return given

    @property
    def is_cut_off(self) -> bool:
        """Whether it has ended, and neither side said that it should."""
        return not self.is_active() and self._said is None and not self._closed_here

    def why_lost(self) -> str:
        """Say in a few words how the connection ended."""
        if self._said is not None:
            return f"the server ended the connection: {self._said}"
        if self._closed_here:
            return "the connection was closed here"
        reason = self._problem or str(self.saved_exception or "")
        return f"the connection broke: {reason}" if reason else "the connection broke"

    def close(self) -> None:
        """End the connection and every stream of it."""
        self._closed_here = self.active or self._closed_here
        super().close()
        self.sock.close()
        self._bell.ring()

    # -- the outbox -----------------------------------------------------------------------------------

    def _post(self, parcel: _Parcel) -> None:
        # An interrupt reaches the main thread only; in the middle of a packet it would break the
        # connection, so that thread leaves sending to the writer. So does the transport's own thread,
        # which must go on reading.
        here = threading.current_thread()
        if here is not self and here is not threading.main_thread() and self._send_at_once(parcel):
            return
        if parcel.stream is not None and parcel.size:
            parcel.stream.queued(parcel.size)
        self._outbox.append(parcel)
        self._bell.ring()

    def _send_at_once(self, parcel: _Parcel) -> bool:
        """Send without a change of threads, if nobody else is sending and nothing waits."""
        gate = self.clear_to_send_lock
        if self._outbox or not self.clear_to_send.is_set() or not gate.acquire(blocking=False):
            return False
        try:
            if self._outbox or not self.clear_to_send.is_set():
                return False
            self._transmit(parcel)
        except (EOFError, OSError, paramiko.SSHException) as error:
            self._give_up(error)
            raise ConnectionResetError(self.why_lost()) from error
        finally:
            gate.release()
        return True

    def _write(self) -> None:
        """Empty the outbox whenever keys allow (the writing thread)."""
        while not self._ended:
            self._bell.wait(1.0)
            while self._outbox and not self._ended:
                if self.clear_to_send.wait(0.5) and not self._write_one():
                    return

    def _write_one(self) -> bool:
        with self.clear_to_send_lock:
            if not self.clear_to_send.is_set():
                return True
            parcel = self._outbox.popleft()
            try:
                self._transmit(parcel)
            except (EOFError, OSError, paramiko.SSHException) as error:
                self._give_up(error)
                return False
        if parcel.stream is not None and parcel.size:
            parcel.stream.unqueued(parcel.size)
        return True

    def _give_up(self, error: Exception) -> None:
        """Close the socket after a failed write; the transport's thread notices, and tells every stream."""
        self._problem = self._problem or str(error)
        self.packetizer.close()

    def _transmit(self, parcel: _Parcel) -> None:
        """Send; the caller holds `clear_to_send_lock` and has seen `clear_to_send`."""
        stream = parcel.stream
        if stream is not None:
            if stream.close_sent:
                return
            stream.close_sent = parcel.last
        self.packetizer.send_message(parcel.payload)
        if parcel is self._probe:
            self._probe_sent_at = time.monotonic()

    # -- what the base class does otherwise -----------------------------------------------------------

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host key types; certificates only where they could be verified."""
        usual = tuple(self._filter_algorithm("keys"))
        return (*(f"{name}{SUFFIX}" for name in usual), *usual) if self._certificates else usual

    def start_client(self, event: Any = None, timeout: float | None = None) -> None:
        """Negotiate as the base does, with the writing thread at hand."""
        self._writer.start()
        super().start_client(event=event, timeout=timeout)

    def run(self) -> None:
        """Read until the connection ends (the transport's thread)."""
        try:
            super().run()
        finally:
            self._ended = True
            self._bell.ring()
            for stream in list(self._streams.values()):
                stream._unlink()  # noqa: SLF001 - the base's name for it

    def _log(self, _level: int, msg: Any, *args: Any) -> None:
        # What goes wrong is raised as an error of ours; the base's loud version would say it twice.
        super()._log(logging.DEBUG, msg, *args)

    def _send_message(self, data: Any) -> None:
        content: bytes = data.asbytes()
        if content[0] <= LAST_KEX_MESSAGE and content[0] != common.MSG_SERVICE_REQUEST:
            super()._send_message(data)
        else:
            self._post(_Parcel(_Payload(content)))

    def _send_user_message(self, data: Any) -> None:
        self._post(_Parcel(_Payload(data.asbytes())))

    def _send_kex_init(self) -> None:
        self.clear_to_send.clear()  # at once, so that the writer lets go of the lock the base asks for
        super()._send_kex_init()

    def _negotiate_keys(self, m: Any) -> None:
        self.clear_to_send.clear()
        super()._negotiate_keys(m)

    def _parse_newkeys(self, m: Any) -> None:
        super()._parse_newkeys(m)
        self._bell.ring()

    def _parse_disconnect(self, m: Any) -> None:
        m.get_int()
        self._said = m.get_text()

    def _parse_channel_open_success(self, m: Any) -> None:
        stream = self._streams.get(m.get_int())
        if stream is not None:
            stream.on_open(m.get_int(), m.get_int(), m.get_int())

    def _parse_channel_open_failure(self, m: Any) -> None:
        stream = self._streams.get(m.get_int())
        if stream is not None:
            stream.on_refusal(ChannelRefused(m.get_int(), m.get_text()))

    def _on_idle(self) -> None:
        """Ask a silent server for a sign of life, and give up on one that gives none."""
        now, packets = time.monotonic(), self.packetizer
        if not self.heartbeat or packets.received_at > self._probe_asked_at:
            self._probe = None
        if not self.heartbeat or now - packets.received_at < self.heartbeat:
            return
        if self._probe is None:
            content = struct.pack("!BI", common.MSG_GLOBAL_REQUEST, len(PROBE)) + PROBE + b"\x01"
            self._probe_asked_at, self._probe_sent_at = now, 0.0
            self._probe = _Parcel(_Payload(content))
            self._post(self._probe)
        else:
            since = self._probe_sent_at or max(packets.received_at, packets.sent_at)
            if now - since > self.patience - self.heartbeat:
                raise paramiko.SSHException(f"no sign of life for {now - packets.received_at:.0f} s")
