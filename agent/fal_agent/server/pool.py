"""Keep warm workers and give each waiting run to one that fits.

Runs in the agent, on its event loop. Workers are told apart by environment, devices and working
folder; a run waits until one that fits is free, or until there is room to start one. Cells of one
session always meet the same worker.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.server.process import WorkerProcess, worker_variables

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.server.devices import Devices
    from fal_agent.server.prepared import WorkerKey
    from fal_agent.server.reaper import Reaper
    from fal_agent.server.runs import Run
    from fal_agent.server.worker import Worker

__all__ = ["Pool"]

_log = logging.getLogger(__name__)
_SESSION_IDLE = (
    2 * 3600.0
)  # seconds that a session outlives its last use when no notebook of its is connected
_STARTUP_TIMEOUT = 60.0  # seconds from starting a process to its first word, unless the call says otherwise
_SPARE_LIMIT = 64  # workers of one kind that are started ahead of their calls
_RETURN_SECONDS = 0.1  # in which a lent worker is back, unless C code keeps it from listening
_TELL_AFTER = 0.5  # seconds that a run waits before it is told why


_Queue = tuple["WorkerKey", str]  # and the calls' scale key


class Pool:
    """The workers of one agent.

    Args:
        root: the agent's folder.
        code: folder with the sources that workers import.
        log_folder: where workers' own logs go.
        slots: calls of functions that may run in different workers at the same time.
        devices: lends GPUs.
        reaper: ends workers when the agent is killed.
        make_worker: wires a worker to the runs' events (see `fal_agent.server.worker`).
        is_connected: whether a notebook with this client id is connected.
    """

    def __init__(
        self,
        *,
        root: Path,
        code: Path,
        log_folder: Path,
        slots: int,
        devices: Devices,
        reaper: Reaper,
        make_worker: Callable[[WorkerKey], Worker],
        is_connected: Callable[[str], bool],
    ) -> None:
        self._root, self._code, self._log_folder = root, code, log_folder
        self._slots, self._devices, self._reaper = slots, devices, reaper
        self._make_worker, self._is_connected = make_worker, is_connected
        self._queues: dict[_Queue, deque[Run]] = {}
        self._explaining: set[_Queue] = set()  # queues whose runs will be told why they wait
        self._running: dict[str, int] = {}  # calls in progress by scale key
        self._tasks: set[asyncio.Task[None]] = set()
        self.workers: list[Worker] = []

    # ------------------------------------------------------------ runs

    def enqueue(self, run: Run) -> None:
        """Give a run, whose environment is ready, to a worker now or when its turn comes."""
        run.queued_at = time.monotonic()
        queue = (run.prepared.key, run.call.scale_key)
        self._queues.setdefault(queue, deque()).append(run)
        self._serve(queue)
        if not run.is_finished and run.worker is None:
            run.set_state("queued")

    def forget(self, run: Run) -> None:
        """Take a waiting run out of its queue."""
        for waiting in self._queues.values():
            if run in waiting:
                waiting.remove(run)
                return

    def release(self, worker: Worker, run: Run) -> None:
        """A run has left its worker."""
        worker.runs.pop(run.run_id, None)
        worker.idle_since = time.monotonic()
        count = self._running.get(run.call.scale_key, 1) - 1
        if count:
            self._running[run.call.scale_key] = count
        else:
            self._running.pop(run.call.scale_key, None)
        own = (worker.key, run.call.scale_key)
        if own in self._queues:
            self._serve(own)
        self.serve_all()
        if worker.is_idle and worker.keep_alive <= 0 and not worker.sessions:
            worker.end()

    def serve_all(self) -> None:
        """Look at every queue again."""
        for queue in list(self._queues):
            self._serve(queue)

    def _serve(self, queue: _Queue) -> None:
        waiting = self._queues.get(queue)
        while waiting:
            run = waiting[0]
            worker = self._free_worker(run, queue[0]) if self._may_run(run) else None
            if worker is None:
                self._consider_starting(queue)
                break
            waiting.popleft()
            if not run.is_finished:
                self._running[run.call.scale_key] = self._running.get(run.call.scale_key, 0) + 1
                worker.execute(run)
                self._keep_spare(run, queue[0])
        if not waiting:
            self._queues.pop(queue, None)
        else:
            self._explain_later(queue)

    def _may_run(self, run: Run) -> bool:
        if run.serve is not None:  # the app has counted its runners
            return True
        scaling = run.call.scaling
        limit = scaling.max_concurrency
        running = self._running.get(run.call.scale_key, 0)
        return limit is None or running < limit * max(1, scaling.max_multiplexing)

    def _free_worker(self, run: Run, key: WorkerKey) -> Optional[Worker]:
        candidates = [worker for worker in self.workers if worker.key == key and worker.accepts(run)]
        if run.call.session is not None:
            own = [
                worker for worker in self.workers if worker.key == key and run.call.session in worker.sessions
            ]
            if own:
                return own[0] if own[0] in candidates else None
            candidates = [worker for worker in candidates if not worker.sessions]
        # A worker that is in use already comes first, then one with a session, whose models are shared.
        return max(candidates, key=lambda worker: (len(worker.runs), bool(worker.sessions)), default=None)

    def _explain_later(self, queue: _Queue) -> None:
        """See to it that those who wait are told why; one timer serves the whole queue."""
        waiting = self._queues.get(queue)
        if waiting and not waiting[-1].told_to_wait and queue not in self._explaining:
            self._explaining.add(queue)
            asyncio.get_running_loop().call_later(_TELL_AFTER, self._explain, queue)

    def _explain(self, queue: _Queue) -> None:
        self._explaining.discard(queue)
        for ahead, run in enumerate(self._queues.get(queue, ())):
            if not run.told_to_wait and time.monotonic() - run.queued_at >= _TELL_AFTER * 0.9:
                run.told_to_wait = True
                run.stage("queue", self._reason(run, queue[0], ahead))
        self._explain_later(queue)

    def _reason(self, run: Run, key: WorkerKey, ahead: int) -> str:
        mine = [worker for worker in self.workers if worker.key == key]
        if any(not worker.is_ready for worker in mine):
            return "a worker is starting"
        if key.gpus and not any(worker.accepts(run) for worker in mine):
            return self._devices.reason or "every GPU is in use"
        if not self._may_run(run):
            return f"max_concurrency={run.call.scaling.max_concurrency} calls of {run.call.label} are running"
        busy = sum(1 for worker in self.workers if worker.runs)
        return f"{ahead} calls ahead, {busy} workers busy, {self._slots} at a time on this host"

    # ------------------------------------------------------------ workers

    def _consider_starting(self, queue: _Queue) -> None:
        """Start a worker for the run at the head of a queue, if that is due and there is room."""
        key, run = queue[0], self._queues[queue][0]
        mine = [worker for worker in self.workers if worker.key == key]
        if self._awaits_lent(mine):
            return
        starting = sum(1 for worker in mine if not worker.is_ready)
        if not self._may_run(run) or starting >= len(self._queues[queue]):
            return
        if run.call.session is not None:
            if any(run.call.session in worker.sessions for worker in mine) or starting:
                return
            if run.call.kind == "comm":
                self._queues[queue].popleft()
                run.fail("lost", "the session that the widget belonged to has ended")
                self._serve(queue)
                return
        elif not self._has_room(run, mine):
            return
        delay = run.call.scaling.scaling_delay - (time.monotonic() - run.queued_at)
        if mine and delay > 0:
            asyncio.get_running_loop().call_later(delay, self.serve_all)
            return
        self._start(run, key)

    def _awaits_lent(self, workers: list[Worker]) -> bool:
        """Have a lent worker come back; whether it is expected any moment, so that none need be started."""
        awaited = False
        for lane in [worker.lane for worker in workers if worker.lane is not None]:
            lane.back_off()
            waited = time.monotonic() - (lane.recalled_at or 0.0)
            awaited = awaited or waited < _RETURN_SECONDS
        if awaited:
            asyncio.get_running_loop().call_later(_RETURN_SECONDS, self.serve_all)
        return awaited

    def _has_room(self, run: Run, mine: list[Worker]) -> bool:
        if run.call.kind in ("app", "gateway"):  # it is there to wait for requests, not to work all the time
            return True
        limit = run.call.scaling.max_concurrency
        if limit is not None and sum(1 for worker in mine if not worker.sessions) >= limit:
            return False
        occupied = sum(1 for worker in self.workers if worker.is_busy or not worker.is_ready)
        return occupied < self._slots

    def _keep_spare(self, run: Run, key: WorkerKey) -> None:
        """Start one more worker if `min_concurrency` or a buffer of the function asks for it."""
        scaling = run.call.scaling
        if not (scaling.min_concurrency or scaling.concurrency_buffer or scaling.concurrency_buffer_perc):
            return
        load = self._running.get(run.call.scale_key, 0)
        spare = max(scaling.concurrency_buffer, math.ceil(load * scaling.concurrency_buffer_perc / 100))
        wanted = max(scaling.min_concurrency, math.ceil(load / max(1, scaling.max_multiplexing)) + spare)
        if scaling.max_concurrency is not None:
            wanted = min(wanted, scaling.max_concurrency)
        there = sum(1 for worker in self.workers if worker.key == key and not worker.is_ending)
        if there < min(wanted, _SPARE_LIMIT):
            self._start(run, key)

    def _start(self, run: Run, key: WorkerKey) -> None:
        worker = self._make_worker(key)
        worker.keep_alive = run.call.scaling.keep_alive
        if run.call.session is not None:
            worker.sessions[run.call.session] = run.client_id
        self.workers.append(worker)
        task = asyncio.get_running_loop().create_task(self._start_process(worker, run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_process(self, worker: Worker, run: Run) -> None:
        key, environment = worker.key, run.prepared.environment
        assert environment is not None
        if key.gpus:
            pids = [item.pid for item in self.workers]
            try:
                worker.devices = await self._devices.lend(key.gpus, key.gpu_model, pids)
            except OSError as error:
                worker.start_problem = f"no GPU can be locked: {error}"
                worker.on_exit(None)
                return
            if worker.devices is None:
                self._no_device(worker)
                return
        run.stage("start")
        worker_id = f"w{uuid.uuid4().hex[:12]}"
        variables = worker_variables(
            worker_id, code=self._code, root=self._root, python=environment.python, devices=worker.devices
        )
        process = WorkerProcess(
            worker_id,
            on_message=worker.on_message,
            on_exit=worker.on_exit,
            log_path=self._log_folder / f"{worker_id}.log",
            reaper=self._reaper,
        )
        worker.process = process
        try:
            process.start(
                [str(environment.python), "-m", "fal_agent.worker"], variables, _existing(key.folder)
            )
        except OSError as error:
            worker.start_problem = f"the interpreter {environment.python} cannot be started: {error}"
            run.prepared.lost()
            worker.on_exit(None)
            return
        worker.watch_startup(run.call.startup_timeout or _STARTUP_TIMEOUT)

    def _no_device(self, worker: Worker) -> None:
        """No GPU is free: end an idle worker that holds one, and look again later."""
        self.workers.remove(worker)
        idle = [item for item in self.workers if item.devices and not item.runs]
        if idle:
            self._end_or_recall(min(idle, key=lambda item: item.idle_since))
        asyncio.get_running_loop().call_later(2.0, self.serve_all)

    def worker_ready(self, worker: Worker) -> None:
        """A worker can take runs."""
        self.serve_all()
        for run in [run for item in self.workers if item.key == worker.key for run in item.runs.values()][:1]:
            self._keep_spare(run, worker.key)

    def worker_gone(self, worker: Worker) -> None:
        """A worker has ended; its runs have been told."""
        if worker in self.workers:
            self.workers.remove(worker)
        if worker.devices:
            self._devices.release(worker.devices)
        if not worker.is_ready:
            self._fail_one(worker)
        for run in list(worker.runs.values()):
            self.release(worker, run)
        self.serve_all()

    def _fail_one(self, worker: Worker) -> None:
        """A worker never came up: the run it was meant for learns why, or starting would go on for ever."""
        for (key, _), waiting in self._queues.items():
            for run in waiting:
                if key == worker.key and (not worker.sessions or run.call.session in worker.sessions):
                    waiting.remove(run)
                    run.fail("lost", worker.startup_failure(), exit_status=worker.exit_status)
                    return

    def end_session(self, session: Optional[str]) -> int:
        """End the workers of one session, or of all; give how many."""
        ended = [w for w in self.workers if (w.sessions if session is None else session in w.sessions)]
        for worker in ended:
            worker.end()
        return len(ended)

    def end_all(self) -> int:
        """End every worker; give how many."""
        workers = list(self.workers)
        for worker in workers:
            worker.end()
        return len(workers)

    def tend(self) -> None:
        """Record the runs that have been running for a while; end the workers whose time has passed."""
        for worker in self.workers:
            for run in worker.runs.values():
                run.record_running()
        self._end_idle()

    def _end_idle(self) -> None:
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.runs or not worker.is_ready or worker.is_ending:
                continue
            idle = now - worker.idle_since
            if worker.sessions:
                attended = any(self._is_connected(client) for client in worker.sessions.values())
                expired = not attended and idle > _SESSION_IDLE
            else:
                expired = idle > worker.keep_alive and not self._is_kept(worker)
            if expired:
                self._end_or_recall(worker)

    def _end_or_recall(self, worker: Worker) -> None:
        """End an idle worker; one that is lent comes back first, lest a call is lost that just begins."""
        if worker.lane is None:
            worker.end()
        else:
            worker.lane.recall()

    def adopt(self, worker: Worker, run: Run) -> None:
        """A worker has begun a run that came through a lane."""
        self._running[run.call.scale_key] = self._running.get(run.call.scale_key, 0) + 1
        worker.adopt(run)

    def has_waiting(self, worker: Worker) -> bool:
        """Whether a run waits for a worker like this one."""
        return any(waiting and queue[0] == worker.key for queue, waiting in self._queues.items())

    def _is_kept(self, worker: Worker) -> bool:
        """Whether `min_concurrency` of a connected notebook's function asks for this worker."""
        if not worker.kept_for or not self._is_connected(worker.kept_for):
            return False
        alike = sum(1 for item in self.workers if item.key == worker.key and not item.is_ending)
        return alike <= worker.keep_at_least


def _existing(folder: Optional[str]) -> str:
    """The folder if it is there, else the user's home."""
    return folder if folder and Path(folder).is_dir() else str(Path.home())
