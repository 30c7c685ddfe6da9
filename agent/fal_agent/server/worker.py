"""One worker as the agent sees it: the runs it has, what it knows, and how it ends.

Runs in the agent, on its event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.server.parts import Part
from fal_agent.server.process import WorkerProcess, describe_exit, oom_kills
from fal_agent.wire import (
    Activity,
    Adopt,
    Clear,
    Comm,
    Display,
    Execute,
    Failure,
    Found,
    Interrupt,
    Item,
    Lent,
    Listening,
    Load,
    Log,
    Look,
    Message,
    Progress,
    Prompt,
    Ready,
    Result,
    Returned,
    Serving,
    Sick,
    Unwell,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.server.blobs import BlobStore
    from fal_agent.server.functions import FunctionStore
    from fal_agent.server.lanes import LentLane
    from fal_agent.server.prepared import Prepared, WorkerKey
    from fal_agent.server.runs import Run

__all__ = ["Worker"]

_log = logging.getLogger(__name__)
_INTERRUPT_GRACE = 5.0  # seconds that a call whose time is over has to react to its interrupt
_END_GRACE = 2.0  # seconds between asking a worker to end and making it
_LOOK_SECONDS = 2.0  # that the names of a session may take to tell about a cell
_numbers = itertools.count(1)
_SHARING = ("function", "map")  # kinds of calls of which several may run in one worker
_EVENTS = (Log, Display, Clear, Progress, Prompt, Comm, Item, Serving, Result, Failure)


class Worker:
    """A worker process and its runs.

    Args:
        key: what kind of worker it is.
        functions: data of functions by digest.
        blobs: the host's blobs.
        on_ready: called when the process can take runs.
        on_release: called when a run has left this worker.
        on_gone: called when the process has ended.
        on_lane: called with what the process says about its lane.
        on_lane_lost: called when the process has ended while it was lent.

    Attributes:
        runs: in progress, by id.
        sessions: that live here, with the client of each.
        devices: GPUs lent to it; None when it asked for none.
        keep_alive: seconds it may be idle.
        lane: to the notebook that it is lent to; None while it is not.
        offer: a lane that a notebook may dial; the same as `lane` once it has.
        keep_at_least: workers of this kind that `min_concurrency` keeps for the client `kept_for`.
    """

    def __init__(
        self,
        key: WorkerKey,
        *,
        functions: FunctionStore,
        blobs: BlobStore,
        on_ready: Callable[[Worker], None],
        on_release: Callable[[Worker, Run], None],
        on_gone: Callable[[Worker], None],
        on_lane: Callable[[Worker, Message], None],
        on_lane_lost: Callable[[Worker], None],
    ) -> None:
        self.key = key
        self._functions, self._blobs = functions, blobs
        self._on_ready, self._on_release, self._on_gone = on_ready, on_release, on_gone
        self._on_lane, self._on_lane_lost = on_lane, on_lane_lost
        self.process: Optional[WorkerProcess] = None
        self.runs: dict[str, Run] = {}
        self.sessions: dict[str, str] = {}
        self.devices: Optional[list[int]] = None
        self.keep_alive = 0.0
        self.keep_at_least = 0
        self.kept_for = ""
        self.idle_since = time.monotonic()
        self.is_ready = False
        self.is_ending = False
        self.start_problem = ""
        self.lane: Optional[LentLane] = None
        self.offer: Optional[LentLane] = None
        self.exit_status: Optional[int] = None
        self._python = ""
        self._known: set[str] = set()
        self._looks: dict[int, asyncio.Future[Any]] = {}
        self._oom_kills = oom_kills()
        self._startup_timer: Optional[asyncio.TimerHandle] = None

    @property
    def pid(self) -> int:
        """Of the process; 0 before it runs."""
        return self.process.pid if self.process is not None else 0

    @property
    def is_busy(self) -> bool:
        """Whether calls run here that others must make room for: cells and apps stand in nobody's way."""
        return any(run.call.kind not in ("cell", "comm", "app", "gateway") for run in self.runs.values())

    @property
    def is_idle(self) -> bool:
        """Whether it neither runs anything nor is lent."""
        return not self.runs and self.lane is None

    def knows(self, prepared: Prepared) -> bool:
        """Whether the process has a template and its function."""
        return {prepared.name, prepared.call.function or prepared.name} <= self._known

    def adopt(self, run: Run) -> None:
        """Take a run that the process has begun already."""
        run.worker = self
        self.runs[run.run_id] = run
        run.state = "running"

    def accepts(self, run: Run) -> bool:
        """Whether the run could begin here at once."""
        if not self.is_ready or self.is_ending or self.lane is not None:
            return False
        if not self.runs:
            return True
        room = run.call.scaling.max_multiplexing
        return (
            run.call.kind in _SHARING
            and len(self.runs) < room
            and all(
                other.call.kind in _SHARING and other.call.scaling.max_multiplexing > 1
                for other in self.runs.values()
            )
        )

    def execute(self, run: Run) -> None:
        """Let a run begin."""
        prepared, digest = run.prepared, run.call.function
        mismatch = _version_mismatch(run.call.client, self._python)
        if mismatch:
            run.fail("python", mismatch)
            self._on_release(self, run)
            return
        function_data, buffers = None, run.buffers
        if digest is not None and digest not in self._known:
            if digest not in self._functions:
                run.fail("agent", f"{run.call.label} waited so long that its code was let go; call it again")
                self._on_release(self, run)
                return
            function_data, function_buffers = self._functions.data(digest, offset=len(buffers))
            buffers = buffers + function_buffers
            self._known.add(digest)
        task, template = None, prepared.name if run.serve is None else run.run_id
        if template not in self._known:
            task = prepared.task(str(self._blobs.outbox(str(self.pid))), run.serve)
            self._known.add(template)
        self._adopt_settings(run)
        run.worker = self
        self.runs[run.run_id] = run
        run.state = "running"
        names = [ref for ref in (*run.arguments, *(function_data or ())) if isinstance(ref, str)]
        request = Execute(
            run_id=run.run_id,
            template=template,
            arguments=run.arguments,
            task=task,
            function_data=function_data,
            blobs={name: str(self._blobs.path(name)) for name in names},
        )
        self.send(request, buffers)
        run.tell_running()
        run.buffers = []
        if run.call.timeout is not None:
            loop = asyncio.get_running_loop()
            run.timers["timeout"] = loop.call_later(run.call.timeout, self._time_out, run)

    def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message to the process."""
        if self.process is not None:
            self.process.send(message, buffers)

    async def look(self, session: str, question: dict[str, Any]) -> Any:
        """Ask the names of a session about a place in a cell; None at once while anything runs here."""
        if self.runs or not self.is_ready:
            return None
        number = next(_numbers)
        answer = self._looks[number] = asyncio.get_running_loop().create_future()
        self.send(Look(number, session, **question))
        try:
            return await asyncio.wait_for(answer, _LOOK_SECONDS)
        except asyncio.TimeoutError:
            return None
        finally:
            self._looks.pop(number, None)

    # ------------------------------------------------------------ ends

    def interrupt(self, run: Run) -> None:
        """Raise KeyboardInterrupt in one of the runs."""
        self.send(Interrupt(run.run_id))

    def end_run(self, run: Run, failure: Failure) -> None:
        """Interrupt a run, and kill the worker if it does not react; it is reported as `failure`."""
        run.ended_by = failure
        self.interrupt(run)
        loop = asyncio.get_running_loop()
        run.timers["grace"] = loop.call_later(_INTERRUPT_GRACE, self.end, 0.0)

    def kill_run(self, run: Run, failure: Failure) -> None:
        """End the worker because of a run, which is reported as `failure`."""
        run.ended_by = failure
        self.end(0.0)

    def end(self, grace: float = _END_GRACE) -> None:
        """Make the process end; what it runs is reported as lost."""
        self.is_ending = True
        if self.process is not None and self.process.pid:
            self.process.end(grace)

    def watch_startup(self, timeout: float) -> None:
        """End the process if it does not report within `timeout` seconds."""
        self._startup_timer = asyncio.get_running_loop().call_later(timeout, self._startup_expired, timeout)

    def startup_failure(self) -> str:
        """Say why the process never became ready."""
        words = self.process.last_words() if self.process is not None else ""
        problem = self.start_problem or f"the worker {describe_exit(self.exit_status)} before it was ready"
        return f"{problem}{chr(10) + words if words else ''}"

    # ------------------------------------------------------------ what the process says

    def on_message(self, message: Message, buffers: list[bytes]) -> None:
        """Take a message of the process."""
        if isinstance(message, Ready):
            self._python, self.is_ready = message.python, True
            self.idle_since = time.monotonic()
            if self._startup_timer is not None:
                self._startup_timer.cancel()
            self._on_ready(self)
        elif isinstance(message, _EVENTS):
            run = self.runs.get(message.run_id)
            if run is not None:
                self._pass_on(run, message, buffers)
        elif isinstance(message, (Activity, Unwell, Load, Sick)):
            run = self.runs.get(message.run_id)
            if isinstance(run, Part):
                run.on_message(message)
        elif isinstance(message, Found):
            answer = self._looks.pop(message.number, None)
            if answer is not None and not answer.done():
                answer.set_result(message.content)
        elif isinstance(message, (Listening, Lent, Adopt, Returned)):
            self._on_lane(self, message)

    def on_exit(self, status: Optional[int]) -> None:
        """The process has ended."""
        self.exit_status, self.is_ending = status, True
        if self._startup_timer is not None:
            self._startup_timer.cancel()
        self._on_lane_lost(self)
        for run in list(self.runs.values()):
            if run.ended_by is not None:
                run.emit(run.ended_by)
            else:
                run.fail("lost", self._obituary(status), exit_status=status, log=self.process_log())
        if self.pid:
            self._blobs.clear_outbox(str(self.pid))
        self._on_gone(self)

    def process_log(self) -> str:
        """The end of the worker's own log."""
        return self.process.last_words() if self.process is not None else ""

    def _pass_on(self, run: Run, event: Message, buffers: list[bytes]) -> None:
        data = getattr(event, "data", ())
        if any(isinstance(ref, str) for ref in data):
            outbox = self._blobs.outbox(str(self.pid))
            refs = [
                self._blobs.adopt(outbox / Path(ref).name) if isinstance(ref, str) else ref for ref in data
            ]
            event = dataclasses.replace(event, data=refs)  # type: ignore[arg-type] # it has data
        if isinstance(event, Failure) and event.kind == "agent":
            self._known.discard(run.call.function or "")  # it may have let go of the function: send it again
        if isinstance(event, Failure) and run.ended_by is not None:
            event, buffers = run.ended_by, []
        run.emit(event, buffers)  # type: ignore[arg-type]
        if isinstance(event, (Result, Failure)):
            self._on_release(self, run)

    def _adopt_settings(self, run: Run) -> None:
        scaling = run.call.scaling
        self.keep_alive = scaling.keep_alive
        if run.call.session is not None:
            self.sessions[run.call.session] = run.client_id
        if scaling.min_concurrency:
            self.keep_at_least, self.kept_for = scaling.min_concurrency, run.client_id

    def _time_out(self, run: Run) -> None:
        seconds = run.call.timeout or 0.0
        message = f"{run.call.label} ran longer than its timeout of {seconds:g} s and was stopped"
        self.end_run(
            run, Failure(run.run_id, "timeout", message, detail={"seconds": seconds}, sent_at=time.time())
        )

    def _startup_expired(self, timeout: float) -> None:
        self.start_problem = f"the worker was not ready after {timeout:g} s (startup_timeout)"
        self.end(0.0)

    def _obituary(self, status: Optional[int]) -> str:
        text = f"the worker process {describe_exit(status)}"
        if status == -signal.SIGKILL:
            known = "the machine ran out of memory" if oom_kills() > self._oom_kills else (
                "most likely the machine ran out of memory"
            )  # fmt: skip
            peak = self.process.peak_bytes / 1e9 if self.process is not None else 0.0
            return f"{text}: {known}; it held up to {peak:.2f} GB. Use less memory, or a bigger machine_type"
        if status == -signal.SIGSEGV:
            return f"{text}: C code in one of the packages crashed"
        return f"{text} while the call ran"


def _version_mismatch(client: str, worker: str) -> str:
    """Say that two Pythons cannot exchange code, if so; empty when they can."""
    ours, theirs = client.split(".")[:2], worker.split(".")[:2]
    if not client or ours == theirs:
        return ""
    return (
        f"the notebook runs Python {'.'.join(ours)} and the environment Python {'.'.join(theirs)}; "
        f"code travels only between equal minor versions. Leave python_version out, or start the "
        f"notebook with Python {'.'.join(theirs)}"
    )
