"""What all hosts with an agent have in common: connect when needed, connect again when broken.

Runs in the notebook.
"""

from __future__ import annotations

import copy
import json
import os
import threading
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fal_agent.errors import HostError, HostUnreachableError, LinkLostError
from fal_notebook import config
from fal_notebook.hosts import steps
from fal_notebook.hosts.execution import AgentExecution
from fal_notebook.hosts.reconnect import RECONNECT_SECONDS, Reconnector

if TYPE_CHECKING:
    from fal_agent.framing import Buffer
    from fal_notebook.config import HostSettings
    from fal_notebook.hosts.base import EventSink, Execution, Parcel
    from fal_notebook.hosts.client import AgentClient

__all__ = ["AGENT_IDLE", "AgentHost", "agent_answer", "agent_idle", "agent_options"]

_NOBODY = (ConnectionRefusedError, FileNotFoundError)  # listens at the agent's socket
_HARMLESS = ("apps", "cells", "environments", "runs", "status")
_TRIES = 3
AGENT_IDLE = 600.0  # seconds after which an unused agent ends; FAL_NOTEBOOK_IDLE overrules it


class AgentHost(ABC):
    """A machine that an agent serves.

    Attributes:
        name: how the notebook calls the host.
        working_folder: the folder that calls run in; None for the user's home over there.
        tells_usage: it answers the question "usage".
    """

    tells_usage = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._client: AgentClient | None = None
        self._owner = 0  # the process that made the connection: a forked child makes its own
        self._connecting = threading.Lock()
        self._returning = Reconnector(name, self.connect, self._reconnect_seconds)
        self._tries = 0  # to connect
        self._failure: HostError | None = None  # of the last try

    @abstractmethod
    def _connect(self) -> AgentClient:
        """Make a connection, starting the agent if there is none."""

    def _is_away(self, error: HostError) -> bool:  # noqa: ARG002 - a machine that is here is never away
        """Whether a connection failed because the machine cannot be reached, which may pass."""
        return False

    @property
    def working_folder(self) -> str | None:
        """The folder that calls run in; None for the user's home over there."""
        return None

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open."""
        return self._client is not None and self._client.is_open and self._owner == os.getpid()

    def connect(self) -> AgentClient:
        """Give the connection, made anew if there is none that works.

        Raises:
            HostError: the machine cannot be reached, or its agent does not come up.
        """
        client = self._client
        if client is not None and client.is_open and self._owner == os.getpid():
            return client
        tries = self._tries
        with self._connecting:
            if not self.is_connected:
                if self._failure is not None and self._tries > tries:  # found out while this thread waited
                    raise copy.copy(self._failure)
                self._try()
            assert self._client is not None
            return self._client

    def _try(self) -> None:
        try:
            with steps.connecting(self.name):
                client = self._connect_anew()
            client.on_lost = self._returning.take
            self._client, self._owner, self._failure = client, os.getpid(), None
            self._returning.has_given_up = False
        except HostError as error:
            self._failure = error
            raise
        finally:
            self._tries += 1

    def submit(
        self, parcel: Parcel, sink: EventSink, *, run_id: str | None = None, attended: bool = False
    ) -> Execution:
        """Start a call; see `fal_notebook.hosts.base.Host`."""
        run_id = run_id or uuid.uuid4().hex[:16]
        last = self._client
        if last is not None and not last.is_open and self._returning.is_looking:
            return self._send_later(last, parcel, sink, run_id, "it is being looked for", attended=attended)
        try:
            for _ in range(_TRIES):
                with suppress(LinkLostError):  # it broke just now
                    return self.connect().submit(parcel, sink, run_id, attended=attended)
            return self.connect().submit(parcel, sink, run_id, attended=attended)
        except HostError as error:
            if last is None or self._returning.has_given_up or not self._is_away(error):
                raise
            return self._send_later(last, parcel, sink, run_id, str(error), attended=attended)

    def _send_later(
        self, last: AgentClient, parcel: Parcel, sink: EventSink, run_id: str, problem: str, *, attended: bool
    ) -> Execution:
        """Leave a call to whoever looks for the host, as one whose connection broke under it."""
        execution = AgentExecution(last, run_id, parcel, sink, attended=attended)
        self._returning.take([execution], problem)
        return execution

    def attach(self, run_id: str, sink: EventSink) -> Execution:
        """Show a run that was started elsewhere, or before; see `fal_notebook.hosts.base.ShowsRuns`."""
        return self.connect().attach(run_id, sink)

    def ask(self, question: str, *, timeout: float = 30.0, **arguments: Any) -> Any:
        """Ask the agent; see `fal_agent.server.questions`. What only looks is asked twice if need be."""
        if question in _HARMLESS:
            with suppress(LinkLostError):
                return self.connect().ask(question, timeout, **arguments)
        return self.connect().ask(question, timeout, **arguments)

    def upload(self, name: str, data: Buffer, stop: threading.Event) -> None:
        """Bring a blob to the host; see `fal_notebook.hosts.base.KeepsData`."""
        self.connect().upload(name, data, stop)

    def close(self) -> None:
        """Let go of the connection; what runs there goes on for its lease."""
        client, self._client = self._client, None
        self._returning.stop()
        if client is not None and self._owner == os.getpid():
            client.close()

    def _connect_anew(self) -> AgentClient:
        """Connect; a connection that breaks while it is made is made again, as where the agent just ended."""
        for _ in range(_TRIES - 1):
            with suppress(LinkLostError, *_NOBODY):  # the next try says what is wrong, if it is not over
                return self._connect()
        try:
            return self._connect()
        except _NOBODY as error:
            raise HostUnreachableError(
                f"the agent on {self.name!r} ended each time that it was started; its log there, "
                f"agent.log, says why: {error}"
            ) from None

    def _reconnect_seconds(self) -> float:
        seconds = config.load().host(self.name).reconnect
        return RECONNECT_SECONDS if seconds is None else seconds

    def __repr__(self) -> str:
        state = "connected" if self.is_connected else "not connected"
        return f"<{type(self).__name__} {self.name!r}, {state}>"


def agent_idle() -> float:
    """Seconds after which an unused agent ends."""
    return float(os.environ.get("FAL_NOTEBOOK_IDLE") or AGENT_IDLE)


def agent_options(settings: HostSettings) -> list[str]:
    """Give the words by which an agent is told what the user has chosen for it."""
    words = ["--idle", str(agent_idle())]
    for name, value in (("--files-gb", settings.files_gb), ("--files-days", settings.files_days)):
        words += [] if value is None else [name, str(value)]
    for label in settings.labels:
        words += ["--label", label]
    return words


def agent_answer(host_name: str, output: bytes, errors: bytes) -> dict[str, Any]:
    """Read what `fal_agent start` printed.

    Raises:
        HostUnreachableError: it failed, or printed something else.
    """
    try:
        answer = json.loads(output.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        text = (errors or output).decode("utf-8", "replace").strip()[-2000:]
        raise HostUnreachableError(f"the agent on {host_name!r} did not start; it said:\n{text}") from None
    if "error" in answer:
        raise HostUnreachableError(f"the agent on {host_name!r} did not start: {answer['error']}")
    return dict(answer)
