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
import re
import sys
import uuid
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.errors import (
    EnvironmentBuildError,
    FalServerlessError,
    RequirementError,
    ResourceError,
    UserFunctionException,
)
from fal_agent.masking import Masker
from fal_agent.silence import silence
from fal_agent.wire import Call, Failure
from fal_notebook import config, display
from fal_notebook.advice import line_with, missing_in, requirements_change
from fal_notebook.environment import (
    environment_spec,
    is_requirement,
    pep723_block,
    pydantic_version,
    read_requirements_file,
    worker_needs,
)
from fal_notebook.exchange import Request
from fal_notebook.handles import Handle, bytes_as_text, keepers
from fal_notebook.hosts.base import ShowsRuns
from fal_notebook.hosts.registry import get_host
from fal_notebook.inference import infer_requirements
from fal_notebook.keeping import Keeper
from fal_notebook.names import SessionNames
from fal_notebook.notebook_cell import NotebookCell
from fal_notebook.options import FunctionOptions, make_options
from fal_notebook.payload import make_parcel
from fal_notebook.rebuild import add_note
from fal_notebook.returning import cell_key, find_earlier, forget_earlier, told
from fal_notebook.run import Draw, Run, follow, start
from fal_notebook.secrets import read_secrets
from fal_notebook.widgets import SessionWidgets

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import EnvironmentSpec
    from fal_notebook.hosts.base import Host, Parcel, Received

__all__ = [
    "RETURN_LIMIT",
    "Session",
    "forget_session",
    "forget_sessions",
    "run_cell",
    "session_names",
    "session_on",
    "used_session",
]

RETURN_LIMIT = 1 << 20  # bytes; a larger value stays on the host. FAL_NOTEBOOK_RETURN_LIMIT overrules it

_EVERYTHING = 1 << 62  # bytes
_HUGE = 64 << 20  # bytes; a larger value is named before it travels
_NOWHERE = {"code": "", "filename": "", "first_line": 1, "source": "", "number": 0}
_TRIES = 3  # the session may be started anew between two of them
_AUTO = "auto"
_REQUIRE_AUTO = re.compile(r"(?:-r|--require)[ =]?auto(?=\s|$)")
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


def forget_session(session: Session) -> None:
    """What a session held is gone; it may be started anew with the same requirements."""
    session.begin_anew()


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
        asked = _requirements(options, cell)
        requirements = asked if options.fresh else _merged(self._requirements, asked)
        if not options.fresh and requirements != self._requirements:
            requirements = _merged(self._requirements_and_installed(), asked)
        old = make_options() if options.fresh else self._settings
        settings = _checked(
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
        if _AUTO in options.require:
            display.remark(f"-r auto means: {_pasted(cell.line, requirements)}")
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
        return _merged(self._requirements, filter(is_requirement, self._installed))

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
            sending = _Sending(self, self.names, cell, options, self._installed)
            run = sending.start()
            if options.output is not None:
                cell.namespace[options.output] = run
            try:
                follow(run, draw)
            except BaseException as error:
                _advise(error, cell)
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
                        self._bring_owed_quietly(cell)
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

    def _bring_owed_quietly(self, cell: NotebookCell) -> None:
        """The cell's own error is what counts; what cannot be brought now comes with the next cell."""
        with suppress(FalServerlessError):
            self._bring_owed(cell)

    def start_in_background(self, cell: NotebookCell, options: argparse.Namespace) -> Run:
        """Start a cell; its names come back when the run's `result()` is asked for."""
        sending = _Sending(self, self.names, cell, options)
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
        parcel = _parcel(self.call("%debug", timeout=None), Request.make(), place)
        try:
            follow(start(self.host, parcel, decode=_decode), display.drawer(self.widgets.bridge))
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
        own = (self.host.name, self.name)
        handles = [value for value in namespace.values() if isinstance(value, Handle)]
        if any((handle.host, handle.session) == own for handle in handles):
            return self._make_names(session)
        self.name, self.names = session, self._make_names(session)
        return self.names

    def ask(
        self,
        request: Request,
        namespace: dict[str, Any],
        label: str,
        *,
        limit: int | None = RETURN_LIMIT,
        draw: Draw | None = None,
    ) -> dict[str, Any] | None:
        """Send a request that runs nothing, and take what comes back.

        Args:
            request: what `SessionNames` made.
            namespace: the notebook's.
            label: what the run is called.
            limit: bytes of a value that comes back; None: any number.
            draw: shows what goes on; None: as for cells.

        Returns:
            What came, by name; None if the session was not as the request took it to be.
        """
        __tracebackhide__ = True

        def decode(received: Received) -> dict[str, Any] | None:
            reply, buffers = _decode(received)
            if reply["stale"]:
                self.names.forget(reply["stale"])
                return None
            return self.names.apply(reply, buffers, request, namespace)

        call = self.call(label, timeout=None)
        parcel = _parcel(call, request, _NOWHERE, _EVERYTHING if limit is None else _return_limit())
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
        parcel = _parcel(self.call(label, timeout=None), request, _NOWHERE, limit)
        answer: tuple[dict[str, Any], Sequence[Buffer]]
        answer = follow(start(self.host, parcel, decode=_decode), display.drawer())
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
        return [
            name
            for name, value in namespace.items()
            if isinstance(value, Handle)
            and name[:1] != "_"
            and (value.host, value.session) == (self.host.name, self.name)
        ]

    def _bring_owed(self, cell: NotebookCell) -> None:
        """A cell failed: bring what it had bound or changed by then."""
        request = self.names.request_owed(cell.namespace)
        self.ask(request, cell.namespace, f"names after {cell.label}", draw=_draw_nothing)

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


class _Sending:
    """One cell on its way to its session and back.

    Attributes:
        stale: names that the session did not hold as was thought, so that the cell did not run.
        lacks: requirement lines that were not installed as was thought, likewise.
        installed: those that cells have installed beside the environment.
        run: the run, once it has been started.
    """

    run: Run | None = None

    def __init__(
        self,
        session: Session,
        names: SessionNames,
        cell: NotebookCell,
        options: argparse.Namespace,
        installed: Sequence[str] = (),
    ) -> None:
        self.stale: list[str] = []
        self.lacks: list[str] = []
        self.installed = list(installed)
        self._is_attached = False
        self._session, self._names, self._cell, self._options = session, names, cell, options
        with silence():
            self._request = names.request(
                cell.names, cell.namespace, returns=not options.no_return, in_background=options.background
            )

    def start(self, on_event: Draw | None = None) -> Run:
        """Send the cell; or show an earlier run of it, whose notebook has gone."""
        host, inputs = self._session.host, self._request.inputs
        folder = getattr(host, "working_folder", None)
        key = cell_key(self._cell.namespace, self._cell.place["code"], self._options, folder=folder)
        earlier = None if self._options.again else find_earlier(host, key)
        if earlier is not None and isinstance(host, ShowsRuns):
            others = earlier.other_inputs(inputs)
            sys.stderr.write(told(earlier, host.name, others))
            if earlier.is_worth_showing and not earlier.is_watched and not others:
                self._names = self._session.names_of(earlier.session, self._cell.namespace)
                self._session.keep_widgets()
                self._is_attached = True
                self.run = Run.attached(
                    host, earlier.run_id, label=self._cell.label, decode=self.decode, on_event=on_event
                )
                return self.run
        self._request.content["installed"] = self.installed
        call = self._session.call(self._cell.label, timeout=self._options.timeout, key=key, inputs=inputs)
        self._session.widgets.belong_to(call)
        parcel = _parcel(call, self._request, self._cell.place)
        self.run = start(host, parcel, decode=self.decode, on_event=on_event)
        return self.run

    @property
    def has_raised(self) -> bool:
        """Whether the cell itself raised, so that its session is as it left it."""
        event = Future.result(self.run).event if self.run is not None and self.run.done() else None
        return isinstance(event, Failure) and event.kind in ("user", "interrupted")

    def decode(self, received: Received) -> dict[str, Any]:
        """Take what came back; give the names that the notebook has got."""
        reply, buffers = _decode(received)
        self.stale, self.lacks, self.installed = reply["stale"], reply["lacks"], reply["installed"]
        if reply["goes_on"]:
            self._session.widgets.watch()
        if self.lacks:
            return {}
        if not self.stale:
            with silence():
                came = self._names.apply(
                    reply, buffers, self._request, self._cell.namespace, is_own=not self._is_attached
                )
            is_kept = self._options.background or self._options.output is not None
            return came if is_kept else {}  # a run that nobody has must not keep values alive
        self._names.forget(self.stale)
        lost = [
            name
            for name in self.stale
            if name in self._cell.names.reads and isinstance(self._cell.namespace.get(name), Handle)
        ]
        if lost:
            raise _lost(lost, self._session.host.name)
        return {}

    def note_failure(self) -> None:
        """The cell did not end well."""
        with silence():
            self._names.note_failure(self._cell.names, self._request, self._cell.namespace)


# ---------------------------------------------------------------- data


def _parcel(call: Call, request: Request, place: dict[str, Any], limit: int | None = None) -> Parcel:
    content = {**request.content, **place, "limit": _return_limit() if limit is None else limit}
    return make_parcel(call, None, [pickling.dump(content)[0], *request.parts])


def _decode(received: Received) -> tuple[dict[str, Any], Sequence[Buffer]]:
    return pickling.load(received.data[:1]), received.data[1:]


def _draw_nothing(_received: Received) -> None:
    """What a question that nobody asked shows: a face would take the place of the cell's error."""


def _return_limit() -> int:
    text = os.environ.get("FAL_NOTEBOOK_RETURN_LIMIT", "")
    return int(text) if text.isdecimal() else RETURN_LIMIT


def _lost(names: Sequence[str], host_name: str) -> FalServerlessError:
    listed = ", ".join(map(repr, names))
    return FalServerlessError(
        f"{listed} stayed on {host_name!r}, and is gone: the session was started anew, or the name "
        "stands for something else now; run the cell that makes it again"
    )


# ---------------------------------------------------------------- what a cell's line asks for


def _requirements(options: argparse.Namespace, cell: NotebookCell) -> list[str]:
    """Give the requirement lines that a cell asks for, in its line and in a PEP 723 block."""
    lines = [line for line in options.require if line != _AUTO]
    if _AUTO in options.require:
        lines = _merged(infer_requirements(sorted(cell.imports())), lines)
    if options.requirements_file is not None:
        lines += read_requirements_file(options.requirements_file)
    block = pep723_block(cell.place["code"])
    return lines if block is None else [*lines, *block.dependencies]


def _pasted(line: str, requirements: Iterable[str]) -> str:
    """Give a magic's line with these requirements instead of `-r auto`."""
    words = [word for word in re.split(r"\s+", _REQUIRE_AUTO.sub("", line)) if word]
    pasted = " ".join(words) or "%%fal"
    for requirement in requirements:
        pasted = line_with(pasted, requirement)
    return pasted


def _advise(error: BaseException, cell: NotebookCell) -> None:
    """Add the line to run to an error that tells of something missing on the host."""
    requirement = missing_in(error)
    if requirement is not None and cell.line.startswith("%%"):
        add_note(error, f"run the cell with: {line_with(cell.line, requirement)}")


def _merged(lines: Iterable[str], others: Iterable[str]) -> list[str]:
    """Put requirement lines together; of two for one distribution, the later counts."""
    by_name = {_distribution(line): line for line in lines}
    for line in others:
        if line not in by_name.values():
            by_name[_distribution(line)] = line
    return list(by_name.values())


def _distribution(line: str) -> str:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    try:
        return canonicalize_name(Requirement(line).name)
    except InvalidRequirement:  # said where the environment is made
        return line


def _checked(**config_: Any) -> FunctionOptions:
    """Check what a magic's line says; a mistake is said in a line, as of any magic."""
    try:
        return make_options(**config_)
    except FalServerlessError:
        raise
    except ValueError as error:
        from IPython.core.error import UsageError

        raise UsageError(str(error)) from None
