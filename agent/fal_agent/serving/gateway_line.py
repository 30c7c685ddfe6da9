"""The line of requests for an app's runners: waiting in it, and telling of it.

Runs in the gateway process, on its loop. `Balancer` decides; this waits and reports. Always true: a ticket
that was given is given back, whatever happens to its request.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Optional

import anyio

from fal_agent.errors import AppException
from fal_agent.serving.balancing import Balancer, Load, RunnerAddress, Ticket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

__all__ = ["Line"]

_REPORT_EVERY = 0.05  # seconds between two reports of the load, at least


class Line:
    """Requests in order of arrival.

    Args:
        multiplexing: requests that one runner may have at a time.
        max_waiting: requests that may wait; one more is answered 503.
        queue_timeout: seconds that one may wait before it is answered 504; None: for ever.
        on_load: called on the loop when the load has changed.
        on_sick: called on the loop, once for each runner that should be replaced, with its name and why.
    """

    def __init__(
        self,
        *,
        multiplexing: int,
        max_waiting: int,
        queue_timeout: Optional[float],
        on_load: Callable[[Load], None],
        on_sick: Callable[[str, str], None],
    ) -> None:
        self._balancer = Balancer(
            multiplexing=multiplexing, max_waiting=max_waiting, on_grant=self._was_granted
        )
        self._queue_timeout, self._on_load, self._on_sick = queue_timeout, on_load, on_sick
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._timer: Optional[asyncio.TimerHandle] = None
        self._next_report = 0.0
        self._reported: Optional[Load] = None

    def __contains__(self, address: object) -> bool:
        """Whether a runner is listed or still has a request."""
        return address in self._balancer

    def set_runners(self, addresses: Iterable[RunnerAddress]) -> None:
        """Say which runners are ready."""
        self._balancer.set_runners(addresses)
        self._changed()

    @asynccontextmanager
    async def place(self, hint: str) -> AsyncIterator[Ticket]:
        """Wait for a runner and have it for the time of the block.

        Raises:
            AppException: the line is full, or the wait was too long; with the status to answer.
        """
        ticket = self._balancer.ask(hint, _now())
        if ticket is None:
            raise AppException(
                f"{self._balancer.load(_now()).waiting} requests are waiting already; try again later, "
                "or let the app have more runners",
                503,
            )
        try:
            await self._granted(ticket)
            yield ticket
        finally:
            self._balancer.leave(ticket)
            self._changed()

    async def again(self, ticket: Ticket) -> None:
        """Give the ticket's runner back and wait for another, at the old place in line.

        Raises:
            AppException: the wait was too long.
        """
        self._balancer.ask_again(ticket, _now())
        await self._granted(ticket)

    def suspect(self, address: RunnerAddress, reason: str) -> None:
        """Give a runner nothing new, and ask for its replacement."""
        if self._balancer.suspect(address):
            asyncio.get_running_loop().call_soon(self._on_sick, address.name, reason)

    def remember_hints(self, address: RunnerAddress, hints: Iterable[str]) -> None:
        """Keep the last hints of a runner."""
        self._balancer.remember_hints(address, hints)

    def close(self) -> None:
        """Report the load for the last time."""
        if self._timer is not None:
            self._timer.cancel()
            self._report()

    async def _granted(self, ticket: Ticket) -> None:
        self._changed()
        if ticket.runner is not None:
            return
        self._waiters[ticket] = asyncio.get_running_loop().create_future()
        try:
            with anyio.move_on_after(self._queue_timeout):
                await self._waiters[ticket]
        finally:
            del self._waiters[ticket]
        if ticket.runner is None:
            raise AppException(f"no runner was free within {self._queue_timeout:g} s; try again later", 504)

    def _was_granted(self, ticket: Ticket) -> None:
        waiter = self._waiters.get(ticket)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _changed(self) -> None:
        if self._timer is None:
            wait = max(0.0, self._next_report - _now())
            self._timer = asyncio.get_running_loop().call_later(wait, self._report)

    def _report(self) -> None:
        self._timer = None
        load, before = self._balancer.load(_now()), self._reported
        if before is None or load.waiting or (before.waiting, before.per_runner) != (0, load.per_runner):
            self._next_report, self._reported = _now() + _REPORT_EVERY, load
            self._on_load(load)


def _now() -> float:
    return asyncio.get_running_loop().time()
