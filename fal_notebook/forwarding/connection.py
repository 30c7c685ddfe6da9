"""One client of a forwarded app, and its stream to the app.

Runs in the notebook. Two threads serve a connection, one for each direction, and each holds at most one
piece of it, and up to 1 MiB of a request: whoever reads slowly slows down whoever writes. A request that an
app's end has left without an answer is sent to its next runner, if the app allows that, or answered 502; a
client with nothing to ask is given back, and holds no stream.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Protocol

from fal_agent.errors import FalServerlessException
from fal_notebook.forwarding.exchanges import Ending, Exchanges, farewell, plain_answer
from fal_notebook.forwarding.peers import stranger
from fal_notebook.forwarding.sockets import (
    ONE_PIECE,
    break_off,
    end_input,
    shut,
    tune,
    wait_until_gone,
    was_unread,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.hosts.base import ByteStream

__all__ = ["Connection", "Target"]

PIECE = 128 << 10  # bytes read at once
LINGER = 30.0  # seconds that a client may be silent after the app has ended its side
UNANSWERED_LINGER = 2.0  # the same for a client that was told that the app cannot be reached
GLANCE = 5.0  # seconds between two looks at a silent client; one that has nothing to ask is given back
REQUEST_PATIENCE = 60.0  # seconds that a client may be silent in the middle of a request
ANSWER_PATIENCE = 300.0  # seconds that a client may read nothing of what is there for it
_BAD_GATEWAY, _UNAVAILABLE, _REQUEST_TIMEOUT, _FORBIDDEN = 502, 503, 408, 403
_NOT_YOURS = (
    "this app is for the account that spawned it, and the connection comes from another one of this machine "
    "(user id {uid}); app_auth='private', 'shared' or 'public' lets others in"
)
_RUNNER_BROKE = "the connection to the app's runner broke before it answered"

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, and for no time


class Target(Protocol):
    """What a port leads to."""

    def dial(self) -> ByteStream:
        """Give a new stream to the app, as soon as there is a runner.

        Raises:
            OSError or FalServerlessException: it cannot be reached.
        """

    @property
    def may_repeat(self) -> bool:
        """Whether a request may be sent again whose runner ended before it answered."""

    @property
    def own_user_only(self) -> bool:
        """Whether other accounts of this machine are refused; asked after `dial`."""

    @property
    def may_repeat_refused(self) -> bool:
        """Whether a request may be sent again that its runner answered 503."""

    def refused(self, stream: ByteStream, /) -> None:
        """Take note that the runner at the other end of a stream is to be replaced."""


class _Next(enum.Enum):
    """What becomes of a connection when the app's side has ended."""

    OVER = enum.auto()
    LINGERS = enum.auto()  # the client has been told all; what it still sends is read
    AGAIN = enum.auto()  # what it asked goes to another runner
    BACK = enum.auto()  # it may ask something else later


class Connection:
    """A client that has asked something.

    `thread` dials, then copies what the app sends and cleans up; a second one copies what the client sends.

    Args:
        client: its socket.
        begun: what it has said so far.
        target: where it is led.
        name: for the names of threads.
        ended: called at the end, with the socket if the client may ask more, and None if it is closed.
    """

    def __init__(
        self,
        client: socket.socket,
        begun: bytes,
        target: Target,
        name: str,
        ended: Callable[[Connection, socket.socket | None], None],
    ) -> None:
        self._client, self._begun, self._target, self._name, self._ended = client, begun, target, name, ended
        self.thread = threading.Thread(target=self._run, name=f"forward {name}: answers", daemon=True)
        self._exchanges = Exchanges()
        self._reader: threading.Thread | None = None
        self._stream: ByteStream | None = None  # guarded by `_switch`, like all that follows
        self._refused: ByteStream | None = None  # a stream that takes nothing any more
        self._is_untouched = False  # whether it took nothing of the present request either
        self._is_one_piece = False  # whether the present request was sent at once
        self._switch = threading.Condition()  # held while bytes of the client's are sent
        self._lock = threading.Lock()
        self._stopped = False
        self._goes_back = self._is_slow = False
        self._has_taken = False  # whether the client got something by `_take_now`
        self._seen = 0  # bytes at the front of what is read next that are taken note of
        self._is_reading = False  # whether more of the client's bytes may come
        self._read_all = threading.Event()  # set once no more will
        self._pieces = 0  # of the client's bytes

    def start(self) -> None:
        """Serve the client; returns at once."""
        try:
            self.thread.start()
        except RuntimeError as error:  # this process may have no more threads
            with contextlib.suppress(OSError):
                self._client.sendall(plain_answer(_UNAVAILABLE, str(error)))
            self._client.close()
            self._ended(self, None)

    def stop(self, *, reset: bool = False) -> None:
        """End both directions now, from any thread; `reset`: the client is to see that something broke."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            stream, is_reading = self._stream, self._is_reading
        if reset:
            with contextlib.suppress(OSError):  # the client has gone
                self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        # Ending only what comes in wakes the thread that reads, and says nothing to the client yet.
        shut(self._client, socket.SHUT_RD if reset and is_reading else socket.SHUT_RDWR)
        if stream is not None:
            break_off(stream)

    def let_go(self) -> None:
        """Close what a forked child has of it, and say nothing to either side."""
        for end in (self._client, self._stream):
            if isinstance(end, socket.socket):
                socket.socket.close(end)  # this very one: a subclass may end the parent's connection too

    # ------------------------------------------------------------ the app's side

    def _run(self) -> None:
        goes_back = False
        try:
            tune(self._client, receive_timeout=GLANCE, send_timeout=ANSWER_PATIENCE)
            goes_back = self._serve()
        finally:
            with self._lock:
                goes_back = goes_back and not self._stopped
                self._stopped = self._stopped or goes_back
            if not goes_back:
                self.stop()
                self._end_reader()
                self._client.close()
            self._close_stream()
            self._ended(self, self._client if goes_back else None)

    def _serve(self) -> bool:
        """Lead the client to the app; gives whether it may ask more later."""
        self._exchanges.ask(self._begun)
        first: bytes | None = self._begun
        while True:
            stream = self._reach()
            if stream is None or not self._send_first(stream, first) or not self._have_reader():
                return False
            following = self._copy_answers(stream)
            if following is _Next.LINGERS:
                self._await_client()
            if following in (_Next.OVER, _Next.LINGERS):
                return False
            first = None
            if following is _Next.BACK:
                self._end_reader()
                if not self._begun:
                    return True
                first, self._goes_back = self._begun, False  # it has asked in the meantime
                self._close_stream()

    def _reach(self) -> ByteStream | None:
        """Dial; None if the connection is over."""
        try:
            stream = self._target.dial()
        except Exception as error:
            self._say(_UNAVAILABLE, str(error) or type(error).__name__)
            self._drain()
            if isinstance(error, (OSError, FalServerlessException)):
                return None
            raise
        uid = stranger(self._client) if self._target.own_user_only else None
        if uid is not None:
            stream.close()
            self._say(_FORBIDDEN, _NOT_YOURS.format(uid=uid))
            self._drain()
            return None
        return stream

    def _send_first(self, stream: ByteStream, first: bytes | None) -> bool:
        """Send what was asked so far; False if the connection is over."""
        with self._switch:
            with self._lock:
                self._stream = stream
                if self._stopped:
                    return False
            asked = self._exchanges.kept if first is None else first
            self._is_untouched, self._is_one_piece = False, len(asked) <= ONE_PIECE
            try:
                stream.sendall(asked)
            except OSError:  # as what it says, or does not, will show
                self._refused, self._is_untouched = stream, self._is_one_piece
            self._switch.notify_all()
        return True

    def _have_reader(self) -> bool:
        """Read what the client sends from now on; False if that is impossible."""
        if self._reader is not None:
            return True
        reader = threading.Thread(
            target=self._copy_requests, name=f"forward {self._name}: requests", daemon=True
        )
        self._is_reading = True
        self._begun = b""
        try:
            reader.start()
        except RuntimeError as error:  # this process may have no more threads
            self._is_reading = False
            self._say(_UNAVAILABLE, str(error))
            self._drain()
            return False
        self._reader = reader
        return True

    def _end_reader(self) -> None:
        """Wait for the thread that reads, which has been told to end, or will look within `GLANCE`."""
        with self._switch:
            self._switch.notify_all()
        if self._reader is not None:
            self._reader.join()
            self._reader = None

    def _copy_answers(self, stream: ByteStream) -> _Next:
        """Copy until the app ends its side."""
        has_answered = False
        pour = getattr(stream, "pour", None)
        if pour is not None:
            pour(self._take_now)
        while True:
            problem: OSError | None = None
            try:
                data = stream.recv(PIECE)
            except OSError as error:
                data, problem = b"", error
            has_answered = has_answered or self._has_taken
            if not data:
                return self._app_ended(stream, problem, has_answered=has_answered)
            seen, self._seen = self._seen, 0
            if not seen and self._is_withheld(data) and self._exchanges.again():
                self._target.refused(stream)
                break_off(stream)  # or whoever sends to it might hold what comes next
                with self._switch:
                    self._close_stream()
                return _Next.AGAIN
            if seen < len(data):
                self._exchanges.answer(data[seen:])
            try:
                self._client.sendall(data)
            except OSError:  # the client has gone, or has read nothing for too long
                self.stop(reset=True)
                return _Next.OVER
            has_answered = True

    def _is_withheld(self, data: bytes) -> bool:
        """Whether an answer begins that the client need not see: 503, to a request that can go elsewhere."""
        can_go = self._target.may_repeat_refused and not self._read_all.is_set()
        return can_go and self._exchanges.is_refusal(data)

    def _take_now(self, data: bytes) -> int:
        """Pass on what the client's socket has room for: a change of threads less for most answers."""
        if self._is_withheld(data):
            return 0
        self._exchanges.answer(data)
        try:
            taken = self._client.send(data, socket.MSG_DONTWAIT)
        except OSError:  # it has no room; or the client has gone, as the thread that copies will find
            taken = 0
        self._has_taken = self._has_taken or taken > 0
        self._seen = len(data) - taken
        return taken

    def _app_ended(self, stream: ByteStream, problem: OSError | None, *, has_answered: bool) -> _Next:
        if self._stopped:
            return _Next.OVER
        is_broken = problem is not None
        ending = self._exchanges.ending(is_broken=is_broken)
        if ending in (Ending.IDLE, Ending.UNANSWERED):
            break_off(stream)  # or whoever sends to it might hold what comes next
            with self._switch:
                ending = self._exchanges.ending(is_broken=is_broken)
                if ending is Ending.IDLE and not self._read_all.is_set():
                    self._goes_back = True
                    return _Next.BACK
                if ending is Ending.UNANSWERED and not self._is_slow and self._may_repeat(stream, problem):
                    self._close_stream()
                    return _Next.AGAIN
        return self._tell_end(ending, problem, has_answered=has_answered)

    def _may_repeat(self, stream: ByteStream, problem: OSError | None) -> bool:
        """Whether to ask another runner: not if it is the link that broke, for then the runner goes on."""
        has_runner_ended = problem is None or isinstance(stream, socket.socket)
        is_whole = not self._read_all.is_set()  # a client that has ended its side cannot do it again
        is_untouched = self._is_untouched or (self._is_one_piece and was_unread(stream, problem))
        may_repeat = is_untouched or self._target.may_repeat
        return has_runner_ended and is_whole and may_repeat and self._exchanges.again()

    def _tell_end(self, ending: Ending, problem: OSError | None, *, has_answered: bool) -> _Next:
        """Tell the client how it ended."""
        if ending is Ending.UNANSWERED and self._is_slow:
            self._say(_REQUEST_TIMEOUT, f"the rest of the request did not come in {REQUEST_PATIENCE:g} s")
        elif ending is Ending.UNANSWERED or (ending is Ending.UNKNOWN and problem and not has_answered):
            because = f": {problem}" if problem is not None and str(problem) else ""
            self._say(_BAD_GATEWAY, _RUNNER_BROKE + because)
        elif ending is Ending.SESSION_CUT:
            with contextlib.suppress(OSError):
                self._client.sendall(farewell("the connection to the app's runner broke; connect again"))
            shut(self._client, socket.SHUT_WR)
        elif ending is Ending.CUT or problem is not None:
            self.stop(reset=True)  # half an answer must not look like a whole one
            return _Next.OVER
        else:
            try:
                self._client.shutdown(socket.SHUT_WR)
            except OSError:  # the client has gone
                return _Next.OVER
        return _Next.LINGERS

    # ------------------------------------------------------------ the client's side

    def _copy_requests(self) -> None:
        try:
            stream = self._read_requests()
        except OSError:  # the client has gone
            self.stop()
            return
        finally:
            if not self._goes_back:
                self._read_all.set()
        if stream is None:
            return
        with self._lock:
            self._is_reading = False
            if self._stopped:
                return
        # Whoever stops the connection, and a client that goes away altogether, end the wait.
        end_input(stream)
        wait_until_gone(self._client)
        self.stop()

    def _read_requests(self) -> ByteStream | None:
        """Read until the client ends its side; gives the stream then, and None if it is not to be told."""
        while True:
            data = self._next_piece()
            if data is None:
                return None
            with self._switch:
                self._switch.wait_for(lambda: self._stream is not None or self._stopped)
                stream = self._stream
                if stream is None or self._stopped:
                    return None
                if not data:
                    return stream
                self._pieces += 1
                self._exchanges.ask(data)
                self._is_one_piece = len(data) <= ONE_PIECE and self._exchanges.kept_size == len(data)
                if self._goes_back:
                    self._begun = data
                    return None
                if stream is not self._refused:
                    try:
                        stream.sendall(data)
                    except OSError:
                        # The app has answered without reading it all, or has gone. The rest is read and
                        # dropped: closing a socket that holds unread bytes would take the answer from the
                        # client.
                        self._refused = stream
                        self._is_untouched = self._is_one_piece

    def _next_piece(self) -> bytes | None:
        """Wait for the client; None if it is waited for no longer."""
        silence = 0.0
        while True:
            try:
                return self._client.recv(PIECE)
            except BlockingIOError:  # nothing came for as long as a glance takes
                silence += GLANCE
            with self._switch:
                if self._goes_back:
                    return None
                stream = self._stream
                self._goes_back = self._exchanges.is_idle
                self._is_slow = self._exchanges.awaits_request and silence >= REQUEST_PATIENCE
                if (self._goes_back or self._is_slow) and stream is not None:
                    break_off(stream)
                    return None

    def _await_client(self) -> None:
        """The app has ended its side: wait while the client sends, and let it end its own."""
        pieces = -1
        while pieces != self._pieces:
            pieces = self._pieces
            if self._read_all.wait(LINGER):
                return

    def _say(self, status: int, detail: str) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            self._client.sendall(plain_answer(status, detail))
            self._client.shutdown(socket.SHUT_WR)

    def _drain(self) -> None:
        """Read and drop the request of a client that has been answered, so that the answer arrives."""
        deadline = time.monotonic() + LINGER
        self._client.settimeout(UNANSWERED_LINGER)
        with contextlib.suppress(OSError):  # it is silent, or gone
            while self._client.recv(PIECE) and time.monotonic() < deadline:
                pass

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
