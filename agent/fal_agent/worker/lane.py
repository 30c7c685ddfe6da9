"""A worker's end of a lane: brief calls straight from one notebook, and their outcomes straight back.

Runs in a worker, which serves a lane on its main thread and nothing else meanwhile. Each call is
written into the lane's spool before it begins, and its outcome before that is sent, so the agent
learns of it whatever happens. A call that takes longer than `BRIEF`, says something before it ends, or
gives more than a frame holds is moved: it goes on as if the agent had sent it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, cast

from fal_agent.errors import ProtocolError
from fal_agent.framing import Buffer, FrameDecoder, encode_frame
from fal_agent.wire import (
    Adopt,
    Begun,
    Execute,
    Failure,
    Lent,
    Moved,
    Result,
    Returned,
    decode,
    encode,
    header,
    lasting,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fal_agent.wire import Lend, Message

__all__ = ["BRIEF", "Lane", "Passage"]

BRIEF = 0.02  # seconds after which, or after twice as long, a call is moved to the agent
_READ_SIZE = 512 << 10


class Lane:
    """One lane, from the moment its socket can be dialled until it is returned.

    Args:
        lend: the agent's request.
        tell: sends a message to the agent.

    Raises:
        OSError: the socket or the spool cannot be made use of.
    """

    def __init__(self, lend: Lend, tell: Callable[..., None]) -> None:
        self.lane, self._tell = lend.lane, tell
        self._path = lend.path
        self._stream: Optional[socket.socket] = None
        self._ended, self._joining, self._recalled = threading.Event(), threading.Lock(), False
        self._passage: Optional[Passage] = None
        self._spool_works = True
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._spool = os.open(lend.spool, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._listener.bind(self._path)  # in a folder that is the user's alone
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            raise

    def accept(self, take: Callable[[Lane], None]) -> None:
        """Wait for the notebook in a thread; `take` gets the lane when it is to be served, or returned."""

        def wait() -> None:
            stream, _ = self._listener.accept()
            self._listener.close()
            Path(self._path).unlink()
            with self._joining:
                self._stream = stream
                if self._recalled:
                    stream.shutdown(socket.SHUT_RD)
                else:
                    self._tell(Lent(self.lane))
            threading.Thread(target=self._watch, name="fal-lane-watch", daemon=True).start()
            take(self)

        threading.Thread(target=wait, name="fal-lane", daemon=True).start()

    @property
    def is_lent(self) -> bool:
        """Whether the notebook has dialled."""
        return self._stream is not None

    def recall(self) -> None:
        """Let the present call be the last; one that is going on is moved."""
        with self._joining:
            self._recalled, stream = True, self._stream
        if stream is None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as nobody:
                nobody.connect(self._path)  # ends the waiting, unless the notebook did at this moment
            return
        with contextlib.suppress(OSError):  # not connected any more
            stream.shutdown(socket.SHUT_RD)
        passage = self._passage
        if passage is not None:
            passage.move()

    def requests(self) -> Iterator[tuple[Execute, list[bytes]]]:
        """Give the calls as they come, until the notebook hangs up or the lane is recalled.

        Raises:
            ProtocolError: what came is not a call.
        """
        decoder = FrameDecoder()
        while self._stream is not None and self._spool_works:
            try:
                data = self._stream.recv(_READ_SIZE)
            except OSError:  # the notebook was killed
                return
            if not data:
                return
            for frame in decoder.feed(data):
                request = decode(frame)
                if type(request) is not Execute:
                    raise ProtocolError(f"a lane carries calls, not {type(request).__name__}")
                yield request, frame.buffers

    def begin(self, request: Execute) -> Passage:
        """Write a call down; give what sends its events."""
        passage = self._passage = Passage(self, request)
        if not self.record(encode(Begun(request.run_id, request.template, time.time()))):
            passage.move()
        return passage

    def close(self) -> None:
        """Give the worker back to the agent."""
        self._ended.set()
        if self._stream is not None:
            self._stream.close()
        os.close(self._spool)
        self._tell(Returned(self.lane))

    def close_in_child(self) -> None:
        """In a forked child: let go of what belongs to the parent."""
        for end in (self._listener, self._stream):
            if end is not None:
                end.close()

    # ------------------------------------------------------------ the passages' side

    def record(self, frame: bytes) -> bool:
        """Write a frame into the spool; False if the disk does not take it: the lane ends then."""
        try:
            self._spool_works = os.write(self._spool, frame) == len(frame)
        except OSError:
            self._spool_works = False
        return self._spool_works

    def say(self, frame: bytes) -> None:
        """Send a frame to the notebook; one that has gone finds it in the journal."""
        assert self._stream is not None
        with contextlib.suppress(OSError):
            self._stream.sendall(frame)

    def tell(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message to the agent."""
        self._tell(message, buffers)

    def _watch(self) -> None:
        """Move calls that turn out not to be brief; runs in a thread."""
        before: Optional[Passage] = None
        while not self._ended.wait(BRIEF):
            passage = self._passage
            if passage is not None and passage is before:
                passage.move()
            before = passage


class Passage:
    """How one call's events leave: through the lane if the only one is its outcome, else by the agent."""

    __slots__ = ("_is_moved", "_is_over", "_lane", "_lock", "_request")

    def __init__(self, lane: Lane, request: Execute) -> None:
        self._lane, self._request = lane, request
        self._lock = threading.Lock()
        self._is_moved = self._is_over = False

    def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send one of the call's events."""
        if not (self._fits(message) and self._reply(message, buffers)):
            self.move()
            self._lane.tell(message, buffers)

    def move(self) -> None:
        """Give the call to the agent, unless it has ended."""
        with self._lock:
            if self._is_moved or self._is_over:
                return
            self._is_moved = True
            run_id = self._request.run_id
            self._lane.tell(Adopt(run_id, self._lane.lane, self._request.template))
            self._lane.say(encode(Moved(run_id)))

    def _fits(self, message: Message) -> bool:
        kind: Any = type(message)
        if kind is not Result and (kind is not Failure or cast("Failure", message).kind == "agent"):
            return False  # the agent must hear of a function that was let go
        if getattr(message, "private", False):
            return False  # the spool is on the disk
        return all(type(ref) is int for ref in cast("Result", message).data)

    def _reply(self, message: Message, buffers: Sequence[Buffer]) -> bool:
        with self._lock:
            if self._is_moved:
                return False
            content = header(message)
            content["seq"] = 1
            frame = encode_frame(content, buffers)
            kept = lasting(content, buffers)
            if not self._lane.record(frame if kept[0] is content else encode_frame(*kept)):
                return False
            self._is_over = True
            self._lane.say(frame)
            return True
