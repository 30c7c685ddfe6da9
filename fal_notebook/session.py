"""`%%fal` cells: where they run, with what, and what becomes of what they leave.

Runs in the notebook. Cells with the same host and session name share one namespace in one worker.
What a session needs (requirements, machine) is remembered: a cell that says nothing of it runs where
the ones before ran, and one that asks for more starts the session anew, with the names that the
notebook holds.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import uuid
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fal_agent.errors import (
    EnvironmentBuildError,
    FalServerlessError,
    RequirementError,
    ResourceError,
    UserFunctionException,
)
from fal_agent.masking import Masker
from fal_agent.wire import Call, Failure
from fal_notebook import config, display
from fal_notebook.advice import requirements_change
from fal_notebook.cell_needs import (
    AUTO,
    advise,
    asked_requirements,
    checked_options,
    merged_lines,
    pasted_line,
)
from fal_notebook.environment import (
    environment_spec,
    is_requirement,
    pydantic_version,
    worker_needs,
)
from fal_notebook.exchange import Request
from fal_notebook.handles import Handle, bytes_as_text, keepers
from fal_notebook.hosts.registry import get_host
from fal_notebook.keeping import Keeper
from fal_notebook.names import SessionNames
from fal_notebook.notebook_cell import NotebookCell
from fal_notebook.options import FunctionOptions, make_options
from fal_notebook.returning import forget_earlier
from fal_notebook.run import Draw, Run, draw_connection, follow, start
from fal_notebook.secrets import read_secrets
from fal_notebook.sending import Sending, make_request, open_reply
from fal_notebook.widgets import SessionWidgets

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import EnvironmentSpec
    from fal_notebook.hosts.base import Host, Received

__all__ = [
    "Session",
    "forget_sessions",
    "run_cell",
    "session_names",
    "session_on",
    "used_session",
]

_EVERYTHING = 1 << 62  # bytes
_HUGE = 64 << 20  # bytes; a larger value is named before it travels
_NOWHERE = {"code": "", "filename": "", "first_line": 1, "source": "", "number": 0}
_TRIES = 3  # the session may be started anew between two of them
_REFUSALS = (EnvironmentBuildError, RequirementError, ResourceError)  # the cell's needs cannot be met
# Starts the debugger in the frames of the last error; an AttributeError says that there are none.
_DEBUG = "__import__('sys').last_traceback and get_ipython().run_line_magic('debug', '')\n"
_REFUSAL_KINDS = ("environment", "requirement", "resources")

_kernel = f"kernel-{uuid.uuid4().hex[:12]}"  # the name of sessions that were given none: of this kernel alone
_sessions: dict[tuple[str, str], Session] = {}


def run_cell(shell: Any, code: str, options: argparse.Namespace) -> Run | None:
    """Run a cell on a host, as `%%fal` asks.

    Args:
        shell: the IPython shell whose names go along and come back.
        code: the cell without its first line.
        options: what `fal_notebook.magics.options` parses.

    Returns:
        The run, when it goes on in the background and was not given a name; else None.

    Raises:
        BaseException: what the cell raises.
        FalServerlessError: it cannot run, or a name cannot travel.
    """
    __tracebackhide__ = True
    host, name = get_host(options.host), options.session
    cell = NotebookCell(shell, code)
    session = session_on(host, name)
    session.adapt(options, cell)
    if options.background:
        run = session.start_in_background(cell, options)
        if options.output is None:
            return run
        shell.user_ns[options.output] = run
        return None
    session.run(cell, options)
    return None


def session_on(host: str | Host | None, name: str | None) -> Session:
    """Give what this kernel knows of a session, which need not be there.

    Args:
        host: None is the current host.
        name: of the session; None is this kernel's own.
    """
    known = get_host(host)
    key = known.name, name or _kernel
    if key not in _sessions:
        _sessions[key] = Session(known, key[1])
    return _sessions[key]


def _keeper_of(host: str | Host | None, name: str | None) -> Keeper:
    return session_on(host, name).keeper


def used_session(options: argparse.Namespace) -> tuple[Host | None, str]:
    """The host and the name of the session that a cell with these options would run in; None if it is new."""
    host, name = get_host(options.host), options.session or _kernel
    return (host if (host.name, name) in _sessions else None), name


def session_names(host: str | Host | None = None) -> list[str]:
    """The sessions that this kernel has used on a host; None is the current host."""
    host_name = get_host(host).name
    return [session.name for session in _sessions.values() if session.host.name == host_name]


def forget_sessions(host: str | Host | None = None) -> None:
    """Sessions on a host were ended; None is the current host."""
    host_name = get_host(host).name
    for key in [key for key in _sessions if key[0] == host_name]:
        _sessions.pop(key).widgets.close()


class Session:
    """What the notebook knows of one session."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        self.widgets = SessionWidgets(host)
        self._requirements: list[str] = []
        self._settings: FunctionOptions = make_options()
        self._is_fresh = False
        self._installed: list[str] = []  # by cells, beside the environment
        self.keeper = Keeper(self, _keeper_of)
        self.names = self._make_names()
        self._before: tuple[list[str], FunctionOptions, SessionNames, list[str]] | None = None

    def _make_names(self, session: str | None = None) -> SessionNames:
        name = session or self.name
        keepers[self.host.name, name] = self.keeper
        return SessionNames(self.host, name, self.keeper, self._announce)

    def _announce(self, name: str, size: int) -> None:
        """Say what travels, if it takes a while."""
        if size > _HUGE:
            sys.stderr.write(
                f"{name!r} ({bytes_as_text(size)}) goes to {self.host.name}, once: it stays there until it "
                "changes here.\n"
            )

    # ------------------------------------------------------------ what it needs

    def adapt(self, options: argparse.Namespace, cell: NotebookCell) -> None:
        """Take up what a cell's line asks for; the session starts anew if that changes its needs."""
        asked = asked_requirements(options, cell)
        requirements = asked if options.fresh else merged_lines(self._requirements, asked)
        if not options.fresh and requirements != self._requirements:
            requirements = merged_lines(self._requirements_and_installed(), asked)
        old = make_options() if options.fresh else self._settings
        settings = checked_options(
            requirements=requirements or None,
            python_version=options.python or old.python_version,
            machine_type=options.machine_type or old.machine_type,
            num_gpus=old.num_gpus if options.gpu is None else options.gpu,
            secrets=list(dict.fromkeys([*(old.secrets or ()), *options.secret])) or None,
        )
        environment_spec(
            settings.requirements, python_version=settings.python_version
        )  # refuses what is wrong
        read_secrets(settings.secrets or (), what="the cell")  # one that is missing is not remembered
        needs = dataclasses.replace(settings, secrets=self._settings.secrets)
        if needs == self._settings and not options.fresh:
            self._settings = settings  # one more secret needs no other process
            return
        if AUTO in options.require:
            display.remark(f"-r auto means: {pasted_line(cell.line, requirements)}")
        if self.names.is_used and not options.fresh:
            changed = requirements_change(self._requirements, requirements)
            why = f"its requirements have changed: {changed}" if changed else "its needs have changed"
            sys.stderr.write(f"The session on {self.host.name} starts anew: {why}.\n")
        self._before = self._requirements, self._settings, self.names, self._installed
        self._is_fresh = options.fresh or self.names.is_used
        self._requirements, self._settings, self.names = requirements, settings, self._make_names()
        self._installed = []

    def take_up_installed(self) -> None:
        """The session's process was another: what cells had installed there becomes part of what it needs."""
        added = [line for line in self._requirements_and_installed() if line not in self._requirements]
        sys.stderr.write(f"The session on {self.host.name} starts anew with {', '.join(added)}.\n")
        self._requirements += added
        self._settings = replace(self._settings, requirements=self._requirements)
        self._installed, self.names = [], self._make_names()

    def _requirements_and_installed(self) -> list[str]:
        return merged_lines(self._requirements, filter(is_requirement, self._installed))

    def _go_back(self) -> None:
        """What was asked for last cannot be had: the session goes on as it was."""
        if self._before is not None:
            self._requirements, self._settings, self.names, self._installed = self._before
            self._before = None

    def call(
        self, label: str, *, timeout: float | None, key: str = "", inputs: dict[str, str] | None = None
    ) -> Call:
        """Say what is to run, and with what."""
        settings, known = self._settings, config.load().host(self.host.name)
        fresh, self._is_fresh = self._is_fresh, False
        environ = read_secrets(settings.secrets or (), what="the cell")
        return Call(
            kind="cell",
            label=Masker(environ.values()).mask(label) if environ else label,  # it is journaled
            function=None,
            environment=self.environment(),
            resources=settings.resources(),
            scaling=settings.scaling(host_keep_alive=known.keep_alive),
            session=self.name,
            timeout=timeout,
            lease=settings.lease_seconds(host_lease=known.lease),
            folder=getattr(self.host, "working_folder", None),
            client=platform.python_version(),
            pydantic=pydantic_version(),
            scale_key=f"{os.getpid()}:session:{self.name}",
            fresh=fresh,
            environ=environ,
            key=key,
            inputs=inputs or {},
        )

    # ------------------------------------------------------------ running cells

    def run(self, cell: NotebookCell, options: argparse.Namespace) -> None:
        """Run a cell and wait for it."""
        __tracebackhide__ = True
        for _ in range(_TRIES):
            draw = display.drawer(self.widgets.bridge)
            sending = Sending(self, self.names, cell, options, self._installed)
            run = sending.start()
            if options.output is not None:
                cell.namespace[options.output] = run
            try:
                follow(run, draw)
            except BaseException as error:
                advise(error, cell)
                if not run.seen():  # it goes on there, unwatched
                    forget_earlier(self.host.name)
                if isinstance(error, _REFUSALS):
                    self._go_back()
                else:
                    sending.note_failure()
                    is_users = not isinstance(error, FalServerlessError)
                    is_users = is_users or isinstance(error, UserFunctionException)
                    display.note_error(error, (lambda: self._debug(cell.shell)) if is_users else None)
                    self.widgets.note(error)
                    if sending.has_raised:
                        self._bring_owed(cell)
                raise
            run.seen()
            self._before = None
            if sending.lacks:
                self.take_up_installed()
            elif not sending.stale:
                self._installed = sending.installed
                return
        raise FalServerlessError(
            f"session {self.name!r} on {self.host.name!r} ended {_TRIES} times while this cell was sent "
            "to it; is something else ending it?"
        )

    def _bring_owed(self, cell: NotebookCell) -> None:
        """A cell failed: bring what it had bound or changed by then.

        The cell's own error is what counts; what cannot be brought now comes with the next cell.
        """
        if not getattr(self.host, "is_connected", True):  # nobody who interrupts a cell wants to wait for it
            return
        with suppress(FalServerlessError):
            request = self.names.request_owed(cell.namespace)
            self.ask(request, cell.namespace, f"names after {cell.label}", draw=draw_connection)

    def start_in_background(self, cell: NotebookCell, options: argparse.Namespace) -> Run:
        """Start a cell; its names come back when the run's `result()` is asked for."""
        sending = Sending(self, self.names, cell, options)
        run = sending.start(display.background(cell.label, self.widgets.bridge))

        def note(done: Future[Any]) -> None:
            event = Future.result(done).event if not done.cancelled() else None  # not opened yet
            run.seen()
            if isinstance(event, Failure) and event.kind in _REFUSAL_KINDS:
                self._go_back()

        run.add_done_callback(note)
        return run

    def _debug(self, shell: Any) -> bool:
        """Let the person walk through the frames of the session's last error, on the host.

        Returns:
            False if they are not kept any more.
        """
        place = {**NotebookCell(shell, "%debug\n").place, "code": _DEBUG}
        parcel = make_request(self.call("%debug", timeout=None), Request.make(), place)
        try:
            follow(start(self.host, parcel, decode=open_reply), display.drawer(self.widgets.bridge))
        except AttributeError:
            return False
        return True

    def keep_widgets(self) -> None:
        """A run is taken up: its widgets live in this session's worker."""
        fresh = self._is_fresh
        self.widgets.belong_to(self.call("", timeout=None))
        self._is_fresh = fresh

    def names_of(self, session: str, namespace: dict[str, Any]) -> SessionNames:
        """Give what is known of the names of a session that this one takes up.

        From here on cells run in that one, unless values that the notebook uses are in the present one.
        """
        if session == self.name:
            return self.names
        if any(map(self._is_own, namespace.values())):
            return self._make_names(session)
        self.name, self.names = session, self._make_names(session)
        return self.names

    def ask(
        self,
        request: Request,
        namespace: dict[str, Any],
        label: str,
        *,
        in_full: bool = False,
        draw: Draw | None = None,
    ) -> dict[str, Any] | None:
        """Send a request that runs nothing, and take what comes back.

        Args:
            request: what `SessionNames` made.
            namespace: the notebook's.
            label: what the run is called.
            in_full: bring values however large they are.
            draw: shows what goes on; None: as for cells.

        Returns:
            What came, by name; None if the session was not as the request took it to be.
        """
        __tracebackhide__ = True

        def decode(received: Received) -> dict[str, Any] | None:
            reply, buffers = open_reply(received)
            if reply["stale"]:
                self.names.forget(reply["stale"])
                return None
            return self.names.apply(reply, buffers, request, namespace)

        call = self.call(label, timeout=None)
        parcel = make_request(call, request, _NOWHERE, _EVERYTHING if in_full else None)
        came: dict[str, Any] | None = follow(
            start(self.host, parcel, decode=decode), draw or display.drawer()
        )
        return came

    def ask_plainly(self, request: Request, label: str) -> dict[str, Any]:
        """Send a request that brings no values; give the reply."""
        __tracebackhide__ = True
        return self.ask_with_data(request, label)[0]

    def ask_with_data(
        self, request: Request, label: str, *, limit: int | None = None
    ) -> tuple[dict[str, Any], Sequence[Buffer]]:
        """Send a request that runs nothing; give the reply and the buffers beside it.

        Args:
            request: what is asked.
            label: what the run is called.
            limit: bytes of a value that comes back; None: as for cells.
        """
        __tracebackhide__ = True
        parcel = make_request(self.call(label, timeout=None), request, _NOWHERE, limit)
        answer: tuple[dict[str, Any], Sequence[Buffer]]
        answer = follow(start(self.host, parcel, decode=open_reply), display.drawer())
        return answer

    def is_there(self) -> bool:
        """Whether the session lives; asks the host, and starts nothing."""
        workers = self.host.ask("status")["workers"]
        return any(self.name in worker["sessions"] for worker in workers)

    def begin_anew(self) -> None:
        """What the session held is gone."""
        self.names = self._make_names()

    def handles_in(self, namespace: dict[str, Any]) -> list[str]:
        """Names of the notebook that are handles on what the session held."""
        return [name for name, value in namespace.items() if name[:1] != "_" and self._is_own(value)]

    def _is_own(self, value: Any) -> bool:
        return isinstance(value, Handle) and (value.host, value.session) == (self.host.name, self.name)

    def user_names(self) -> dict[str, Any]:
        """The notebook's names."""
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        return {} if shell is None else shell.user_ns

    def environment(self) -> EnvironmentSpec:
        """That the session runs in."""
        settings = self._settings
        return environment_spec(
            settings.requirements, python_version=settings.python_version, extra=worker_needs()
        )
