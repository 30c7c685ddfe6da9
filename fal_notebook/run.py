"""A run: the notebook's handle on one call, a `concurrent.futures.Future` that can also be awaited.

Runs in the notebook. A run in the foreground gathers its events until the main thread draws them
(`follow`); one in the background hands them to a callback as they come. Values are unpickled by
whoever asks for them, never by the connection's thread.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, cast

from fal_agent import pickling
from fal_agent.wire import Failure, Item, Log, Prompt, Result
from fal_notebook.display import Drawer
from fal_notebook.hosts.base import Execution, Host, Parcel, Received, ShowsRuns, TellsSeen
from fal_notebook.prompting import read_line
from fal_notebook.rebuild import exception_from, reraise

if TYPE_CHECKING:
    import types

__all__ = [
    "Draw",
    "Items",
    "Run",
    "draw_connection",
    "draw_or_ask",
    "follow",
    "load_result",
    "start",
]

_WAKE_SECONDS = 0.5  # between two looks at whether the kernel was interrupted
_ASKED = {False: "input()", True: "getpass()"}
_REPLAY_SECONDS = 0.3
_NO_STDIN = "StdinNotImplementedError"
_PATIENCE = 2  # KeyboardInterrupts after which `follow` no longer waits for the host

Decode = Callable[[Received], Any]
Draw = Callable[[Received], None]


class Run(Future[Any]):
    """A call in flight, or ended.

    Attributes:
        run_id: 16 hex digits, the same on the host.
        host: where it runs.
        label: the function's name, or the first line of the cell.
    """

    def __init__(self, host: Host, label: str, decode: Decode, on_event: Draw | None) -> None:
        super().__init__()
        self.run_id = os.urandom(8).hex()
        self.host, self.label = host, label
        self._inbox = _Inbox()
        self._decode, self._on_event = decode, on_event
        self._execution: Execution | None = None
        self._beginning = threading.Lock()
        self._early: list[Received] = []  # events to acknowledge once there is an execution
        self._early_replies: list[tuple[int, str, str]] = []
        self._opening = threading.RLock()
        self._cancelling = threading.RLock()
        self._opened: tuple[Any, BaseException | None] | None = None
        self._is_attached = False
        self._traceback: types.TracebackType | None = None  # of the error, before it was raised here

    # ------------------------------------------------------------ a future

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the value.

        Args:
            timeout: seconds to wait; None waits for ever.

        Raises:
            TimeoutError: it is not there yet.
            BaseException: what the call raised, with its own type; or one of `fal.exceptions`.
        """
        __tracebackhide__ = True
        return self._value(super().result(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the error that the call ended with; None when it ended well."""
        return self._open(super().result(timeout))[1]

    def cancel(self) -> bool:
        """Take the call out of the queue, or stop it; False if it has ended already."""
        with self._cancelling:
            if self.cancelled():
                return True
            if not super().cancel():
                return False
            self.set_running_or_notify_cancel()  # or `concurrent.futures.wait` would not see it
        if self._execution is not None:
            self._execution.cancel()
        return True

    def __await__(self) -> Generator[Any, None, Any]:
        return _awaited(self).__await__()

    # ------------------------------------------------------------ control

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in this call alone; its worker and what is cached there stay."""
        if self._execution is not None:
            self._execution.interrupt()

    def kill(self) -> None:
        """End the worker that runs the call; what is cached there is lost."""
        if self._execution is not None:
            self._execution.kill()

    def seen(self) -> bool:
        """Tell the host that the outcome was shown; False if that was not the run's own, and it may go on."""
        if not self.done() or self.cancelled():
            return self.cancelled()
        event = super().result(0).event
        if isinstance(event, Failure) and event.kind == "link":
            return False
        if isinstance(self._execution, TellsSeen):
            self._execution.seen()
        return True

    def acknowledge(self, received: Received) -> None:
        """Say that an event was dealt with, so that the worker may produce more."""
        if self._execution is None:
            with self._beginning:
                if self._execution is None:  # the event was quicker than `Host.submit` returned
                    self._early.append(received)
                    return
        self._execution.acknowledge(received)

    def reply(self, prompt: Prompt, text: str, error: str = "") -> None:
        """Answer a prompt; see `fal_notebook.hosts.base.Execution.reply`."""
        with self._beginning:
            if self._execution is None:  # the prompt was quicker than `Host.submit` returned
                self._early_replies.append((prompt.number, text, error))
                return
        self._execution.reply(prompt.number, text, error)

    def __repr__(self) -> str:
        if self.cancelled():
            state = "cancelled"
        elif not self.done():
            state = "running"
        else:
            received = super().result(0)
            state = "failed" if isinstance(received.event, Failure) else "done"
        return f"<Run {self.run_id} of {self.label} on {self.host.name}: {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} belongs to this process; send its .result() instead")

    # ------------------------------------------------------------ the host's side

    def begin(self, parcel: Parcel, *, attended: bool = False) -> None:
        """Send the call; `attended` says that this thread will wait for it."""
        self._belong_to(self.host.submit(parcel, self._take, run_id=self.run_id, attended=attended))

    @classmethod
    def attached(
        cls, host: ShowsRuns, run_id: str, *, label: str, decode: Decode, on_event: Draw | None
    ) -> Run:
        """Give a handle on a run that was started before; its events come from the first on."""
        run = cls(cast("Host", host), label, decode, on_event)
        run.run_id, run._is_attached = run_id, True
        run._belong_to(host.attach(run_id, run._take))
        return run

    def _belong_to(self, execution: Execution) -> None:
        with self._beginning:
            for received in self._early:
                execution.acknowledge(received)
            self._early.clear()
            self._execution = execution
        for reply in self._early_replies:
            execution.reply(*reply)

    def _take(self, received: Received) -> None:
        """Take an event; called in order by a thread of the host's."""
        event = received.event
        if isinstance(event, (Result, Failure)):
            self._inbox.put(received)
            if self._on_event is not None:  # in the foreground `follow` does it: this thread is to be quick
                self._on_event(received)
                self._settle(received)
        elif isinstance(event, Item):
            self._inbox.put(received)
            if self._on_event is not None:
                self._settle(received)  # the value is the iterator, and that is there
        elif self._on_event is None:
            self._inbox.put(received)
        else:
            self._on_event(received)
            if isinstance(event, Prompt):
                self._refuse(event)
            self.acknowledge(received)

    def _refuse(self, prompt: Prompt) -> None:
        """Say that a run in the background has nobody to ask, unless another notebook started it."""
        if not self._is_attached:
            # The message of a kernel whose front end takes no input, and what to do about it.
            text = f"{_ASKED[prompt.password]} was called, but a run in the background has nobody to ask"
            threading.Thread(target=self.reply, args=(prompt, text, _NO_STDIN), daemon=True).start()

    def receive(self) -> Received:
        """Wait for the next event; it stays the next one until it is `dealt_with`."""
        if self._execution is not None:
            received = self._execution.receive()
            if received is not None:
                return received
        return self._inbox.first()

    def dealt_with(self, received: Received) -> None:
        """Go on to the event after this one."""
        self._inbox.remove(received)

    def is_answered(self) -> bool:
        """Whether the prompt that was received had its answer before this notebook showed the run."""
        if not self._is_attached:
            return False
        time.sleep(_REPLAY_SECONDS)  # what came after it comes at once
        return self._inbox.size > 1

    def settle(self, received: Received) -> Any:
        """Take the last event of a foreground run; give its value, or raise its error."""
        __tracebackhide__ = True
        self._settle(received)
        return self._value(received)

    def _value(self, received: Received) -> Any:
        __tracebackhide__ = True
        value, error = self._open(received)
        if error is not None:
            reraise(error, self._traceback)
        return value

    def _settle(self, received: Received) -> None:
        if not self.done():
            try:
                self.set_result(received)
            except InvalidStateError:  # cancelled in this very moment
                return

    def _open(self, received: Received) -> tuple[Any, BaseException | None]:
        """Unpickle the outcome, once."""
        with self._opening:
            if self._opened is None:
                self._opened = self._open_now(received)
                error = self._opened[1]
                self._traceback = error.__traceback__ if error is not None else None
            return self._opened

    def _open_now(self, received: Received) -> tuple[Any, BaseException | None]:
        event = received.event
        if isinstance(event, Failure):
            return None, received.error or exception_from(event, received.data, self.host.name)
        if isinstance(event, Item) or cast("Result", event).generator:
            return Items(self), None
        try:
            return self._decode(received), None
        except Exception as error:  # noqa: BLE001 - opening runs the user's code; its error is the outcome
            return None, error


class _Inbox:
    """Events that wait for the one thread that deals with them.

    Taking one out of a queue can be struck by an interrupt just when it is out, and it is lost. So the
    first stays where it is until it has been dealt with.
    """

    __slots__ = ("_bell", "_events")

    def __init__(self) -> None:
        self._events: deque[Received] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, received: Received) -> None:
        self._events.append(received)
        self._bell.put(None)

    def first(self) -> Received:
        while not self._events:
            self._bell.get()
        return self._events[0]

    @property
    def size(self) -> int:
        """How many events wait."""
        return len(self._events)

    def remove(self, received: Received) -> None:
        if self._events and self._events[0] is received:
            self._events.popleft()


async def _awaited(run: Run) -> Any:
    """Await a run, waking the loop now and then: a kernel's loop sleeps through its interrupt else."""
    future = asyncio.wrap_future(run)
    try:
        while not future.done():
            await asyncio.wait([future], timeout=_WAKE_SECONDS)
    except asyncio.CancelledError:
        future.cancel()  # `wait` leaves it alone
        raise
    return future.result()


class Items(Iterator[Any]):
    """The items of a generator that runs on a host, as they are produced.

    Closing it, or leaving the loop, stops the generator. `value` is what the generator returned.
    """

    def __init__(self, run: Run, draw: Draw | None = None, read_already: Received | None = None) -> None:
        self.run = run
        self.value: Any = None
        self._draw = draw
        self._read_already = read_already
        self._ended = False

    def __iter__(self) -> Items:
        return self

    def __next__(self) -> Any:
        __tracebackhide__ = True
        while not self._ended:
            received = self._receive()
            event = received.event
            if isinstance(event, Item):
                self.run.acknowledge(received)
                return pickling.load(received.data)
            if isinstance(event, (Result, Failure)):
                self._ended = True
                if self._draw is not None:
                    self._draw(received)
            if isinstance(event, Result):
                self.value = pickling.load(received.data)
            elif isinstance(event, Failure):
                raise received.error or exception_from(event, received.data, self.run.host.name)
            else:
                draw_or_ask(self.run, received, self._draw or draw_nothing)
                self.run.acknowledge(received)
        raise StopIteration

    def _receive(self) -> Received:
        received, self._read_already = self._read_already, None
        if received is not None:
            return received
        try:
            received = self.run.receive()
            self.run.dealt_with(received)
            return received
        except KeyboardInterrupt:
            self.close()
            raise

    def close(self) -> None:
        """Stop the generator if it still runs."""
        if not self._ended:
            self._ended = True
            self.run.interrupt()

    def __del__(self) -> None:
        self.close()


def load_result(received: Received) -> Any:
    """Unpickle the value of a function's result."""
    return pickling.load(received.data)


def start(
    host: Host,
    parcel: Parcel,
    *,
    decode: Decode = load_result,
    on_event: Draw | None = None,
    attended: bool = False,
) -> Run:
    """Start a call.

    Args:
        host: where to.
        parcel: the call.
        decode: makes the value of the result event.
        on_event: called with each event but items, in order, in a thread of the host's; None
            keeps them for `follow`.
        attended: `follow` will be called at once.

    Raises:
        HostError: the machine cannot be reached.
    """
    run = Run(host, parcel.call.label, decode, on_event)
    run.begin(parcel, attended=attended)
    return run


def follow(run: Run, draw: Draw) -> Any:
    """Wait for a foreground run, drawing its events here; give its value.

    The first KeyboardInterrupt interrupts the call and goes on waiting for it; the second ends its
    worker; the third gives up waiting. A call that ended before the interrupt reached it does not
    make the interrupt undone.

    Raises:
        BaseException: what the call raised.
    """
    __tracebackhide__ = True
    if not isinstance(draw, Drawer):
        return _follow(run, draw)
    draw.begin(run)
    try:
        return _follow(run, draw)
    finally:
        draw.end()


def _follow(run: Run, draw: Draw) -> Any:
    __tracebackhide__ = True
    presses = 0
    while True:
        try:
            received = _draw_until_outcome(run, draw)
            break
        except KeyboardInterrupt:
            presses += 1
            if presses > _PATIENCE:
                raise
            (run.interrupt if presses == 1 else run.kill)()
    event = received.event
    if isinstance(event, Item):
        run.dealt_with(received)
        return Items(run, draw, read_already=received)
    draw(received)
    if presses and isinstance(event, Result) and not event.struck:
        raise KeyboardInterrupt
    return run.settle(received)


def _draw_until_outcome(run: Run, draw: Draw) -> Received:
    """Draw events up to the first item or the outcome, and give that.

    The loop is not in `follow`, since an interrupt may come at the very jump back to its beginning, which
    stands outside of any `try` in it: it would have left the call running on the host.
    """
    __tracebackhide__ = True
    while True:
        received = run.receive()
        if isinstance(received.event, (Result, Failure, Item)):
            return received
        if isinstance(received.event, Prompt) and not run.is_answered():
            run.dealt_with(received)  # an interrupt while it is asked must not have it asked again
            draw_or_ask(run, received, draw)
        else:
            draw(received)
            run.dealt_with(received)
        run.acknowledge(received)


def draw_or_ask(run: Run, received: Received, draw: Draw) -> None:
    """Draw an event in the thread that waits for the run; if it is a prompt, ask the person.

    Raises:
        KeyboardInterrupt: the person interrupts rather than answers; the call is still waiting.
    """
    draw(received)
    event = received.event
    if isinstance(event, Prompt):
        run.reply(event, *read_line(event.text, secret=event.password))


def draw_nothing(_received: Received) -> None:
    """Show nothing of what goes on."""


def draw_connection(received: Received) -> None:
    """Show what is said of the connection, and nothing of what goes on."""
    event = received.event
    if isinstance(event, Log) and event.source == "link":
        sys.stderr.write(bytes(received.data[0]).decode())
