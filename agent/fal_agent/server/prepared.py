"""A call's template, and what the agent has found out about it once for all calls like it.

Runs in the agent.
"""

from __future__ import annotations

import hmac
import itertools
import json
import os
import threading
from typing import TYPE_CHECKING, NamedTuple, Optional

from fal_agent.wire import Task

if TYPE_CHECKING:
    from fal_agent.server.environments.cache import Environment
    from fal_agent.server.machine import Match
    from fal_agent.server.runs import Run
    from fal_agent.wire import Call, Serve

__all__ = ["Preparation", "Prepared", "WorkerKey"]

_numbers = itertools.count(1)
_HMAC_KEY = os.urandom(32)


class WorkerKey(NamedTuple):
    """What makes two workers interchangeable."""

    environment: str
    gpus: int
    gpu_model: Optional[str]
    folder: Optional[str]
    app: str = ""  # the only one that its workers serve
    secrets: str = ""  # digest of those of calls that share a process while they run


class Preparation:
    """The making of what calls of one template need.

    Attributes:
        runs: that wait for it, in the order they came.
        cancelled: set when nobody waits any more.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.cancelled = threading.Event()

    def stage(self, phase: str, text: str) -> None:
        """Tell those who wait what is being done."""
        for run in self.runs:
            run.stage(phase, text)

    def log(self, text: str) -> None:
        """Pass on what uv says."""
        for run in self.runs:
            run.builder_log(text)


class Prepared:
    """What is needed to run calls of one template.

    Attributes:
        call: what the notebook asked for.
        name: the agent's name for the template, for workers.
        match: what of the machine the call gets; None before that was looked at.
        environment: where it runs; None before that is built.
        folder: the working folder; of the call's files once they are laid out.
        preparation: the making of all this, while it goes on.
        brief_runs: calls in a row that were brief and silent (see `fal_agent.server.lanes`).
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.name = str(next(_numbers))
        self.match: Optional[Match] = None
        self.environment: Optional[Environment] = None
        self.folder: Optional[str] = None if call.files else call.folder
        self.environment_text = json.dumps(call.environment.layers)  # for the journal
        self.preparation: Optional[Preparation] = None
        self.brief_runs = 0
        self._key: Optional[WorkerKey] = None

    @property
    def is_ready(self) -> bool:
        """Whether calls of this template can go to a worker at once."""
        return self.environment is not None

    @property
    def key(self) -> WorkerKey:
        """The kind of worker that the calls need."""
        if self._key is None:
            assert self.environment is not None
            assert self.match is not None
            self._key = WorkerKey(
                self.environment.name,
                self.match.gpus,
                self.match.gpu_model,
                self.folder,
                self.call.app.name if self.call.app is not None else "",
                _digest(self.call.environ) if self.call.scaling.max_multiplexing > 1 else "",
            )
        return self._key

    def found(self, environment: Environment, folder: Optional[str]) -> None:
        """Take what was built for the template."""
        self.environment, self.folder, self._key = environment, folder, None

    def lost(self) -> None:
        """The environment is no longer there: it is to be built again at the next call."""
        self.environment, self._key = None, None

    def task(self, outbox: str, serve: Optional[Serve] = None) -> Task:
        """What a worker must know of the call; `serve` if it is an app's runner."""
        call = self.call
        return Task(
            kind=call.kind,
            label=call.label,
            function=call.function,
            session=call.session,
            outbox=outbox,
            multiplexing=call.scaling.max_multiplexing,
            folder=self.folder,
            import_path=call.import_path,
            fresh=call.fresh,
            reusable=call.reusable,
            pydantic=call.pydantic,
            serve=serve,
            environ=call.environ,
        )


def _digest(secrets: dict[str, str]) -> str:
    """Tell sets of secrets apart without keeping them: worth nothing outside this process."""
    if not secrets:
        return ""
    return hmac.new(_HMAC_KEY, json.dumps(sorted(secrets.items())).encode(), "sha256").hexdigest()
