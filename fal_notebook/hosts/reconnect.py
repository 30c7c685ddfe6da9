"""Bring back the calls of a connection that broke: connect again, and go on after the last event seen.

A call that begins while the host is away waits among them.

Runs in the notebook, in a thread that exists while calls are adrift. The calls go on over there meanwhile,
and the host's journal has what they say. Nobody is asked anything: a login that wants a passphrase ends it.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from fal_agent.errors import (
    AuthenticationError,
    ConfigurationError,
    FalServerlessError,
    HostKeyError,
    LinkLostError,
)
from fal_agent.wire import Log
from fal_notebook.hosts.base import Received
from fal_notebook.prompting import unattended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fal_notebook.hosts.client import AgentClient
    from fal_notebook.hosts.execution import AgentExecution

__all__ = ["RECONNECT_SECONDS", "Reconnector"]

RECONNECT_SECONDS = 900.0  # how long a host is looked for; `reconnect` in hosts.toml overrules it

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries
_QUIET_SECONDS = 2.0  # an outage that is shorter is not worth a line
_HOPELESS = (HostKeyError, ConfigurationError)
_REFUSALS = 3  # in a row that are believed: a server that is starting up may refuse those it lets in later


class Reconnector:
    """Waits for a host to come back, on behalf of the calls that are going on there.

    Args:
        host_name: for messages.
        connect: makes a connection; raises HostError.
        patience: gives the seconds for which to try.

    Attributes:
        has_given_up: the host was looked for in vain, and nobody has connected there since.
    """

    def __init__(
        self, host_name: str, connect: Callable[[], AgentClient], patience: Callable[[], float]
    ) -> None:
        self._host_name, self._connect, self._patience = host_name, connect, patience
        self._lock = threading.Lock()
        self._adrift: dict[str, AgentExecution] = {}
        self._told: set[str] = set()  # those whose cells say that the connection is gone
        self.has_given_up = False
        self._thread: threading.Thread | None = None
        self._refusals = 0  # of our login, in a row
        self._stop = threading.Event()

    @property
    def is_looking(self) -> bool:
        """Whether calls wait for the host, which is being tried."""
        return self._thread is not None and self._thread.is_alive()  # in a forked child it is not

    def take(self, executions: Iterable[AgentExecution], problem: str) -> None:
        """Bring calls back as soon as that is possible; returns at once.

        Args:
            executions: calls that belong to no connection now.
            problem: how theirs ended, for a call that cannot be brought back.
        """
        with self._lock:
            for execution in executions:
                self._add(execution)
            if self.is_looking or not self._adrift:
                return
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._work, args=(problem,), name=f"fal-reconnect-{self._host_name}", daemon=True
            )
            self._thread.start()

    def _add(self, execution: AgentExecution) -> None:
        """Note a call; of two that watch one run, the one that may have to be sent again goes first."""
        known = self._adrift.get(execution.run_id)
        if known is None or known is execution:
            main = execution
        elif execution.parcel is None:
            main = known
            known.join(execution)
        else:
            main = execution
            execution.join(known)
        main.drift(self._let_go)
        self._adrift[main.run_id] = main

    def stop(self) -> None:
        """Try no longer; the calls that wait fail."""
        self._stop.set()
        self._fail_all(f"the connection to {self._host_name!r} was closed here")

    # ------------------------------------------------------------ the thread

    def _work(self, problem: str) -> None:
        began, pause = time.monotonic(), _FIRST_PAUSE
        patience = self._patience()
        until = time.strftime("%H:%M", time.localtime(time.time() + patience))
        lost = f"The connection to {self._host_name!r} is lost; connecting again until {until}"
        self._refusals = 0
        while not self._stop.is_set():
            outage = time.monotonic() - began
            reason = self._try(outage) if outage < patience else problem
            if reason is None:
                return
            problem = reason
            if self._stop.is_set() or outage >= patience:
                break
            if outage >= _QUIET_SECONDS:
                self._tell(f"{lost}. {reason}\n")
            self._stop.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
            if self._is_deserted():
                return
        with self._lock:
            self._thread, self.has_given_up = None, True
        self._fail_all(problem)

    def _try(self, outage: float) -> str | None:
        """Bring everything back; None if nothing is left to do, else why it could not be done."""
        try:
            with unattended():
                client = self._connect()
        except _HOPELESS as error:
            self._stop.set()
            return str(error)
        except AuthenticationError as error:
            self._refusals += 1
            if self._refusals == _REFUSALS:
                self._stop.set()
            return str(error)
        except (FalServerlessError, OSError) as error:
            return str(error)
        if self._stop.is_set():
            client.close()
        while (execution := self._next()) is not None:
            if execution.run_id in self._told:
                self._told.discard(execution.run_id)
                self._say(execution, f"Connected to {self._host_name!r} again after {outage:.0f} s.\n")
            try:
                client.resume(execution)
            except LinkLostError as error:
                self.take([execution], str(error))
                return str(error)
        return None

    def _next(self) -> AgentExecution | None:
        """Take one of the calls that wait; None if there is none: then this thread ends."""
        with self._lock:
            if self._adrift:
                return self._adrift.pop(next(iter(self._adrift)))
            self._thread = None
            return None

    def _is_deserted(self) -> bool:
        """Whether no call waits, since all have been interrupted: then this thread ends."""
        with self._lock:
            if not self._adrift:
                self._thread = None
            return not self._adrift

    # ------------------------------------------------------------ the calls

    def _let_go(self, execution: AgentExecution) -> bool:
        """Wait no longer for a call; False if it has just been brought back."""
        with self._lock:
            self._told.discard(execution.run_id)
            return self._adrift.pop(execution.run_id, None) is not None

    def _fail_all(self, problem: str) -> None:
        with self._lock:
            adrift, self._adrift = self._adrift, {}
        for execution in adrift.values():
            execution.fail_adrift(problem)

    def _tell(self, text: str) -> None:
        with self._lock:
            untold = [e for e in self._adrift.values() if e.run_id not in self._told]
            self._told.update(execution.run_id for execution in untold)
        for execution in untold:
            self._say(execution, text)

    def _say(self, execution: AgentExecution, text: str) -> None:
        event = Log(execution.run_id, "stderr", "link", sent_at=time.time(), seq=execution.last_seq)
        execution.sink(Received(event, [text.encode()]))
