"""Lend a warm worker to a notebook that makes one brief call after the other.

Runs in the agent, on its event loop. A lane leads from a notebook straight to a worker: a call is then
one round trip between two processes, and the agent learns of it from the lane's spool. Only brief,
silent calls with small results stay in a lane; the worker moves every other one to the agent, which
adopts it, so that whatever the agent does for runs it does for those too.

A lane is offered first. From the moment the notebook dials it, in the thread that makes the calls, the
worker takes no other runs; whoever needs it has it recalled, which takes about as long as one message
there and back.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import TYPE_CHECKING, Optional

from fal_agent.server.spool import Spool
from fal_agent.wire import Adopt, Begun, Interrupt, Lane, LaneClosed, Lend, Lent, Listening, Recall, Returned

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fal_agent.server.journal import Journal
    from fal_agent.server.prepared import Prepared
    from fal_agent.server.rpc import Connection
    from fal_agent.server.runs import Run
    from fal_agent.server.worker import Worker
    from fal_agent.wire import Failure, Message, Submit

__all__ = ["Lanes", "LentLane"]

_log = logging.getLogger(__name__)
_BRIEF = 0.02  # seconds; a call that took longer here makes the count start again
_BRIEF_RUNS = 3  # in a row, before a worker is lent
_BACK_OFF = 20  # more of them after a lane had to be recalled for somebody else
_SPOOL_LIMIT = 16 << 20  # bytes, after which a lane is ended, and its spool with it
_READ_AT = 8 << 20  # bytes in a spool that are taken over although calls keep coming


class LentLane:
    """One lane as the agent sees it.

    Attributes:
        templates: what its calls are, by the agent's names.
        client_names: the agent's names, by the notebook's.
        held: submits that wait for the lane's end: they may be of calls that came through it.
        recalled_at: when it was recalled; None while it is open.
        ended_by: what killed calls are reported as, by run id.
    """

    def __init__(
        self,
        lane: str,
        worker: Worker,
        connection: Connection,
        *,
        spool: Spool,
        templates: dict[str, Prepared],
        client_names: dict[str, str],
    ) -> None:
        self.lane, self.worker, self.connection, self.spool = lane, worker, connection, spool
        self.templates, self.client_names = templates, client_names
        self.held: list[tuple[Connection, Submit, list[bytes]]] = []
        self.recalled_at: Optional[float] = None
        self.ended_by: dict[str, Failure] = {}
        self.seen_size = 0

    def recall(self) -> None:
        """Ask the worker to end the lane."""
        if self.recalled_at is None:
            self.recalled_at = time.monotonic()
            self.worker.send(Recall(self.lane))

    def back_off(self) -> None:
        """Somebody else needs the worker: do not lend it for these calls again too soon."""
        if self.recalled_at is None:
            for prepared in self.templates.values():
                prepared.brief_runs = -_BACK_OFF
            self.recall()


class Lanes:
    """All lanes of one agent.

    Args:
        folder: where sockets lie, reachable by this user alone.
        journal: takes over what the spools hold.
        adopt: makes a run of a call that came through a lane: (lane, run id, prepared).
        submit: handles a submit that was held.
        returned: told when a worker is free again.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        *,
        adopt: Callable[[LentLane, str, Prepared], Run],
        submit: Callable[[Connection, Submit, list[bytes]], None],
        returned: Callable[[Worker], None],
    ) -> None:
        self._folder, self._journal = folder, journal
        self._adopt, self._submit, self._returned = adopt, submit, returned
        self._lanes: dict[str, LentLane] = {}

    # ------------------------------------------------------------ lending

    def consider(self, worker: Worker, run: Run) -> None:
        """A run has left a worker: lend the worker if calls like it keep coming."""
        prepared, connection = run.prepared, run.connection
        if not run.attended:
            return
        if not run.was_silent or time.monotonic() - run.queued_at > _BRIEF:
            prepared.brief_runs = min(prepared.brief_runs, 0)
            return
        prepared.brief_runs += 1
        if connection is None or prepared.brief_runs < _BRIEF_RUNS or not _may_lend(worker, prepared):
            return
        offer = worker.offer
        if offer is None:
            self._offer(worker, connection)
        elif offer.connection is not connection or prepared.name not in offer.templates:
            offer.recall()  # the next call is offered one that fits

    def _offer(self, worker: Worker, connection: Connection) -> None:
        names = {
            client_name: prepared
            for client_name, prepared in connection.templates.items()
            if prepared.brief_runs >= _BRIEF_RUNS and prepared.is_ready and prepared.key == worker.key
            and worker.knows(prepared) and _may_lend(worker, prepared)
        }  # fmt: skip
        if not names:
            return
        lane, templates = uuid.uuid4().hex[:8], {prepared.name: prepared for prepared in names.values()}
        calls = {
            name: [prepared.call.label, prepared.call.kind, prepared.environment_text]
            for name, prepared in templates.items()
        }
        try:
            spool = Spool.create(self._journal.path, self._journal.agent, lane, connection.client_id, calls)
        except OSError as error:  # a full disk: calls go the usual way, and say so
            _log.warning("no lane for %s: %s", connection.client_id, error)
            return
        self._lanes[lane] = worker.offer = LentLane(
            lane,
            worker,
            connection,
            spool=spool,
            templates=templates,
            client_names={client_name: prepared.name for client_name, prepared in names.items()},
        )
        worker.send(Lend(lane, self._path(lane), str(spool.path)))

    def _path(self, lane: str) -> str:
        return str(self._folder / f"lane-{lane}.sock")

    # ------------------------------------------------------------ what workers say

    def on_message(self, worker: Worker, message: Message) -> None:
        """Take a message of a worker about its lane."""
        lent = worker.offer
        if lent is None or getattr(message, "lane", "") != lent.lane:
            _log.warning("worker %s speaks of a lane that it does not have", worker.pid)
        elif isinstance(message, Listening):
            lent.connection.send(Lane(lent.lane, self._path(lent.lane), lent.client_names))
        elif isinstance(message, Lent):
            worker.lane = lent
        elif isinstance(message, Adopt):
            self._take(lent)
            if lent.spool.open.pop(message.run_id, None) is None:  # the disk did not take it
                for entry in lent.spool.begun(Begun(message.run_id, message.template, time.time())):
                    self._journal.take(entry)
            self._adopt(lent, message.run_id, lent.templates[message.template])
        elif isinstance(message, Returned):
            self._close(lent)
            self._returned(worker)

    def worker_died(self, worker: Worker) -> None:
        """A worker has ended: adopt the calls that it was running, so that they are told."""
        lent = worker.offer
        if lent is None:
            return
        self._take(lent)
        for run_id, begun in list(lent.spool.open.items()):
            run = self._adopt(lent, run_id, lent.templates[begun.template])
            run.ended_by = lent.ended_by.get(run_id)
        self._close(lent)

    def _close(self, lent: LentLane) -> None:
        self._take(lent)
        lent.worker.lane = lent.worker.offer = None
        del self._lanes[lent.lane]
        lent.connection.send(LaneClosed(lent.lane))
        loop = asyncio.get_running_loop()
        for held in lent.held:
            loop.call_soon(self._submit, *held)
        loop.run_in_executor(None, self._forget, lent.spool)

    def _forget(self, spool: Spool) -> None:
        """Remove a spool once the journal has recorded all of it; runs in a thread."""
        if self._journal.record():
            spool.remove()

    # ------------------------------------------------------------ what notebooks want

    def hold(self, connection: Connection, message: Submit, buffers: list[bytes]) -> bool:
        """Keep a submit that comes again until it is known what became of the call; whether it is kept.

        The notebook may have lost the connection that the lane belongs to, and have come by a new one.
        """
        for lent in self._lanes.values():
            if lent.connection.client_id == connection.client_id:
                lent.held.append((connection, message, buffers))
                lent.recall()
                return True
        return False

    def interrupt(self, connection: Connection, run_id: str) -> None:
        """Interrupt a call that nobody has told us of: it may be in a lane."""
        for lent in self._of(connection):
            lent.worker.send(Interrupt(run_id))

    def kill(self, connection: Connection, run_id: str, failure: Callable[[str], Failure]) -> None:
        """Kill a call that nobody has told us of, if it is in a lane."""
        for lent in self._of(connection):
            self._take(lent)
            if run_id in lent.spool.open:
                label = lent.templates[lent.spool.open[run_id].template].call.label
                lent.ended_by[run_id] = failure(label)
                lent.worker.end(0.0)

    def lost(self, connection: Connection) -> None:
        """A notebook has gone."""
        for lent in self._of(connection):
            lent.recall()

    def _of(self, connection: Connection) -> list[LentLane]:
        return [lent for lent in self._lanes.values() if lent.connection is connection]

    # ------------------------------------------------------------ spools

    def tend(self) -> None:
        """Take over spools that have come to rest or grown large; note that their workers are in use."""
        for lent in list(self._lanes.values()):
            size = lent.spool.size()
            if size != lent.seen_size and lent.worker.lane is lent:
                lent.worker.idle_since = time.monotonic()
            if size == lent.seen_size or size - lent.spool.offset > _READ_AT:
                self._take(lent)
            if size > _SPOOL_LIMIT:
                lent.recall()
            lent.seen_size = size

    def take_all(self) -> None:
        """Take over all that is written down."""
        for lent in self._lanes.values():
            self._take(lent)

    def _take(self, lent: LentLane) -> None:
        try:
            for entry in lent.spool.take():
                self._journal.take(entry)
        except OSError as error:
            _log.warning("the spool %s cannot be read: %s", lent.spool.path, error)


def _may_lend(worker: Worker, prepared: Prepared) -> bool:
    """Whether a worker can be lent for calls of a template without anybody losing by it."""
    scaling = prepared.call.scaling
    return (
        worker.is_ready
        and not worker.is_ending
        and not worker.runs
        and worker.lane is None
        and prepared.call.kind == "function"
        and prepared.call.timeout is None
        and scaling.keep_alive > 0
        and scaling.max_multiplexing == 1
        and scaling.max_concurrency is None
        and not (scaling.min_concurrency or scaling.concurrency_buffer or scaling.concurrency_buffer_perc)
    )
