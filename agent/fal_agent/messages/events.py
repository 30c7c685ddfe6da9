"""What comes of a run: output, displays, progress, questions and its end, from the worker to the notebook.

Runs everywhere. `seq` counts the events of one run from 1; the agent sets it. `sent_at` is in seconds
since the Unix epoch, by the clock of the process that made the event.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from fal_agent.messages.record import Record

if TYPE_CHECKING:
    from fal_agent.messages.calls import Data

__all__ = [
    "Clear",
    "Comm",
    "Display",
    "Failure",
    "Item",
    "Log",
    "Progress",
    "Prompt",
    "Result",
    "Serving",
    "Stage",
]


class Stage(Record):
    """A run entered a phase: queue, resolve, build, start, run.

    Of an app, "serve" is a remark about its runners, and "runners" says how many serve.
    """

    type: ClassVar[str] = "stage"
    run_id: str
    phase: str
    text: str = ""  # for a person: the reason, sizes
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Log(Record):
    """Printed text in UTF-8, in one raw buffer, in the order it was written; not always whole lines."""

    type: ClassVar[str] = "log"
    run_id: str
    stream: str  # "stdout" or "stderr"
    source: str = "user"  # "user"; "builder": what uv says; "link": what a notebook says of its connection
    request: str = ""  # id of the request that an app was answering
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Display(Record):
    """Something to show: `data` is a JSON object {"data": MIME bundle, "metadata": {}, "transient": {}}."""

    type: ClassVar[str] = "display"
    run_id: str
    # "display", "result" (the value of a cell's last expression), "update", "page" (for a pager),
    # "next_input" (text for another cell; metadata "replace": for this one), or "error": {"ename", "evalue",
    # "traceback" (None if it was printed)} instead of a MIME bundle; metadata "own": it ends the cell
    kind: str
    data: Data = field(default_factory=list)
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Clear(Record):
    """Clear the output of the run's cell."""

    type: ClassVar[str] = "clear"
    run_id: str
    wait: bool = False  # only when new output comes
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Progress(Record):
    """How far a loop of the user's has come."""

    type: ClassVar[str] = "progress"
    run_id: str
    name: str  # what stands before the bar
    done: float
    total: Optional[float] = None
    bar: int = 0  # which one, of the run's
    depth: int = 0  # how many others it stands in
    over: bool = False
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Item(Record):
    """One item that a generator produced; `data` is its pickle."""

    type: ClassVar[str] = "item"
    run_id: str
    data: Data = field(default_factory=list)
    private: bool = False  # a secret is in it: it is sent on, and not journaled
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Prompt(Record):
    """The call waits for a line of text from the person, or to hear that there is none: see `Reply`."""

    type: ClassVar[str] = "prompt"
    run_id: str
    number: int  # counts the prompts of the run from 1
    text: str
    password: bool = False  # what is typed must not be seen
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Comm(Record):
    """A widget speaks to its other half in the front end.

    The first part of `data` is a JSON object with "data" and "metadata", for "open" also "target_name"
    and "target_module"; the others are the message's binary buffers.
    """

    type: ClassVar[str] = "comm"
    run_id: str
    comm_id: str
    action: str  # "open", "msg" or "close"
    data: Data = field(default_factory=list)
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Serving(Record):
    """An app answers requests from now on."""

    type: ClassVar[str] = "serving"
    run_id: str
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Result(Record):
    """A run ended well: `data` is the pickle of the value (cells: of a dict, see worker/session.py)."""

    type: ClassVar[str] = "result"
    run_id: str
    data: Data = field(default_factory=list)
    generator: bool = False  # the value is that of a generator whose items came before
    seconds: float = 0.0  # spent in the user's code
    struck: bool = False  # an interrupt reached the user's code, which dealt with it
    private: bool = False  # a secret is in it: it is sent on, and not journaled
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


class Failure(Record):
    """A run ended badly.

    `kind` is one of:
        user            the code raised; `data` is the pickle of the exception if it can be rebuilt
        interrupted     KeyboardInterrupt, as `user`
        serialization   the result, or the error, cannot be pickled
        deserialization the function or its arguments cannot be opened on the host
        missing         a module is missing there (`detail["module"]`)
        environment     uv failed (`detail["log"]`)
        requirement     a requirement line is not one
        resources       the host cannot give what was asked for
        python          Python minor versions differ
        timeout         `detail["seconds"]`
        cancelled       cancelled before it ran, or killed, or its lease ended
        unknown         the agent has no such run
        lost            the worker died (`detail["exit_status"]`)
        agent           a fault of ours
    """

    type: ClassVar[str] = "failure"
    run_id: str
    kind: str
    message: str  # "ExceptionType: text" for the user's errors, else what happened and what to do next
    detail: dict[str, Any] = field(
        default_factory=dict
    )  # "traceback": text, "frames": see worker/failures.py
    data: Data = field(default_factory=list)
    variables: Optional[int] = None  # index of the last raw buffer: see fal_agent/variables.py; not journaled
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0
