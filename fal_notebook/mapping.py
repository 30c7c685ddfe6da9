"""Fan a function out over many items: chunks in flight, values in order or as they come.

Runs in the notebook. Input is read lazily, and never more is in flight than was allowed.
"""

from __future__ import annotations

import itertools
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.wire import Failure, Item, Log, Result
from fal_notebook import display
from fal_notebook.hosts.base import Host, Parcel, Received
from fal_notebook.rebuild import exception_from
from fal_notebook.run import Run, draw_or_ask

if TYPE_CHECKING:
    from fal_agent.framing import Buffer

__all__ = ["map_calls"]

_TARGET_SECONDS = 0.1  # that one chunk should take
_MAX_CHUNK = 4096

Submit = Callable[[list[tuple[Any, ...]], Callable[[Parcel], Run]], Run]


def map_calls(
    arguments: Iterator[tuple[Any, ...]],
    submit: Submit,
    host: Host,
    *,
    ordered: bool,
    chunk_size: int | None,
    in_flight: int | None,
) -> Iterator[Any]:
    """Give the value for each item of `arguments`.

    Args:
        arguments: positional arguments of each call.
        submit: sends a chunk of them.
        host: for messages.
        ordered: keep the order of the items.
        chunk_size: items of one chunk; None adapts it.
        in_flight: chunks at once, at most; None is four times the number of cores here.

    Raises:
        ValueError: a number is not positive.
    """
    for name, value in (("chunk_size", chunk_size), ("in_flight", in_flight)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    fan = _Fan(arguments, submit, host, chunk_size, in_flight or 4 * (os.cpu_count() or 2))
    return fan.values(ordered=ordered)


class _Fan:
    """The chunks of one `map` that are in flight."""

    def __init__(
        self,
        arguments: Iterator[tuple[Any, ...]],
        submit: Submit,
        host: Host,
        chunk_size: int | None,
        in_flight: int,
    ) -> None:
        self._arguments, self._submit, self._host = arguments, submit, host
        self._fixed_size, self._size, self._in_flight = chunk_size, chunk_size or 1, in_flight
        self._events: queue.SimpleQueue[tuple[int, Received]] = queue.SimpleQueue()
        self._runs: dict[int, Run] = {}
        self._ready: dict[int, Iterator[Any]] = {}  # chunks that ended before their turn
        self._sizes: dict[int, int] = {}
        self._next = 0
        self._exhausted = False
        self._told: Sequence[Buffer] = ()  # of the connection
        self._draw = display.drawer(adds_up=True)

    def values(self, *, ordered: bool) -> Iterator[Any]:
        """Give the values, or raise the first error, in turn."""
        turn = 0
        try:
            while True:
                outcome = self._ready.pop(turn, None)
                self._fill()
                if outcome is not None:
                    turn += 1
                    yield from outcome
                elif self._runs:
                    index, received = self._wait()
                    self._adapt(index, received)
                    self._ready[index if ordered else turn] = self._outcome(received)
                else:
                    return
        finally:
            self._draw.end()
            for run in self._runs.values():
                run.cancel()

    def _fill(self) -> None:
        while not self._exhausted and len(self._runs) + len(self._ready) < self._in_flight:
            chunk = list(itertools.islice(self._arguments, self._size))
            if not chunk:
                self._exhausted = True
                return
            index, self._next = self._next, self._next + 1
            self._sizes[index] = len(chunk)
            self._runs[index] = self._submit(chunk, lambda parcel, index=index: self._start(index, parcel))  # type: ignore[misc]

    def _start(self, index: int, parcel: Parcel) -> Run:
        def take(received: Received) -> None:
            self._events.put((index, received))

        run = _MapRun(self._host, parcel.call.label, take)
        run.begin(parcel)
        return run

    def _wait(self) -> tuple[int, Received]:
        """Draw what comes until a chunk has ended."""
        while True:
            index, received = self._events.get()
            if isinstance(received.event, (Result, Failure)):
                del self._runs[index]
                return index, received
            run = self._runs.get(index)
            if run is not None:
                if not isinstance(received.event, Item) and not self._is_told(received):
                    draw_or_ask(run, received, self._draw)
                run.acknowledge(received)

    def _is_told(self, received: Received) -> bool:
        """Whether another of the calls has said the same of the connection, which they share."""
        event = received.event
        if not isinstance(event, Log) or event.source != "link":
            return False
        is_told, self._told = received.data == self._told, received.data
        return is_told

    def _outcome(self, received: Received) -> Iterator[Any]:
        event = received.event
        if isinstance(event, Failure):
            raise received.error or exception_from(event, received.data, self._host.name)
        values, failure, parts = pickling.load(received.data)
        yield from values
        if failure is not None:
            kind, message, detail = failure
            rebuilt = Failure(event.run_id, kind, message, detail=detail, sent_at=time.time())
            raise exception_from(rebuilt, parts, self._host.name)

    def _adapt(self, index: int, received: Received) -> None:
        """Choose how many items the next chunks hold, from how long this one's took."""
        size = self._sizes.pop(index)
        if self._fixed_size is None and isinstance(received.event, Result):
            each = max(received.event.seconds / size, 1e-6)
            self._size = max(1, min(int(_TARGET_SECONDS / each), size * 4, _MAX_CHUNK))


class _MapRun(Run):
    """A run whose every event goes to the fan it belongs to."""

    def __init__(self, host: Host, label: str, take: Callable[[Received], None]) -> None:
        super().__init__(host, label, lambda received: received, None)
        self._hand_on = take

    def _take(self, received: Received) -> None:
        if isinstance(received.event, (Result, Failure)):
            self._settle(received)
        self._hand_on(received)
