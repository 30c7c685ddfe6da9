"""Decide which runner of an app gets which request; keep the line of those that wait.

Runs in the gateway process, in front of several runners. It knows no sockets, clocks or tasks: it is told
what happened, and says who may go. Always true: no runner has more requests than the limit, whoever has
waited longest goes first, and nobody waits while a runner has room.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Balancer", "Load", "RunnerAddress", "Ticket"]


@dataclass(frozen=True)
class RunnerAddress:
    """Where a runner is reached.

    Attributes:
        name: what the runner is called in reports.
        path: the Unix socket that it listens on. A replacement has another name or another path.
        port: of this machine that it listens on instead; None for a socket.
    """

    name: str
    path: str
    port: Optional[int] = None


@dataclass(frozen=True)
class Load:
    """How busy an app is at a moment.

    Attributes:
        waiting: requests that no runner has yet.
        in_flight: requests that a runner has.
        oldest_wait_seconds: how long the first in line has waited; 0.0 when none waits. It grows while
            nothing is reported: the reader adds the time since this report.
        per_runner: by name, the requests that the runner has. A runner that is no longer ready stays in here
            until it has finished its last one.
    """

    waiting: int
    in_flight: int
    oldest_wait_seconds: float
    per_runner: dict[str, int]


@dataclass(eq=False)
class Ticket:
    """The claim of one request.

    Attributes:
        number: place in the order of arrival.
        hint: the runner is preferred whose last hints contain it; empty for none.
        since: when it began to wait, in the caller's clock.
        runner: whose room it has; None while it waits, and when it is over.
    """

    number: int
    hint: str
    since: float
    runner: Optional[RunnerAddress] = None

    @property
    def holder(self) -> RunnerAddress:
        """Its runner.

        Raises:
            ValueError: it has none.
        """
        if self.runner is None:
            raise ValueError(f"ticket {self.number} has no runner")
        return self.runner


@dataclass(eq=False)
class _Runner:
    in_flight: int = 0
    last_given: int = 0
    is_ready: bool = True  # whether it is listed
    is_sick: bool = False
    hints: frozenset[str] = field(default_factory=frozenset)


class Balancer:
    """The runners of one app and the requests for them.

    Args:
        multiplexing: requests that one runner may have at a time.
        max_waiting: requests that may wait.
        on_grant: called with a ticket that had to wait when it gets its runner.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(
        self, *, multiplexing: int = 1, max_waiting: int = 10_000, on_grant: Callable[[Ticket], None]
    ) -> None:
        if multiplexing < 1 or max_waiting < 0:
            raise ValueError(
                f"multiplexing must be at least 1 and max_waiting at least 0, "
                f"not {multiplexing} and {max_waiting}"
            )
        self._multiplexing, self._max_waiting, self._on_grant = multiplexing, max_waiting, on_grant
        self._runners: dict[RunnerAddress, _Runner] = {}
        self._waiting: list[tuple[int, Ticket]] = []  # by number
        self._tickets = 0
        self._grants = 0

    def __contains__(self, address: object) -> bool:
        """Whether a runner is listed or still has a request."""
        return address in self._runners

    def set_runners(self, addresses: Iterable[RunnerAddress]) -> None:
        """Say which runners are ready; the others finish what they have and get nothing new."""
        listed = dict.fromkeys(addresses)
        for address, runner in list(self._runners.items()):
            if address not in listed:
                runner.is_ready = runner.is_sick = False
                self._forget_if_done(address)
        for address in listed:
            self._runners.setdefault(address, _Runner()).is_ready = True
        self._grant_waiting()

    def suspect(self, address: RunnerAddress) -> bool:
        """Give a runner nothing new as long as it is listed.

        Returns:
            Whether that is news; False for a runner that is no longer listed.
        """
        runner = self._runners.get(address)
        if runner is None or runner.is_sick or not runner.is_ready:
            return False
        runner.is_sick = True
        return True

    def remember_hints(self, address: RunnerAddress, hints: Iterable[str]) -> None:
        """Keep the last hints of a runner, in place of those before."""
        if address in self._runners:
            self._runners[address].hints = frozenset(hints)

    def ask(self, hint: str, now: float) -> Optional[Ticket]:
        """Ask for a runner.

        Returns:
            A ticket, which has its runner already if one has room; None if the line is full.
        """
        self._tickets += 1
        ticket = Ticket(self._tickets, hint, now)
        if (address := self._choose(hint)) is not None:
            self._give(ticket, address)
        elif len(self._waiting) >= self._max_waiting:
            return None
        else:
            self._waiting.append((ticket.number, ticket))
        return ticket

    def ask_again(self, ticket: Ticket, now: float) -> None:
        """Give a ticket's runner back and ask for another, at the ticket's old place in line.

        It is not refused when the line is full.
        """
        self._give_back(ticket)
        ticket.since = now
        bisect.insort(self._waiting, (ticket.number, ticket))  # numbers differ: tickets are never compared
        self._grant_waiting()

    def leave(self, ticket: Ticket) -> None:
        """End a ticket, wherever it is: its room is free, or it no longer waits. Again does nothing."""
        if ticket.runner is not None:
            self._give_back(ticket)
            self._grant_waiting()
            return
        at = bisect.bisect_left(self._waiting, (ticket.number,))
        if at < len(self._waiting) and self._waiting[at][1] is ticket:
            del self._waiting[at]

    def load(self, now: float) -> Load:
        """Say how busy the app is."""
        per_runner: dict[str, int] = {}
        for address, runner in self._runners.items():
            per_runner[address.name] = per_runner.get(address.name, 0) + runner.in_flight
        waited = max(0.0, now - self._waiting[0][1].since) if self._waiting else 0.0
        return Load(len(self._waiting), sum(per_runner.values()), waited, per_runner)

    def _choose(self, hint: str) -> Optional[RunnerAddress]:
        """Give the best runner with room: hinted, else least loaded, else idle for longest."""
        free = [
            (hint not in runner.hints if hint else False, runner.in_flight, runner.last_given, at, address)
            for at, (address, runner) in enumerate(self._runners.items())
            if runner.is_ready and not runner.is_sick and runner.in_flight < self._multiplexing
        ]
        return min(free)[-1] if free else None

    def _give(self, ticket: Ticket, address: RunnerAddress) -> None:
        self._grants += 1
        runner = self._runners[address]
        runner.in_flight += 1
        runner.last_given = self._grants
        ticket.runner = address

    def _give_back(self, ticket: Ticket) -> None:
        address, ticket.runner = ticket.runner, None
        if address is not None:
            self._runners[address].in_flight -= 1
            self._forget_if_done(address)

    def _forget_if_done(self, address: RunnerAddress) -> None:
        runner = self._runners[address]
        if not runner.is_ready and not runner.in_flight:
            del self._runners[address]

    def _grant_waiting(self) -> None:
        while self._waiting:
            _, first = self._waiting[0]
            address = self._choose(first.hint)
            if address is None:
                return
            del self._waiting[0]
            self._give(first, address)
            self._on_grant(first)
