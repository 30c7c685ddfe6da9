"""What a call asks for: its function, environment, resources and, if it is an app, how it is served.

Runs everywhere. Everything about a call that stays the same from call to call.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Optional, Union

from fal_agent.messages.record import Record

__all__ = ["AppSpec", "Call", "Data", "EnvironmentSpec", "HealthPolicy", "Resources", "Scaling"]

Data = list[Union[int, str]]


class EnvironmentSpec(Record):
    """What a virtual environment is asked to hold."""

    python: str  # "X.Y", the notebook's minor version unless said otherwise
    layers: list[list[str]]  # install steps of PEP 508 lines; a later step may overrule an earlier one
    compile_bytecode: bool = False
    force: bool = False  # resolve and build anew even if it is known


class Resources(Record):
    """What a call asks of the machine; the alternatives are tried in order."""

    machine_types: list[str] = field(default_factory=lambda: ["XS"])
    num_gpus: Optional[int] = None  # None: 1 for a GPU type, else 0
    regions: Optional[list[str]] = None  # labels, one of which the host must carry


class Scaling(Record):
    """How many workers serve one function, and for how long."""

    keep_alive: float = 10.0  # seconds that an idle worker lives
    min_concurrency: int = 0
    max_concurrency: Optional[int] = None  # workers
    concurrency_buffer: int = 0
    concurrency_buffer_perc: int = 0
    scaling_delay: float = 0.0  # seconds that a call waits before one more worker is started
    max_multiplexing: int = 1  # calls at once in one worker


class HealthPolicy(Record):
    """How the agent finds out whether a runner of an app is well."""

    path: str = ""  # what is asked; empty: GET /health, or whether the function's own server listens
    method: str = "POST"  # how it is asked
    start_period: float = 30.0  # seconds after the start of serving in which failures do not count
    timeout: float = 5.0  # seconds that an answer may take
    threshold: int = 3  # failures in a row that make a runner sick
    regularly: bool = True  # every 15 seconds; else only when asked for, and then the first failure counts


class AppSpec(Record):
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


class Call(Record):
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
