"""What a notebook and the agent of a host say to each other, but for the events of runs.

Runs everywhere.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from fal_agent.messages.record import Record

if TYPE_CHECKING:
    from fal_agent.messages.calls import Call, Data

__all__ = [
    "PART_SIZE",
    "Ack",
    "Answer",
    "Arrived",
    "Ask",
    "Attach",
    "BlobPart",
    "Cancel",
    "Hello",
    "Interrupt",
    "Kill",
    "Lane",
    "LaneClosed",
    "Need",
    "Ping",
    "Pong",
    "Reply",
    "Seen",
    "Submit",
    "Want",
    "Welcome",
]

PART_SIZE = 256 << 10  # bytes of one part of a blob, at most


# ---------------------------------------------------------------- notebook -> agent


class Hello(Record):
    """First message on a connection: who is calling."""

    type: ClassVar[str] = "hello"
    client_id: str  # one per kernel, the same after a reconnect
    part_size: int = PART_SIZE  # bytes of the parts of blobs that the client wants to get
    shares_files: bool = False  # the client is on this machine and reads and writes blobs' files itself


class Submit(Record):
    """Run a call with arguments. Sent again with the same id, it never runs twice."""

    type: ClassVar[str] = "submit"
    run_id: str
    template: str  # the client's name for `call` on this connection
    arguments: Data  # "function": pickle of (args, kwargs); "map": of ([args, ...],); "cell": of a dict
    call: Optional[Call] = None  # left out when the agent knows the template
    function_data: Optional[Data] = None  # left out when the agent is known to have the function
    again: bool = False  # it may have been sent before
    attended: bool = False  # a thread waits for this very call, and would take a lane for those to come


class Attach(Record):
    """Show the events of a run after a number, and those to come; of an unknown run a `Failure` says so."""

    type: ClassVar[str] = "attach"
    run_id: str
    after: int = 0
    resumes: bool = False  # the connection that the run's events went to before has broken


class Arrived(Record):
    """What the notebook has of blobs that the last connection broke off: they are sent on from there."""

    type: ClassVar[str] = "arrived"
    blobs: dict[str, int]  # by name: bytes, from the front


class BlobPart(Record):
    """A piece of a blob, in one raw buffer; pieces of one blob come in order."""

    type: ClassVar[str] = "blob"
    blob: str  # its name: letters, digits, "-" and "_"
    offset: int
    size: int  # bytes of the whole blob


class Ack(Record):
    """The notebook has dealt with events of a run; sent on to the worker."""

    type: ClassVar[str] = "ack"
    run_id: str
    seq: int  # highest event number dealt with
    credit: int  # sum of their costs since the last acknowledgement, in bytes


class Interrupt(Record):
    """Raise KeyboardInterrupt in one call."""

    type: ClassVar[str] = "interrupt"
    run_id: str


class Cancel(Record):
    """Take a call out of the queue, or interrupt it."""

    type: ClassVar[str] = "cancel"
    run_id: str


class Kill(Record):
    """End the worker that runs a call."""

    type: ClassVar[str] = "kill"
    run_id: str


class Reply(Record):
    """The answer to a `Prompt`: a line of text in UTF-8, in one raw buffer. Neither journaled nor logged."""

    type: ClassVar[str] = "reply"
    run_id: str
    number: int  # the prompt's
    error: str = ""  # name of the exception that is raised instead; the text is its message then


class Seen(Record):
    """The outcome of a cell's run was shown, so that whoever runs the cell again wants it to run again."""

    type: ClassVar[str] = "seen"
    run_id: str


class Ask(Record):
    """A question about the host, answered by one `Answer`."""

    type: ClassVar[str] = "ask"
    request_id: str
    question: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Ping(Record):
    """Are you there? Answered at once."""

    type: ClassVar[str] = "ping"
    number: int = 0


# ---------------------------------------------------------------- agent -> notebook


class Welcome(Record):
    """The agent's answer to `Hello`."""

    type: ClassVar[str] = "welcome"
    pid: int
    python: str  # "X.Y.Z" of the agent
    root: str  # folder of everything the agent keeps


class Need(Record):
    """The agent lacks data that a submit refers to; the client sends the submit again, with it."""

    type: ClassVar[str] = "need"
    run_id: str
    names: list[str]  # of blobs, of the function (its digest) or of the template


class Want(Record):
    """A build lacks what this host cannot download; answered by the question "supply"."""

    type: ClassVar[str] = "want"
    run_id: str  # that waits for it
    request_id: str
    python: str  # "X.Y" that the packages are for
    layers: list[list[str]]  # requirement lines, as in `EnvironmentSpec`
    wants_python: bool  # the interpreter is what is lacking
    machine: str  # as `uname -m` says
    libc: str  # "glibc 2.36", or "musl"
    have: list[str] = field(default_factory=list)  # names of wheels that are there


class Answer(Record):
    """What an `Ask` brought."""

    type: ClassVar[str] = "answer"
    request_id: str
    content: Any = None
    error: Optional[str] = None


class Pong(Record):
    """I am here."""

    type: ClassVar[str] = "pong"
    number: int = 0


class Lane(Record):
    """A worker can be had for a while: brief calls may go straight to it (see `server/lanes.py`)."""

    type: ClassVar[str] = "lane"
    lane: str
    path: str  # of the Unix socket to dial
    templates: dict[str, str]  # the client's names of the calls that may go there -> the agent's names


class LaneClosed(Record):
    """A lane is no more; calls go through the agent again."""

    type: ClassVar[str] = "lane-closed"
    lane: str
