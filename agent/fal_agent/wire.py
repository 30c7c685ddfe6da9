"""Every message that the notebook, the agent and its workers exchange.

Runs everywhere; the only place where a message is defined. Messages are frozen dataclasses;
`encode` and `decode` turn them into frames and back (`fal_agent.framing`).

Data (pickles and their out-of-band buffers) is referred to by `Data`: a list whose items are either
the index of a raw buffer of the same frame, or the name of a blob. A blob is larger data that
travels on its own, in `BlobPart`s that other frames may come between, and that is kept on the host
under its name. The first item is a pickle, the others are its out-of-band buffers in order.

Flow control: every event that a worker makes carries `cost`, in bytes. A worker stops producing
when more than `WINDOW` bytes of one run are not yet acknowledged; the notebook acknowledges what it
has drawn or handed over, and the agent does so itself for runs that nobody watches.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional, TypeVar, Union

from fal_agent.errors import ProtocolError
from fal_agent.framing import Buffer, Frame, encode_frame

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "INLINE_LIMIT",
    "PART_SIZE",
    "WINDOW",
    "Ack",
    "Activity",
    "Adopt",
    "Answer",
    "AppSpec",
    "Ask",
    "Attach",
    "Begun",
    "BlobPart",
    "Call",
    "Cancel",
    "Clear",
    "Comm",
    "Data",
    "Display",
    "EnvironmentSpec",
    "Event",
    "Execute",
    "Failure",
    "Found",
    "HealthPolicy",
    "Hello",
    "Interrupt",
    "Item",
    "Kill",
    "Lane",
    "LaneClosed",
    "Lend",
    "Lent",
    "Listening",
    "Load",
    "Log",
    "Look",
    "Message",
    "Moved",
    "Need",
    "Ping",
    "Pong",
    "Progress",
    "Prompt",
    "Ready",
    "Recall",
    "Reply",
    "Resources",
    "Result",
    "Returned",
    "Runners",
    "Scaling",
    "Seen",
    "Serve",
    "Serving",
    "Sick",
    "Stage",
    "Submit",
    "Task",
    "Unwell",
    "Want",
    "Welcome",
    "decode",
    "encode",
    "header",
    "lasting",
]

INLINE_LIMIT = 256 << 10  # bytes of raw buffers that one message carries itself; more goes as blobs
PART_SIZE = 256 << 10  # bytes of one part of a blob, at most
WINDOW = 1 << 20  # bytes of events of one run that may be unacknowledged

Data = list[Union[int, str]]


# ---------------------------------------------------------------- what a call asks for


@dataclass(frozen=True)
class EnvironmentSpec:
    """What a virtual environment is asked to hold."""

    python: str  # "X.Y", the notebook's minor version unless said otherwise
    layers: list[list[str]]  # install steps of PEP 508 lines; a later step may overrule an earlier one
    compile_bytecode: bool = False
    force: bool = False  # resolve and build anew even if it is known


@dataclass(frozen=True)
class Resources:
    """What a call asks of the machine; the alternatives are tried in order."""

    machine_types: list[str] = field(default_factory=lambda: ["XS"])
    num_gpus: Optional[int] = None  # None: 1 for a GPU type, else 0
    regions: Optional[list[str]] = None  # labels, one of which the host must carry


@dataclass(frozen=True)
class Scaling:
    """How many workers serve one function, and for how long."""

    keep_alive: float = 10.0  # seconds that an idle worker lives
    min_concurrency: int = 0
    max_concurrency: Optional[int] = None  # workers
    concurrency_buffer: int = 0
    concurrency_buffer_perc: int = 0
    scaling_delay: float = 0.0  # seconds that a call waits before one more worker is started
    max_multiplexing: int = 1  # calls at once in one worker


@dataclass(frozen=True)
class HealthPolicy:
    """How the agent finds out whether a runner of an app is well."""

    path: str = ""  # what is asked; empty: GET /health, or whether the function's own server listens
    method: str = "POST"  # how it is asked
    start_period: float = 30.0  # seconds after the start of serving in which failures do not count
    timeout: float = 5.0  # seconds that an answer may take
    threshold: int = 3  # failures in a row that make a runner sick
    regularly: bool = True  # every 15 seconds; else only when asked for, and then the first failure counts


@dataclass(frozen=True)
class AppSpec:
    """How an app is served, besides what every call says."""

    name: str
    auth: str = ""  # "private", "shared" or "public"; empty: private by the way it is reached
    secrets: list[str] = field(default_factory=list)  # SHA-256 of what callers must show
    health: HealthPolicy = field(default_factory=HealthPolicy)
    request_timeout: Optional[float] = None  # seconds
    multiplexing: Optional[int] = None  # requests in flight in one runner; None: the server's own limit
    grace: float = 30.0  # seconds between asking a runner to end and making it
    skip_retry: list[str] = field(default_factory=list)  # "timeout", "server_error", "connection_error"
    environ: dict[str, str] = field(default_factory=dict, repr=False)  # secrets: neither written nor logged
    port: Optional[int] = None  # of the server that the function itself runs; None: it is served


@dataclass(frozen=True)
class Call:
    """What is to run and what it needs: everything about a call that stays the same from call to call."""

    # "function" and "app": pickle of (function or class, setup or None); "cell": a session's;
    # "comm": a message of the front end to a widget of a session, which neither starts nor is journaled
    kind: str
    label: str  # the function's qualified name, or the first line of the cell
    function: Optional[str]  # digest of the function's data, None for cells
    environment: EnvironmentSpec
    resources: Resources = field(default_factory=Resources)
    scaling: Scaling = field(default_factory=Scaling)
    session: Optional[str] = None  # name of the session that a cell runs in
    timeout: Optional[float] = None  # seconds the call may run
    startup_timeout: Optional[float] = None  # seconds from a ready environment to a ready worker
    lease: float = 86400.0  # seconds the run may go on while no client of it is connected
    files: list[list[Any]] = field(default_factory=list)  # app files: [relative path, blob, mode] each
    import_path: str = ""  # folder among the files that modules are imported from as well
    folder: Optional[str] = None  # working directory on the host; None: the user's home, or the app files'
    client: str = ""  # "X.Y.Z" of the notebook's Python
    pydantic: str = ""  # version in the notebook, if it is loaded there
    scale_key: str = ""  # calls with the same key share `max_concurrency`; the function's qualified name
    fresh: bool = False  # cells: start the session anew
    reusable: bool = False  # the loaded function holds no state, so a worker may call it again as it is
    app: Optional[AppSpec] = None  # kind "app": how it is served
    environ: dict[str, str] = field(default_factory=dict, repr=False)  # secrets: neither written nor logged
    key: str = ""  # cells: "notebook:cell", by which a notebook that comes back finds its run
    inputs: dict[str, str] = field(default_factory=dict)  # cells with a key: versions of the names it reads


# ---------------------------------------------------------------- notebook -> agent


@dataclass(frozen=True)
class Hello:
    """First message on a connection: who is calling."""

    type: ClassVar[str] = "hello"
    client_id: str  # one per kernel, the same after a reconnect
    part_size: int = PART_SIZE  # bytes of the parts of blobs that the client wants to get
    shares_files: bool = False  # the client is on this machine and reads and writes blobs' files itself


@dataclass(frozen=True)
class Submit:
    """Run a call with arguments. Sent again with the same id, it never runs twice."""

    type: ClassVar[str] = "submit"
    run_id: str
    template: str  # the client's name for `call` on this connection
    arguments: Data  # "function": pickle of (args, kwargs); "map": of ([args, ...],); "cell": of a dict
    call: Optional[Call] = None  # left out when the agent knows the template
    function_data: Optional[Data] = None  # left out when the agent is known to have the function
    again: bool = False  # it may have been sent before
    attended: bool = False  # a thread waits for this very call, and would take a lane for those to come


@dataclass(frozen=True)
class Attach:
    """Show the events of a run after a number, and those to come; of an unknown run a `Failure` says so."""

    type: ClassVar[str] = "attach"
    run_id: str
    after: int = 0
    resumes: bool = False  # the connection that the run's events went to before has broken


@dataclass(frozen=True)
class BlobPart:
    """A piece of a blob, in one raw buffer; pieces of one blob come in order."""

    type: ClassVar[str] = "blob"
    blob: str  # its name: letters, digits, "-" and "_"
    offset: int
    size: int  # bytes of the whole blob


@dataclass(frozen=True)
class Ack:
    """The notebook has dealt with events of a run; sent on to the worker."""

    type: ClassVar[str] = "ack"
    run_id: str
    seq: int  # highest event number dealt with
    credit: int  # sum of their costs since the last acknowledgement, in bytes


@dataclass(frozen=True)
class Interrupt:
    """Raise KeyboardInterrupt in one call."""

    type: ClassVar[str] = "interrupt"
    run_id: str


@dataclass(frozen=True)
class Cancel:
    """Take a call out of the queue, or interrupt it."""

    type: ClassVar[str] = "cancel"
    run_id: str


@dataclass(frozen=True)
class Kill:
    """End the worker that runs a call."""

    type: ClassVar[str] = "kill"
    run_id: str


@dataclass(frozen=True)
class Reply:
    """The answer to a `Prompt`: a line of text in UTF-8, in one raw buffer. Neither journaled nor logged."""

    type: ClassVar[str] = "reply"
    run_id: str
    number: int  # the prompt's
    error: str = ""  # name of the exception that is raised instead; the text is its message then


@dataclass(frozen=True)
class Seen:
    """The outcome of a cell's run was shown, so that whoever runs the cell again wants it to run again."""

    type: ClassVar[str] = "seen"
    run_id: str


@dataclass(frozen=True)
class Ask:
    """A question about the host, answered by one `Answer`."""

    type: ClassVar[str] = "ask"
    request_id: str
    question: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ping:
    """Are you there? Answered at once."""

    type: ClassVar[str] = "ping"
    number: int = 0


# ---------------------------------------------------------------- agent -> notebook


@dataclass(frozen=True)
class Welcome:
    """The agent's answer to `Hello`."""

    type: ClassVar[str] = "welcome"
    pid: int
    python: str  # "X.Y.Z" of the agent
    root: str  # folder of everything the agent keeps


@dataclass(frozen=True)
class Need:
    """The agent lacks data that a submit refers to; the client sends the submit again, with it."""

    type: ClassVar[str] = "need"
    run_id: str
    names: list[str]  # of blobs, of the function (its digest) or of the template


@dataclass(frozen=True)
class Want:
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


@dataclass(frozen=True)
class Answer:
    """What an `Ask` brought."""

    type: ClassVar[str] = "answer"
    request_id: str
    content: Any = None
    error: Optional[str] = None


@dataclass(frozen=True)
class Pong:
    """I am here."""

    type: ClassVar[str] = "pong"
    number: int = 0


@dataclass(frozen=True)
class Lane:
    """A worker can be had for a while: brief calls may go straight to it (see `server/lanes.py`)."""

    type: ClassVar[str] = "lane"
    lane: str
    path: str  # of the Unix socket to dial
    templates: dict[str, str]  # the client's names of the calls that may go there -> the agent's names


@dataclass(frozen=True)
class LaneClosed:
    """A lane is no more; calls go through the agent again."""

    type: ClassVar[str] = "lane-closed"
    lane: str


# ---------------------------------------------------------------- events: worker -> agent -> notebook
# `seq` counts the events of one run from 1; the agent sets it. `sent_at` is in seconds since the
# Unix epoch, by the clock of the process that made the event.


@dataclass(frozen=True)
class Stage:
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


@dataclass(frozen=True)
class Log:
    """Printed text in UTF-8, in one raw buffer, in the order it was written; not always whole lines."""

    type: ClassVar[str] = "log"
    run_id: str
    stream: str  # "stdout" or "stderr"
    source: str = "user"  # "user", or "builder" for what uv says
    request: str = ""  # id of the request that an app was answering
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


@dataclass(frozen=True)
class Display:
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


@dataclass(frozen=True)
class Clear:
    """Clear the output of the run's cell."""

    type: ClassVar[str] = "clear"
    run_id: str
    wait: bool = False  # only when new output comes
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


@dataclass(frozen=True)
class Progress:
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


@dataclass(frozen=True)
class Item:
    """One item that a generator produced; `data` is its pickle."""

    type: ClassVar[str] = "item"
    run_id: str
    data: Data = field(default_factory=list)
    private: bool = False  # a secret is in it: it is sent on, and not journaled
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


@dataclass(frozen=True)
class Prompt:
    """The call waits for a line of text from the person, or to hear that there is none: see `Reply`."""

    type: ClassVar[str] = "prompt"
    run_id: str
    number: int  # counts the prompts of the run from 1
    text: str
    password: bool = False  # what is typed must not be seen
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


@dataclass(frozen=True)
class Comm:
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


@dataclass(frozen=True)
class Serving:
    """An app answers requests from now on."""

    type: ClassVar[str] = "serving"
    run_id: str
    seq: int = 0
    sent_at: float = 0.0
    cost: int = 0


@dataclass(frozen=True)
class Result:
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


@dataclass(frozen=True)
class Failure:
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


# ---------------------------------------------------------------- agent <-> worker


@dataclass(frozen=True)
class Ready:
    """A worker can take calls."""

    type: ClassVar[str] = "ready"
    pid: int
    python: str  # "X.Y.Z"


@dataclass(frozen=True)
class Serve:
    """How a worker serves an app."""

    path: str  # of the Unix socket
    app: AppSpec
    agent_secret: str = field(repr=False)  # with which the agent's own requests are told from others
    multiplexing: int = 1  # gateways: requests in flight in one runner


@dataclass(frozen=True)
class Activity:
    """How many requests a runner has in flight now."""

    type: ClassVar[str] = "activity"
    run_id: str
    in_flight: int


@dataclass(frozen=True)
class Runners:
    """To a gateway: the runners that are ready, with the name and the socket of each."""

    type: ClassVar[str] = "runners"
    run_id: str
    runners: list[list[str]]


@dataclass(frozen=True)
class Load:
    """From a gateway: how much there is to do."""

    type: ClassVar[str] = "load"
    run_id: str
    waiting: int  # requests that no runner has yet
    in_flight: int
    oldest: float  # seconds that the first of those that wait has waited
    runners: dict[str, int] = field(default_factory=dict)  # requests in flight by runner


@dataclass(frozen=True)
class Sick:
    """From a gateway: a runner answered 503, or broke its connection."""

    type: ClassVar[str] = "sick"
    run_id: str
    runner: str
    reason: str


@dataclass(frozen=True)
class Unwell:
    """A runner asks for a health check, or for being replaced: it answered 503."""

    type: ClassVar[str] = "unwell"
    run_id: str
    reason: str  # empty: only check it


@dataclass(frozen=True)
class Task:
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


@dataclass(frozen=True)
class Execute:
    """Run a call in this worker; `blobs` gives the file of each blob that its data names."""

    type: ClassVar[str] = "execute"
    run_id: str
    template: str  # the agent's name for `task`
    arguments: Data
    task: Optional[Task] = None  # left out when this worker knows the template
    function_data: Optional[Data] = None  # left out when this worker has the function
    blobs: dict[str, str] = field(default_factory=dict)  # name -> path


# ---------------------------------------------------------------- lanes: see `server/lanes.py`


@dataclass(frozen=True)
class Look:
    """To a worker: what do the names of a session say about a place in a cell? Answered by `Found`."""

    type: ClassVar[str] = "look"
    number: int
    session: str
    action: str  # "complete" or "inspect"
    code: str
    cursor: int  # characters of `code` before it
    detail: int = 0  # 1: sources too


@dataclass(frozen=True)
class Found:
    """From a worker: what a `Look` found; see `fal_agent.worker.looking`."""

    type: ClassVar[str] = "found"
    number: int
    content: Any = None  # None: nothing, or a call began meanwhile


@dataclass(frozen=True)
class Lend:
    """To a worker: listen on a socket for one notebook, and take its calls until it hangs up."""

    type: ClassVar[str] = "lend"
    lane: str
    path: str  # of the socket to listen on
    spool: str  # file that each call is written down in, as `Begun` and as its last event


@dataclass(frozen=True)
class Listening:
    """From a worker: the lane's socket can be dialled."""

    type: ClassVar[str] = "listening"
    lane: str


@dataclass(frozen=True)
class Lent:
    """From a worker: the notebook has dialled; other calls wait for the lane's end from now on."""

    type: ClassVar[str] = "lent"
    lane: str


@dataclass(frozen=True)
class Recall:
    """To a worker: end a lane."""

    type: ClassVar[str] = "recall"
    lane: str


@dataclass(frozen=True)
class Returned:
    """From a worker: the lane has ended; its calls have ended too, or were moved."""

    type: ClassVar[str] = "returned"
    lane: str


@dataclass(frozen=True)
class Adopt:
    """From a worker: a call that came through a lane goes on as if it had come from the agent."""

    type: ClassVar[str] = "adopt"
    run_id: str
    lane: str
    template: str  # the agent's name


@dataclass(frozen=True)
class Moved:
    """From a worker, through the lane: the call's events will come from the agent."""

    type: ClassVar[str] = "moved"
    run_id: str


@dataclass(frozen=True)
class Begun:
    """In a lane's spool: a call begins; its last event follows, unless it was moved."""

    type: ClassVar[str] = "begun"
    run_id: str
    template: str  # the agent's name
    at: float  # seconds since the Unix epoch


Event = Union[Stage, Log, Display, Clear, Progress, Prompt, Comm, Item, Serving, Result, Failure]
Message = Union[
    Hello, Submit, Attach, BlobPart, Ack, Interrupt, Cancel, Kill, Reply, Seen, Ask, Ping, Welcome, Need,
    Want, Answer, Pong, Stage, Log, Display, Clear, Progress, Prompt, Comm, Item, Result, Failure, Ready,
    Execute,
    Serving, Activity, Unwell, Runners, Load, Sick,
    Lane, LaneClosed, Lend, Lent, Listening, Recall, Returned, Adopt, Moved, Begun,
    Look, Found,
]  # fmt: skip

_TYPES: dict[str, type[Any]] = {cls.type: cls for cls in Message.__args__}  # type: ignore[attr-defined]
_NESTED: dict[type, dict[str, type[Any]]] = {
    Submit: {"call": Call},
    Call: {"environment": EnvironmentSpec, "resources": Resources, "scaling": Scaling, "app": AppSpec},
    AppSpec: {"health": HealthPolicy},
    Execute: {"task": Task},
    Task: {"serve": Serve},
    Serve: {"app": AppSpec},
}
_M = TypeVar("_M")


def encode(message: Message, buffers: Sequence[Buffer] = ()) -> bytes:
    """Make the frame of a message.

    Raises:
        ProtocolError: it would be larger than a frame may be.
    """
    return encode_frame(header(message), buffers)


def header(message: Message) -> dict[str, Any]:
    """Give a message as the JSON object of its frame."""
    return {"type": message.type, **_plain(message)}


def lasting(content: dict[str, Any], buffers: Sequence[Buffer]) -> tuple[dict[str, Any], Sequence[Buffer]]:
    """Give what may be written down of an event: its header and buffers, without the variables of frames."""
    if content.get("variables") is None:
        return content, buffers
    return {key: item for key, item in content.items() if key != "variables"}, buffers[:-1]


def decode(frame: Frame) -> Message:
    """Give the message of a frame; its buffers stay in the frame.

    Raises:
        ProtocolError: the type is unknown, or fields are missing, unknown or of another kind.
    """
    values = dict(frame.header)
    kind = values.pop("type", None)
    cls = _TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown message type {kind!r}")
    message: Message = _build(cls, values)
    return message


def _plain(value: Any) -> dict[str, Any]:
    """`value`'s fields as JSON types, those at their defaults left out; nested messages become objects."""
    defaults = _DEFAULTS[type(value)]
    plain: dict[str, Any] = {}
    for key, item in vars(value).items():
        if key in defaults and defaults[key] == item:
            continue
        plain[key] = _plain(item) if type(item) in _DEFAULTS else item
    return plain


def _defaults(cls: type) -> dict[str, Any]:
    """The fields of a message that may be left out, with what they then are."""
    given: dict[str, Any] = {}
    for item in fields(cls):
        if item.default is not MISSING:
            given[item.name] = item.default
        elif item.default_factory is not MISSING:
            given[item.name] = item.default_factory()
    return given


def _build(cls: type[_M], values: dict[str, Any]) -> _M:
    for name, nested in _NESTED.get(cls, {}).items():
        if isinstance(values.get(name), dict):
            values[name] = _build(nested, dict(values[name]))
    shapes = _SHAPES[cls]
    for name, value in values.items():
        kinds, inner = shapes.get(name, _NOTHING)
        if type(value) not in kinds or (inner is not None and not _hold(value, inner)):
            shown = "..." if name in _UNSHOWN else f"{value!r:.80}"
            raise ProtocolError(f"{cls.__name__} cannot have {name}={shown}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ProtocolError(f"{cls.__name__}: {error}") from None


class _Shape(NamedTuple):
    """What JSON may give for a field: exact types, and the shape of what lies in a list or an object."""

    kinds: frozenset[type]
    inner: Optional[_Shape] = None


def _hold(value: Any, inner: _Shape) -> bool:
    """Whether all that lies in a list or an object has a shape; None holds nothing."""
    items = value.values() if type(value) is dict else value or ()
    deeper = inner.inner
    return all(type(item) in inner.kinds and (deeper is None or _hold(item, deeper)) for item in items)


def _shape(annotation: str) -> _Shape:
    head, _, inner = annotation.partition("[")
    if head == "Optional":
        shape = _shape(inner[:-1])
        return _Shape(shape.kinds | {type(None)}, shape.inner)
    if head == "list":
        return _Shape(frozenset([list]), _shape(inner[:-1]))
    if head == "dict":
        return _Shape(frozenset([dict]), _shape(inner[:-1].partition(", ")[2]))
    return _JSON_SHAPES.get(head) or _Shape(frozenset([globals()[head]]))


_NOTHING = _Shape(frozenset())
_UNSHOWN = ("environ", "agent_secret")  # what is in no message, not even when it is wrong
_JSON_SHAPES: dict[str, _Shape] = {
    "str": _Shape(frozenset([str])),
    "int": _Shape(frozenset([int])),
    "float": _Shape(frozenset([int, float])),
    "bool": _Shape(frozenset([bool])),
    "Any": _Shape(frozenset([str, int, float, bool, list, dict, type(None)])),
    "Data": _Shape(frozenset([list]), _Shape(frozenset([int, str]))),
}
_NESTED_ONLY = (Call, EnvironmentSpec, Resources, Scaling, AppSpec, HealthPolicy, Task, Serve)
_SHAPES: dict[type, dict[str, _Shape]] = {
    cls: {item.name: _shape(str(item.type)) for item in fields(cls)}
    for cls in [*_TYPES.values(), *_NESTED_ONLY]
}
_DEFAULTS: dict[type, dict[str, Any]] = {cls: _defaults(cls) for cls in _SHAPES}
