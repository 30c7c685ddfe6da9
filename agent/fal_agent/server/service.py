"""What the agent does with each message of a notebook.

Runs in the agent, on its event loop. It never opens the data of a call; it checks what a call asks
for, sees to its environment and files, hands it to the pool, and answers questions about the host.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import EnvironmentBuildError, FalServerlessException, RequirementError, ResourceError
from fal_agent.framing import FrameDecoder
from fal_agent.server.appfiles import lay_out_files
from fal_agent.server.apps import Apps
from fal_agent.server.functions import FunctionStore, extract
from fal_agent.server.lanes import Lanes
from fal_agent.server.prepared import Preparation, Prepared
from fal_agent.server.proc import is_alive
from fal_agent.server.runs import FINISHED, Run
from fal_agent.server.supplies import Supplies
from fal_agent.wire import (
    Ack,
    Arrived,
    Ask,
    Attach,
    BlobPart,
    Call,
    Cancel,
    Failure,
    Hello,
    Interrupt,
    Kill,
    Message,
    Need,
    Ping,
    Pong,
    Reply,
    Result,
    Seen,
    Submit,
    Welcome,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fal_agent.server.blobs import BlobStore
    from fal_agent.server.environments.cache import Environment, EnvironmentCache
    from fal_agent.server.journal import Journal
    from fal_agent.server.lanes import LentLane
    from fal_agent.server.pool import Pool
    from fal_agent.server.questions import Questions
    from fal_agent.server.rpc import Connection

__all__ = ["Service"]

_log = logging.getLogger(__name__)
_BUILDERS = 4  # environments that may be built at the same time
_KEPT_TEMPLATES = 2048  # of one connection; a client is asked to say a forgotten one again
_OUTCOMES = (Result.type, Failure.type)
_SILENCE_LIMIT = 12.0  # seconds; notebooks that are far away say something every 3
_KEPT_RUNS = 500  # finished runs that are remembered besides the journal


class Service:
    """The agent's behaviour.

    Args:
        root: folder of everything it keeps.
        python: its own version, "X.Y.Z".
        pid: its process.
        journal, blobs, functions, environments, pool: its parts.
        questions: answers what a notebook asks about the host.
        socket_folder: where the sockets of lanes and apps lie.
    """

    def __init__(
        self,
        *,
        root: Path,
        python: str,
        pid: int,
        journal: Journal,
        blobs: BlobStore,
        functions: FunctionStore,
        environments: EnvironmentCache,
        pool: Pool,
        questions: Questions,
        socket_folder: Path,
        match: Callable[[Any], Any],
    ) -> None:
        self._root = root
        self._welcome = Welcome(pid=pid, python=python, root=str(root))
        self._journal, self._blobs, self._functions = journal, blobs, functions
        self._environments, self._pool, self._questions, self._match = environments, pool, questions, match
        self.lanes = Lanes(
            socket_folder, journal, adopt=self._adopt, submit=self._submit, returned=pool.worker_ready
        )
        self.supplies = Supplies(root, blobs)
        self.apps = Apps(socket_folder, pool=pool, functions=functions)
        self._builders = ThreadPoolExecutor(_BUILDERS, thread_name_prefix="fal-build")
        self._leases: dict[str, asyncio.TimerHandle] = {}
        self._refusals: dict[str, str] = {}  # blobs that could not be kept, and why
        self._finished: deque[str] = deque()
        self._handlers: dict[type, Callable[[Connection, Any, list[bytes]], None]] = {
            Hello: self._hello,
            Submit: self._submit,
            Arrived: self._skip,
            Attach: self._show,
            BlobPart: self._blob_part,
            Ack: self._ack,
            Interrupt: self._interrupt,
            Cancel: self._cancel,
            Kill: self._kill,
            Reply: self._reply,
            Seen: self._seen,
            Ask: self._ask,
            Ping: self._ping,
        }
        self.connections: list[Connection] = []
        self.runs: dict[str, Run] = {}

    # ------------------------------------------------------------ connections

    def handle(self, connection: Connection, message: Message, buffers: list[bytes]) -> None:
        """Act on a message; one that makes no sense here ends the connection."""
        handler = self._handlers.get(type(message))
        if handler is None or (not connection.client_id and not isinstance(message, (Hello, Ping))):
            _log.warning("closing a connection that sent %s out of turn", type(message).__name__)
            connection.close()
            return
        handler(connection, message, buffers)

    def lost(self, connection: Connection) -> None:
        """A notebook went away: its runs go on for their leases."""
        if connection not in self.connections:
            return
        self.connections.remove(connection)
        self._blobs.abandon(connection.writer)
        self.lanes.lost(connection)
        for run in self.active_runs():
            was_attended = run.connection is not None
            run.leave(connection)
            if was_attended and run.connection is None:
                self._begin_lease(run)

    def is_connected(self, client_id: str) -> bool:
        """Whether a notebook with this id is connected."""
        return any(connection.client_id == client_id for connection in self.connections)

    def is_watching(self, client_id: str) -> bool:
        """Whether a notebook is connected and has been heard of lately: one that has vanished is silent."""
        return any(
            connection.client_id == client_id and connection.silence < _SILENCE_LIMIT
            for connection in self.connections
        )

    def active_runs(self) -> list[Run]:
        """Runs that have not ended."""
        return [run for run in self.runs.values() if not run.is_finished]

    def _hello(self, connection: Connection, message: Hello, _buffers: list[bytes]) -> None:
        connection.client_id = message.client_id
        connection.part_size = max(1024, message.part_size)
        connection.shares_files = message.shares_files
        self.connections.append(connection)
        connection.send(self._welcome)

    def _ping(self, connection: Connection, message: Ping, _buffers: list[bytes]) -> None:
        connection.send(Pong(message.number))

    def _ask(self, connection: Connection, message: Ask, _buffers: list[bytes]) -> None:
        self._questions.answer(connection, message)

    def _blob_part(self, connection: Connection, message: BlobPart, buffers: list[bytes]) -> None:
        data = buffers[0] if buffers else b""
        try:
            self._blobs.write(message.blob, message.offset, message.size, data, writer=connection.writer)
        except (OSError, ResourceError) as error:
            # The submit that names the blob will find it missing, and say why.
            _log.warning("blob %s cannot be kept: %s", message.blob, error)
            self._refusals[message.blob] = f"data of {message.size} bytes cannot be kept on the host: {error}"

    # ------------------------------------------------------------ calls

    def _submit(self, connection: Connection, message: Submit, buffers: list[bytes]) -> None:
        known = self.runs.get(message.run_id)
        if known is not None:
            self._attach(known, connection, resumes=True)
            return
        if message.again and self.lanes.hold(connection, message, buffers):
            return
        prepared = self._template(connection, message)
        if prepared is None:
            connection.send(Need(message.run_id, [message.template]))
            return
        digest = prepared.call.function
        if digest is not None and message.function_data is not None:
            self._functions.put(digest, message.function_data, buffers)
        arguments, own = extract(message.arguments, buffers)
        run = Run(
            message.run_id,
            prepared=prepared,
            arguments=arguments,
            buffers=own,
            client_id=connection.client_id,
            connection=connection,
            journal=self._journal if prepared.call.kind != "comm" else None,
            attended=message.attended,
        )
        missing = [name for name in run.blobs if not self._blobs.has(name)]
        if digest is not None and digest not in self._functions:
            missing.append(digest)
        refused = [self._refusals.pop(name) for name in missing if name in self._refusals]
        if missing and not refused:
            connection.send(Need(message.run_id, missing))
            return
        if prepared.call.kind != "comm" and not self._journal.add_run(
            message.run_id,
            client_id=run.client_id,
            label=prepared.call.label,
            kind=prepared.call.kind,
            environment=prepared.environment_text,
            again=message.again,
        ):
            self._replay(message.run_id, connection)
            return
        self.runs[run.run_id] = run
        run.on_finish.append(self._run_finished)
        if prepared.call.key:
            call = prepared.call
            self._journal.add_cell(
                run.run_id, key=call.key, session=call.session or "", inputs=json.dumps(call.inputs)
            )
        if prepared.call.app is not None:
            self.apps.announce(run)
        if refused:
            run.fail("resources", refused[0])
        elif prepared.is_ready:
            self._ready(run)
        else:
            self._prepare(run)

    def _template(self, connection: Connection, message: Submit) -> Optional[Prepared]:
        """What the client's name for a call stands for; None if it must be said again."""
        templates = connection.templates
        if message.call is not None:
            templates[message.template] = Prepared(message.call)
            if len(templates) > _KEPT_TEMPLATES:
                templates.popitem(last=False)
        return templates.get(message.template)

    def _adopt(self, lane: LentLane, run_id: str, prepared: Prepared) -> Run:
        """Make a run of a call that came through a lane and goes on."""
        connection = lane.connection if lane.connection.is_open else None
        run = Run(
            run_id,
            prepared=prepared,
            arguments=[],
            buffers=[],
            client_id=lane.connection.client_id,
            connection=connection,
            journal=self._journal,
        )
        self.runs[run_id] = run
        run.on_finish.append(self._run_finished)
        self._pool.adopt(lane.worker, run)
        if connection is None:
            run.detach()
            self._begin_lease(run)
        return run

    def _attach(self, run: Run, connection: Connection, after: int = 0, *, resumes: bool) -> None:
        """Show a run's events after a number, and those to come."""
        lease = self._leases.pop(run.run_id, None)
        if lease is not None:
            lease.cancel()
        self._replay(run.run_id, connection, after)
        if not run.is_finished:
            run.attach(connection, resumes=resumes)

    def _show(self, connection: Connection, message: Attach, _buffers: list[bytes]) -> None:
        run = self.runs.get(message.run_id)
        if run is None:
            self.lanes.take_all()  # it may have been in one
            self._replay(message.run_id, connection, message.after)
        else:
            self._attach(run, connection, message.after, resumes=message.resumes)

    def _skip(self, connection: Connection, message: Arrived, _buffers: list[bytes]) -> None:
        connection.arrived.update(message.blobs)

    def _replay(self, run_id: str, connection: Connection, after: int = 0) -> None:
        """Send what the journal has of a run; a run that nobody here has the end of is said to be so."""
        self._journal.flush()
        if run_id not in self.runs:
            self._journal.mark_lost()  # the agent that had it may be gone: one of other sources, beside us
        seq, kind = after, ""
        for data in self._journal.events(run_id, after):
            (frame,) = FrameDecoder().feed(data)
            seq = frame.header["seq"]
            blobs = [ref for ref in frame.header.get("data", ()) if isinstance(ref, str)]
            if not all(map(self._blobs.has, blobs)):
                text = (
                    "its result is not kept any more: the host was started anew since, or ran short of space"
                )
                connection.send(Failure(run_id, "lost", text, seq=seq, sent_at=time.time()))
                return
            connection.deliver(run_id, data, blobs)
            kind = frame.header["type"]
        if kind in _OUTCOMES:
            return
        run, record = self.runs.get(run_id), self._journal.run(run_id)
        if run is None and record is None:
            problem = ("unknown", f"there is no run {run_id!r}; %fal runs lists those that are known")
        elif (run is not None and run.is_finished) or (record is not None and record.state in FINISHED):
            problem = ("lost", "its end could not be recorded: the host's disk was full for too long")
        elif run is None and record is not None:
            if is_alive(record.agent):
                text = "another version of the agent has it, which notebooks of that version can ask"
                problem = ("unknown", text)
            else:  # which the journal cannot be told now
                text = f"{record.label}: the agent that ran it ended before the run did; run it again"
                problem = ("lost", text)
        else:
            return
        connection.send(Failure(run_id, *problem, seq=seq + 1, sent_at=time.time()))

    def _prepare(self, run: Run) -> None:
        """Find what calls like this run need, and build what is not there yet; once for all that wait."""
        prepared = run.prepared
        if prepared.preparation is not None:
            prepared.preparation.runs.append(run)
            return
        try:
            prepared.match = self._match(run.call.resources)
        except ResourceError as error:
            run.fail("resources", str(error), resources=asdict(run.call.resources))
            return
        preparation = prepared.preparation = Preparation([run])
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._builders, self._build, prepared.call, preparation, loop)
        future.add_done_callback(lambda done: self._built(prepared, preparation, done))

    def _build(
        self, call: Call, preparation: Preparation, loop: asyncio.AbstractEventLoop
    ) -> tuple[Environment, Optional[str]]:
        """Find or build the environment and lay out app files; runs in a thread."""
        environment = None if call.environment.force else self._environments.find(call.environment)
        if environment is None:
            environment = self._environments.build(
                call.environment,
                stage=_on_loop(loop, preparation.stage),
                log=_on_loop(loop, preparation.log),
                cancelled=preparation.cancelled,
                supply=self.supplies.asker(preparation, loop),
            )
        self._environments.touch(environment)
        if not call.files:
            return environment, call.folder
        return environment, str(lay_out_files(self._root / "files", call.files, self._blobs.path))

    def _built(
        self,
        prepared: Prepared,
        preparation: Preparation,
        done: asyncio.Future[tuple[Environment, Optional[str]]],
    ) -> None:
        if prepared.preparation is preparation:
            prepared.preparation = None
        error = done.exception()
        if error is None:
            prepared.found(*done.result())
        for run in preparation.runs:
            if run.is_finished:
                continue
            if error is None:
                self._ready(run)
            else:
                _fail_to_prepare(run, error)

    def _ready(self, run: Run) -> None:
        if run.call.fresh and run.call.session is not None:
            self._pool.end_session(run.call.session)
        if run.call.app is not None:
            self.apps.spawn(run)
        else:
            self._pool.enqueue(run)

    def _run_finished(self, run: Run) -> None:
        lease = self._leases.pop(run.run_id, None)
        if lease is not None:
            lease.cancel()
        self._finished.append(run.run_id)
        if len(self._finished) > _KEPT_RUNS:
            del self.runs[self._finished.popleft()]

    # ------------------------------------------------------------ calls in progress

    def _ack(self, _connection: Connection, message: Ack, _buffers: list[bytes]) -> None:
        run = self.runs.get(message.run_id)
        if run is not None and run.worker is not None and not run.is_finished:
            run.worker.send(message)

    def _interrupt(self, connection: Connection, message: Interrupt, _buffers: list[bytes]) -> None:
        run = self.runs.get(message.run_id)
        if run is None:
            self.lanes.interrupt(connection, message.run_id)
        elif run.is_finished:
            return
        elif (app := self.apps.of_run(run.run_id)) is not None:
            app.stop()
        elif run.worker is not None:
            run.worker.interrupt(run)
        else:
            self._withdraw(run, Failure(run.run_id, "interrupted", "KeyboardInterrupt", sent_at=time.time()))

    def _cancel(self, _connection: Connection, message: Cancel, _buffers: list[bytes]) -> None:
        run = self.runs.get(message.run_id)
        if run is not None and not run.is_finished:
            self._stop(run, "cancelled", f"{run.call.label} was cancelled")

    def _kill(self, connection: Connection, message: Kill, _buffers: list[bytes]) -> None:
        def killed(label: str) -> Failure:
            text = f"{label} was killed, and its worker with it"
            return Failure(message.run_id, "cancelled", text, sent_at=time.time())

        run = self.runs.get(message.run_id)
        if run is None:
            self.lanes.kill(connection, message.run_id, killed)
            return
        if run.is_finished:
            return
        failure = killed(run.call.label)
        app = self.apps.of_run(run.run_id)
        if app is not None:
            app.kill()
        elif run.worker is not None:
            run.worker.kill_run(run, failure)
        else:
            self._withdraw(run, failure)

    def _reply(self, _connection: Connection, message: Reply, buffers: list[bytes]) -> None:
        run = self.runs.get(message.run_id)
        if run is not None and run.worker is not None and not run.is_finished:
            run.worker.send(message, buffers)

    def _seen(self, _connection: Connection, message: Seen, _buffers: list[bytes]) -> None:
        self._journal.set_seen(message.run_id)

    def _begin_lease(self, run: Run) -> None:
        if self.apps.of_run(run.run_id) is not None:  # it goes on, and looks at its lease itself
            return
        seconds = max(0.0, run.call.lease)
        message = f"the lease of {seconds:g} s ended with no notebook connected"
        self._leases[run.run_id] = asyncio.get_running_loop().call_later(
            seconds, self._stop, run, "lease", message
        )

    def _stop(self, run: Run, kind: str, message: str) -> None:
        failure = Failure(run.run_id, kind, message, sent_at=time.time())
        app = self.apps.of_run(run.run_id)
        if app is not None:
            app.stop()
        elif run.worker is not None:
            run.worker.end_run(run, failure)
        else:
            self._withdraw(run, failure)

    def _withdraw(self, run: Run, failure: Failure) -> None:
        """End a run that no worker has."""
        preparation = run.prepared.preparation
        if preparation is not None and run in preparation.runs:
            preparation.runs.remove(run)
            if not preparation.runs:
                preparation.cancelled.set()
                run.prepared.preparation = None
        self._pool.forget(run)
        run.emit(failure)


def _fail_to_prepare(run: Run, error: BaseException) -> None:
    """Tell a run why what it needs is not there."""
    if isinstance(error, EnvironmentBuildError):
        run.fail("environment", str(error), log=error.log)
    elif isinstance(error, RequirementError):
        run.fail("requirement", str(error))
    elif isinstance(error, (OSError, FalServerlessException)):
        run.fail("environment", f"the environment could not be built: {error}")
    else:
        _log.error("a build failed", exc_info=error)
        run.fail("agent", f"the agent failed while building the environment: {error!r}; see its log")


def _on_loop(loop: asyncio.AbstractEventLoop, tell: Callable[..., None]) -> Callable[..., None]:
    """Let a thread call something that belongs to the event loop."""

    def call(*arguments: str) -> None:
        loop.call_soon_threadsafe(tell, *arguments)

    return call
