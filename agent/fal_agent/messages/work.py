"""What the agent and its workers say to each other, and what passes through a lane.

Runs on hosts, and in the notebook for lanes.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from fal_agent.messages.record import Record

if TYPE_CHECKING:
    from fal_agent.messages.calls import AppSpec, Data

__all__ = [
    "Activity",
    "Adopt",
    "Begun",
    "Execute",
    "Found",
    "Lend",
    "Lent",
    "Listening",
    "Load",
    "Look",
    "Moved",
    "Ready",
    "Recall",
    "Returned",
    "Runners",
    "Serve",
    "Sick",
    "Task",
    "Unwell",
]


# ---------------------------------------------------------------- agent <-> worker


class Ready(Record):
    """A worker can take calls."""

    type: ClassVar[str] = "ready"
    pid: int
    python: str  # "X.Y.Z"


class Serve(Record):
    """How a worker serves an app."""

    path: str  # of the Unix socket
    app: AppSpec
    agent_secret: str = field(repr=False)  # with which the agent's own requests are told from others
    multiplexing: int = 1  # gateways: requests in flight in one runner


class Activity(Record):
    """How many requests a runner has in flight now."""

    type: ClassVar[str] = "activity"
    run_id: str
    in_flight: int


class Runners(Record):
    """To a gateway: the runners that are ready, with the name and the socket of each."""

    type: ClassVar[str] = "runners"
    run_id: str
    runners: list[list[str]]


class Load(Record):
    """From a gateway: how much there is to do."""

    type: ClassVar[str] = "load"
    run_id: str
    waiting: int  # requests that no runner has yet
    in_flight: int
    oldest: float  # seconds that the first of those that wait has waited
    runners: dict[str, int] = field(default_factory=dict)  # requests in flight by runner


class Sick(Record):
    """From a gateway: a runner answered 503, or broke its connection."""

    type: ClassVar[str] = "sick"
    run_id: str
    runner: str
    reason: str


class Unwell(Record):
    """A runner asks for a health check, or for being replaced: it answered 503."""

    type: ClassVar[str] = "unwell"
    run_id: str
    reason: str  # empty: only check it


class Task(Record):
    """What a worker must know of a `Call`."""

    kind: str
    label: str
    function: Optional[str] = None
    session: Optional[str] = None
    outbox: str = ""  # folder where the worker puts large results, for the agent to take
    multiplexing: int = 1
    folder: Optional[str] = None  # working folder, importable; None: as it is
    import_path: str = ""  # below it, importable too
    fresh: bool = False
    reusable: bool = False
    pydantic: str = ""  # version in the notebook, if it is loaded there
    serve: Optional[Serve] = None  # kind "app"
    environ: dict[str, str] = field(default_factory=dict, repr=False)  # secrets


class Execute(Record):
    """Run a call in this worker; `blobs` gives the file of each blob that its data names."""

    type: ClassVar[str] = "execute"
    run_id: str
    template: str  # the agent's name for `task`
    arguments: Data
    task: Optional[Task] = None  # left out when this worker knows the template
    function_data: Optional[Data] = None  # left out when this worker has the function
    blobs: dict[str, str] = field(default_factory=dict)  # name -> path


# ---------------------------------------------------------------- lanes: see `server/lanes.py`


class Look(Record):
    """To a worker: what do the names of a session say about a place in a cell? Answered by `Found`."""

    type: ClassVar[str] = "look"
    number: int
    session: str
    action: str  # "complete" or "inspect"
    code: str
    cursor: int  # characters of `code` before it
    detail: int = 0  # 1: sources too


class Found(Record):
    """From a worker: what a `Look` found; see `fal_agent.worker.looking`."""

    type: ClassVar[str] = "found"
    number: int
    content: Any = None  # None: nothing, or a call began meanwhile


class Lend(Record):
    """To a worker: listen on a socket for one notebook, and take its calls until it hangs up."""

    type: ClassVar[str] = "lend"
    lane: str
    path: str  # of the socket to listen on
    spool: str  # file that each call is written down in, as `Begun` and as its last event


class Listening(Record):
    """From a worker: the lane's socket can be dialled."""

    type: ClassVar[str] = "listening"
    lane: str


class Lent(Record):
    """From a worker: the notebook has dialled; other calls wait for the lane's end from now on."""

    type: ClassVar[str] = "lent"
    lane: str


class Recall(Record):
    """To a worker: end a lane."""

    type: ClassVar[str] = "recall"
    lane: str


class Returned(Record):
    """From a worker: the lane has ended; its calls have ended too, or were moved."""

    type: ClassVar[str] = "returned"
    lane: str


class Adopt(Record):
    """From a worker: a call that came through a lane goes on as if it had come from the agent."""

    type: ClassVar[str] = "adopt"
    run_id: str
    lane: str
    template: str  # the agent's name


class Moved(Record):
    """From a worker, through the lane: the call's events will come from the agent."""

    type: ClassVar[str] = "moved"
    run_id: str


class Begun(Record):
    """In a lane's spool: a call begins; its last event follows, unless it was moved."""

    type: ClassVar[str] = "begun"
    run_id: str
    template: str  # the agent's name
    at: float  # seconds since the Unix epoch
