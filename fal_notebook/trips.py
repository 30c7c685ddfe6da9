"""Where what is being pickled goes, for values that say different things at different places: handles.

Runs in the notebook.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fal_notebook.hosts.base import Host

__all__ = ["Trip", "going_to", "travelling"]


@dataclass
class Trip:
    """Where what is being pickled goes; handles in it say then how they are found there.

    Attributes:
        host: where to.
        session: that it is opened in, if it is a cell's.
        seen: the sessions of the host whose handles go along, with their environments; "" for other hosts'.
        made: version of a handle -> what its pickle says.
        waiting: bring what other hosts' handles stand for to this one, before the pickle is sent.
    """

    host: Host
    session: str | None = None
    seen: list[tuple[str, Any]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def note(self, _handle: Any, session: str, environment: Any) -> None:
        """A handle of a session goes along."""
        self.seen.append((session, environment))

    def bring(self) -> None:
        """Bring to the host what handles of other hosts stand for."""
        while self.waiting:
            self.waiting[0]()
            del self.waiting[0]

    def best_session(self, environment: Any) -> str | None:
        """The session in whose process the handles that go along are at home, if the call can run there."""
        homes = {session for session, known in self.seen if known == environment}
        return homes.pop() if len(homes) == 1 and len({session for session, _ in self.seen}) == 1 else None


travelling: ContextVar[Trip | None] = ContextVar("fal_travelling", default=None)


@contextlib.contextmanager
def going_to(host: Host, session: str | None = None) -> Iterator[Trip]:
    """Say where what is pickled meanwhile goes."""
    trip = Trip(host, session)
    token = travelling.set(trip)
    try:
        yield trip
    finally:
        travelling.reset(token)
