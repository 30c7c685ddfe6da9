"""Answer what a notebook asks about the host, and do the little it may order.

Runs in the agent. Each question is a method named `on_QUESTION`; slow ones run in a thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import time
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import FalServerlessException, ResourceError
from fal_agent.framing import FrameDecoder
from fal_agent.server.gpus import list_gpus
from fal_agent.server.machine import machine_facts
from fal_agent.server.usage import usage_of
from fal_agent.wire import Answer, Ask, Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_agent.server.apps import Apps
    from fal_agent.server.blobs import BlobStore
    from fal_agent.server.datafolder import DataFolder
    from fal_agent.server.environments.cache import EnvironmentCache
    from fal_agent.server.journal import Journal, RunRecord
    from fal_agent.server.pool import Pool
    from fal_agent.server.rpc import Connection
    from fal_agent.server.supplies import Supplies

__all__ = ["Questions"]

_ASK_FOR_THEMSELVES = ("arrived",)  # whose answers depend on the connection

_log = logging.getLogger(__name__)


class Questions:
    """What a notebook may ask.

    Args:
        environments, journal, pool, data: where the answers are.
        apps: gives the apps of this agent.
        supplies: gives what notebooks are asked to bring.
        catch_up: lets the journal know of what happened in lanes.
        blobs: keeps large results.
        is_watching: whether a notebook, by its id, is connected and well.
        shut_down: ends the agent.
    """

    def __init__(
        self,
        *,
        environments: EnvironmentCache,
        journal: Journal,
        pool: Pool,
        data: DataFolder,
        blobs: BlobStore,
        match: Callable[[Resources], Any],
        is_watching: Callable[[str], bool],
        apps: Callable[[], Apps],
        supplies: Callable[[], Supplies],
        catch_up: Callable[[], None],
        shut_down: Callable[[], None],
    ) -> None:
        self._environments, self._journal, self._pool = environments, journal, pool
        self._data, self._apps, self._catch_up, self._shut_down = data, apps, catch_up, shut_down
        self._blobs, self._is_watching, self._supplies = blobs, is_watching, supplies
        self._match = match
        self._started_at = time.time()
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, connection: Connection, ask: Ask) -> None:
        """Answer a question when its answer is there."""
        task = asyncio.get_running_loop().create_task(self._answer(connection, ask))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: Connection, ask: Ask) -> None:
        handler = getattr(self, f"on_{ask.question}", None)
        if handler is None:
            known = ", ".join(sorted(name[3:] for name in dir(self) if name.startswith("on_")))
            connection.send(
                Answer(ask.request_id, error=f"unknown question {ask.question!r}; known are {known}")
            )
            return
        try:
            asking = {"connection": connection} if ask.question in _ASK_FOR_THEMSELVES else {}
            content = await handler(**asking, **ask.arguments)
        except (OSError, FalServerlessException, TypeError, ValueError) as error:
            _log.warning("question %s failed", ask.question, exc_info=True)
            connection.send(Answer(ask.request_id, error=str(error)))
            return
        connection.send(Answer(ask.request_id, content=content))

    async def on_status(self) -> dict[str, Any]:
        """The machine, its GPUs, and the workers on it."""
        loop = asyncio.get_running_loop()
        facts = await loop.run_in_executor(None, machine_facts, self._environments.root)
        gpus = await loop.run_in_executor(None, list_gpus)
        return {
            "machine": _plain(facts),
            "gpus": [_plain(gpu) for gpu in gpus],
            "agent": {
                "pid": os.getpid(),
                "python": platform.python_version(),
                "started_at": self._started_at,
            },
            "workers": [self._worker(worker) for worker in self._pool.workers],
        }

    async def on_lacking(self, resources: dict[str, Any]) -> Optional[str]:
        """Why this machine cannot give what a call asks for; None if it can."""
        try:
            self._match(Resources(**resources))
        except ResourceError as error:
            return str(error)
        return None

    async def on_arrived(self, name: str, size: int, *, connection: Connection) -> int:
        """How many bytes of a blob are here, from which its sender goes on; see `BlobStore.arrived`."""
        return self._blobs.arrived(name, size, writer=connection.writer)

    async def on_usage(self, run_id: str) -> dict[str, Any]:
        """What the worker of a run uses now, see `usage_of`; empty while none has it."""
        for worker in self._pool.workers:
            if run_id in worker.runs and worker.pid is not None:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(None, usage_of, worker.pid, worker.devices)
        return {}

    async def on_look(self, session: str, **question: Any) -> Any:
        """What the names of a session tell about a place in a cell, see `wire.Look`; None if nothing."""
        for worker in self._pool.workers:
            if session in worker.sessions:
                return await worker.look(session, question)
        return None

    async def on_environments(self) -> list[dict[str, Any]]:
        """The environments on the host, with their sizes."""
        return await asyncio.get_running_loop().run_in_executor(None, self._environments.infos)

    async def on_runs(self, client_id: Optional[str] = None, limit: int = 100) -> list[dict[str, Any]]:
        """The latest runs; those of agents that have gone are reported lost."""
        self._catch_up()
        self._journal.mark_lost()
        records = self._journal.runs(client_id=client_id, limit=limit)
        return [{**_plain(record), "result_bytes": self._result_bytes(record)} for record in records]

    def _result_bytes(self, record: RunRecord) -> Optional[int]:
        """Bytes of what a run gave; None if it has given nothing, or it is not kept any more."""
        data = self._journal.outcome(record.run_id) if record.state == "done" else None
        if data is None:
            return None
        (frame,) = FrameDecoder().feed(data)
        sizes = [self._blobs.size(ref) for ref in frame.header.get("data", ()) if isinstance(ref, str)]
        inline = sum(len(buffer) for buffer in frame.buffers)
        return None if None in sizes else inline + sum(size or 0 for size in sizes)

    async def on_cells(self, notebook: str, client_id: str) -> list[dict[str, Any]]:
        """The newest run of each cell of a notebook, if its outcome was not shown yet; `client_id` asks."""
        self._journal.mark_lost()
        return [
            {
                **_plain(cell.run),
                "key": cell.key,
                "inputs": json.loads(cell.inputs),
                "is_watched": cell.run.client_id != client_id and self._is_watching(cell.run.client_id),
            }
            for cell in self._journal.cells(notebook)
            if not cell.is_seen
        ]

    async def on_apps(self) -> list[dict[str, Any]]:
        """The apps that are served here, whoever spawned them."""
        return self._apps().infos()

    async def on_app_address(self, name: str, patience: float = 600.0, refusing: str = "") -> dict[str, Any]:
        """Give the socket of an app once a runner listens, and whether to try again if it ends.

        `refusing` is a runner's that answered 503, and is not wanted.
        """
        path = await self._apps().address(name, patience, refusing)
        app = self._apps().get(name)
        return {
            "path": path,
            "may_repeat": app.may_repeat,
            "auth": app.spec.auth,
            "may_repeat_refused": app.may_repeat_refused,
        }

    async def on_missing(self, blobs: list[str]) -> list[str]:
        """Which of these blobs are not here."""
        return self._supplies().missing(blobs)

    async def on_supplying(self, request: str, text: str) -> None:
        """A notebook says how far it has come with what a build lacks."""
        self._supplies().note(request, text)

    async def on_supply(self, request: str, files: list[list[Any]], error: str = "") -> None:
        """A notebook has brought what a build lacks, or cannot."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._supplies().take, request, files, error)

    async def on_app_stop(self, name: str, kill: bool = False) -> str:
        """End an app, or kill it; gives the id of its run, whose last event says that it has ended."""
        app = self._apps().get(name)
        app.kill() if kill else app.stop()
        return app.run.run_id

    async def on_stop(self, session: Optional[str] = None, everything: bool = False) -> dict[str, int]:
        """End the workers of a session, of all sessions, or all workers."""
        ended = self._pool.end_all() if everything else self._pool.end_session(session)
        return {"workers": ended}

    async def on_prune(self, budget: int = 0) -> list[str]:
        """Remove the environments that were not used for longest, beyond `budget` bytes."""
        used = {worker.key.environment for worker in self._pool.workers}
        return await asyncio.get_running_loop().run_in_executor(None, self._environments.prune, budget, used)

    async def on_prune_runs(self, max_age_seconds: float, max_bytes: int) -> dict[str, int]:
        """Forget ended runs: those that ended longer ago, then the oldest beyond `max_bytes`."""
        self._catch_up()

        def forget() -> dict[str, int]:
            dropped = self._journal.retain(max_age_seconds=max_age_seconds, max_bytes=max_bytes)
            sizes = [self._blobs.size(name) or 0 for name in dropped.blobs]
            self._blobs.remove(dropped.blobs)
            return {"runs": dropped.runs, "bytes": dropped.bytes + sum(sizes)}

        return await asyncio.get_running_loop().run_in_executor(None, forget)

    async def on_remove_environment(self, name: str) -> bool:
        """Remove an environment that nobody uses; whether that could be done."""
        if any(worker.key.environment == name for worker in self._pool.workers):
            raise ValueError(f"environment {name} is in use: stop what runs in it first")
        return await asyncio.get_running_loop().run_in_executor(None, self._environments.remove, name)

    async def on_sync(self, directory: str, manifest: str, force: bool = False) -> dict[str, Any]:
        """Go on making a folder below /data hold what a manifest says; see `fal_agent.mirror.folder`."""
        return await asyncio.get_running_loop().run_in_executor(
            None, self._data.step, directory, manifest, force
        )

    async def on_shutdown(self) -> bool:
        """End every worker, then the agent."""
        self._pool.end_all()
        asyncio.get_running_loop().call_later(0.2, self._shut_down)
        return True

    def _worker(self, worker: Any) -> dict[str, Any]:
        return {
            "pid": worker.pid,
            "environment": worker.key.environment,
            "sessions": list(worker.sessions),
            "devices": worker.devices,
            "runs": [{"run_id": run.run_id, "label": run.call.label} for run in worker.runs.values()],
            "idle_seconds": None if worker.runs else time.monotonic() - worker.idle_since,
            "keep_alive": worker.keep_alive,
        }


def _plain(value: Any) -> Any:
    """JSON types of dataclasses and named tuples, nested ones too."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
