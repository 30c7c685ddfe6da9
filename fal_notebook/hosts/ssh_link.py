"""The link to a machine over SSH: dial its Unix sockets, run commands, put files there.

Runs in the notebook; standard library only. What carries it is somebody else's matter: paramiko
(`paramiko_link`) or the OpenSSH program (`openssh_link`), behind the same few methods.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import threading
import time
from typing import TYPE_CHECKING, Protocol

from fal_agent.errors import HostError, LinkLostError
from fal_notebook.hosts.base import CompletedCommand
from fal_notebook.hosts.remote_shell import (
    LINGER,
    MAX_OUTPUT,
    after,
    feed,
    read_all,
    read_past,
    shell_line,
    shortened,
    upload_script,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_agent.framing import Buffer
    from fal_notebook.hosts.base import ByteStream
    from fal_notebook.hosts.remote_shell import Session

__all__ = ["Carrier", "ChannelRefused", "SSHLink"]

OPEN_TIMEOUT = 30.0  # seconds for the server to open a channel or start a shell
SLOWEST_UPLOAD = 20_000  # bytes per second
PROHIBITED = 1
_FULL_QUEUE_PAUSES = (0.02, 0.1)  # seconds
_FREEING_SECONDS = 2.0  # after a session's end in which the server may still count it


class ChannelRefused(Exception):  # noqa: N818 - an answer; the link makes an error of it
    """The server would not open a channel.

    Attributes:
        reason: the server's number: 1 prohibited, 2 connect failed, 3 unknown kind, 4 short of resources.
        text: the server's words.
    """

    def __init__(self, reason: int, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


class Carrier(Protocol):
    """An authenticated SSH connection. What it opens raises ChannelRefused, TimeoutError or OSError."""

    @property
    def name(self) -> str:
        """The machine, as the user typed it."""

    @property
    def label(self) -> str:
        """How messages call the machine."""

    def is_active(self) -> bool:
        """Whether it stands, as far as is known."""

    def open_session(self, command: str, *, timeout: float) -> Session:
        """Run a line in the user's login shell."""

    def open_unix(self, path: str, *, timeout: float) -> ByteStream:
        """Connect to a Unix socket of the machine."""

    def why_lost(self) -> str:
        """Say in a few words how it ended."""

    def close(self) -> None:
        """End it and everything opened through it."""


class SSHLink:
    """An SSH connection; every method may be called from any thread.

    Attributes:
        name: the machine as the user typed it.
        dial_command: a shell command that joins its standard input and output to a Unix socket and fails
            if it cannot; for servers that forbid forwarding to sockets. "{socket}" in it stands for the
            socket's path.
    """

    def __init__(self, carrier: Carrier) -> None:
        """Take over a connection."""
        self.name = carrier.name
        self.dial_command: str | None = None
        self._label = carrier.label
        self._carrier = carrier
        self._by_command = False  # the server forbids forwarding to sockets
        self._by_channel = False  # it is known to allow it
        self._prompt_replies = False
        self._sessions = 0  # open now
        self._sessions_ended = 0  # since the beginning
        self._ended_at = 0.0  # when the last one did
        self._asking = 0  # for a session, now
        self._session_lock = threading.Lock()  # held by itself: see `ssh_stream`
        self._session_changed = threading.Condition(self._session_lock)

    def __enter__(self) -> SSHLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether the connection stands, as far as is known."""
        return bool(self._carrier.is_active())

    @property
    def forwarding_is_forbidden(self) -> bool:
        """Whether a command has to join sockets because the server forbids it; known once one was dialled."""
        return self._by_command

    def dial(self, socket_path: str) -> ByteStream:
        """Connect to a Unix socket of the machine, by its absolute path.

        Raises:
            LinkLostError: the connection broke.
            ConnectionRefusedError: nothing listens there. Where only `dial_command` works, the stream's
                `recv` may be what raises it.
            HostError: the server forbids it, and there is no `dial_command`.
        """
        if not self._prompt_replies:
            self.run(":")  # a server sends small packets without delay only once it has run something
        if self._by_command:
            return self._dial_by_command(socket_path)
        with self._lost_is_said():
            try:
                stream = self._carrier.open_unix(socket_path, timeout=OPEN_TIMEOUT)
            except ChannelRefused as refusal:
                answer = refusal
            else:
                self._by_channel = True
                return stream
        if self._by_channel and (again := self._open_again(socket_path)) is not None:
            return again
        if self.dial_command is None or self._by_channel:
            if answer.reason == PROHIBITED:
                raise HostError(f"{self._label}: the server forbids connections to sockets ({answer.text})")
            raise ConnectionRefusedError(f"{self._label}: nothing listens at {socket_path}")
        # OpenSSH gives one answer to "forbidden" and to "nobody listens": ask on the machine itself.
        if self.run(self._dial_script(socket_path), timeout=OPEN_TIMEOUT).status != 0:
            raise ConnectionRefusedError(f"{self._label}: nothing listens at {socket_path}")
        with self._lost_is_said():
            try:
                return self._carrier.open_unix(socket_path, timeout=OPEN_TIMEOUT)
            except ChannelRefused:
                self._by_command = True
        return self._dial_by_command(socket_path)

    def run(self, command: str, *, stdin: Buffer = b"", timeout: float = 60.0) -> CompletedCommand:
        """Run a POSIX shell script on the machine, whatever the user's login shell is.

        Args:
            command: the script, at most some 20 kB.
            stdin: what it reads.
            timeout: seconds it may take; it is hung up on then, and may go on running.

        Raises:
            LinkLostError: the connection broke.
            HostError: it did not end in time, printed more than 64 MB, or no shell could be had.
        """
        deadline = time.monotonic() + timeout
        token = secrets.token_hex(8)
        with self._lost_is_said(), self._session(shell_line(command, token), deadline) as stream:
            feeder = threading.Thread(target=feed, args=(stream, stdin), name="fal-ssh-stdin", daemon=True)
            feeder.start()
            try:
                output = read_all(stream, deadline)
            except TimeoutError:
                raise HostError(
                    f"{self._label}: a command did not end within {timeout:g} s: {shortened(command)}. "
                    "The machine may be overloaded; try again"
                ) from None
            except OverflowError:
                raise HostError(
                    f"{self._label}: a command printed more than {MAX_OUTPUT >> 20} MB: {shortened(command)}"
                ) from None
            stream.wait_until_gone(LINGER)
            status, errors = stream.exit_status, stream.standard_error
        self._prompt_replies = True
        mark = token.encode()
        found, stdout = after(mark, output)
        if not found:
            said = (output + b"\n" + errors).decode("utf-8", "replace").strip()[-500:]
            raise HostError(
                f"{self._label}: the user's login shell there runs no commands; it said: "
                f"{said or 'nothing'}. Ask the machine's administrator for a shell"
            )
        return CompletedCommand(-1 if status is None else status, stdout, after(mark, errors)[1])

    def upload(self, path: str, data: Buffer, *, mode: int = 0o600) -> None:
        """Put a file on the machine; it appears whole or not at all. Parent folders are made (0700).

        Args:
            path: absolute, or beginning with "~/".
            data: the whole of it.
            mode: its permissions.

        Raises:
            LinkLostError: the connection broke; nothing has appeared.
            HostError: it could not be written.
        """
        place = '"$HOME"/' + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)
        size = memoryview(data).nbytes
        script = upload_script(place, secrets.token_hex(4), size, mode)
        done = self.run(script, stdin=data, timeout=60.0 + size / SLOWEST_UPLOAD)
        if done.status != 0:
            said = done.stderr.decode("utf-8", "replace").strip()[-500:]
            raise HostError(f"{self._label}: {path} could not be written there: {said or 'no reason given'}")

    def close(self) -> None:
        """Close the connection and everything dialled through it."""
        self._carrier.close()

    # -- inside ---------------------------------------------------------------------------------------

    def _open_again(self, socket_path: str) -> ByteStream | None:
        """Try again: a listener whose queue is full refuses for a moment; None if it goes on refusing."""
        for pause in _FULL_QUEUE_PAUSES:
            time.sleep(pause)
            with self._lost_is_said(), contextlib.suppress(ChannelRefused):
                return self._carrier.open_unix(socket_path, timeout=OPEN_TIMEOUT)
        return None

    def _dial_script(self, socket_path: str) -> str:
        return (self.dial_command or "").replace("{socket}", shlex.quote(socket_path))

    def _dial_by_command(self, socket_path: str) -> ByteStream:
        token = secrets.token_hex(8)
        deadline = time.monotonic() + OPEN_TIMEOUT
        with self._lost_is_said():
            stream = self._open_session(shell_line(self._dial_script(socket_path), token), deadline)
            try:
                rest = read_past(stream, token.encode(), deadline)
            except TimeoutError as error:
                self._close_session(stream)
                raise HostError(f"{self._label}: no shell started within {OPEN_TIMEOUT:g} s") from error
            except BaseException:
                self._close_session(stream)
                raise
        return _CommandStream(self, stream, rest)

    @contextlib.contextmanager
    def _session(self, line: str, deadline: float) -> Iterator[Session]:
        stream = self._open_session(line, deadline)
        try:
            yield stream
        finally:
            self._close_session(stream)

    def _open_session(self, line: str, deadline: float) -> Session:
        """Run a line in a session; waits for another to end if the server allows no more of them at once."""
        while True:
            ended = self._sessions_ended
            stream = self._try_session(line)
            if stream is not None:
                return stream
            with self._session_lock:
                while self._sessions_ended == ended and (self._sessions or self._asking):
                    if not self._session_changed.wait(deadline - time.monotonic()):
                        break
                if time.monotonic() - self._ended_at < _FREEING_SECONDS and time.monotonic() < deadline:
                    self._session_changed.wait(0.02)
                elif self._sessions_ended == ended:
                    raise HostError(
                        f"{self._label}: the server opens no further session ({self._sessions} are open). "
                        "Ask for a higher MaxSessions there, or for a user that may run commands"
                    )

    def _try_session(self, line: str) -> Session | None:
        stream = None
        with self._session_lock:
            self._asking += 1
        try:
            stream = self._carrier.open_session(line, timeout=OPEN_TIMEOUT)
        except ChannelRefused:
            return None
        finally:
            with self._session_lock:
                self._asking -= 1
                self._sessions += stream is not None
                self._session_changed.notify_all()
        return stream

    def _close_session(self, stream: Session) -> None:
        stream.close()
        with self._session_lock:
            self._sessions -= 1
            self._sessions_ended += 1
            self._ended_at = time.monotonic()
            self._session_changed.notify_all()

    @contextlib.contextmanager
    def _lost_is_said(self) -> Iterator[None]:
        """Raise what a broken connection does to streams as what it is."""
        try:
            yield
        except ConnectionRefusedError:
            raise
        except TimeoutError as error:
            raise HostError(f"{self._label}: {error}. The machine may be overloaded; try again") from error
        except OSError as error:
            self.close()
            raise LinkLostError(
                f"{self._label}: {self._carrier.why_lost()}. Connect again; what was started there goes on"
            ) from error


class _CommandStream:
    """A stream through a command that joins itself to a socket."""

    def __init__(self, link: SSHLink, stream: Session, rest: bytes) -> None:
        self._link, self._stream, self._rest = link, stream, rest
        self._heard = False
        self._closed = False

    def sendall(self, data: Buffer, /) -> None:
        self._stream.sendall(data)

    def recv(self, size: int, /) -> bytes:
        if self._rest:
            data, self._rest = self._rest[:size], self._rest[size:]
        else:
            data = self._stream.recv(size)
        if not data and not self._heard:
            self._stream.wait_until_gone(LINGER)
            if self._stream.exit_status not in (0, None):
                said = self._stream.standard_error.decode("utf-8", "replace").strip()[-300:]
                raise ConnectionRefusedError(said)
        self._heard = True
        return data

    def end_input(self) -> None:
        self._stream.end_input()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._link._close_session(self._stream)  # noqa: SLF001 - one module, one thing
