"""Sessions: the lasting namespaces that cells share in one worker.

Runs in a worker. What a cell needs and leaves travels as names; each has a version, so that both
ends know whether they mean the same value without sending it. The version of a value that came along
is the notebook's digest of it; a name that a cell bound gets one that is used only once.

A cell's request is a dict:

    code        str     the cell without its magic; "" to look at names only
    filename    str     what tracebacks call the cell
    first_line  int     line of `source` where `code` begins, from 1
    source      str     the whole text that `filename` stands for
    number      int     the cell's number in the notebook
    parent      str     id of the front end's message that the cell came in; "" outside of a kernel
    sharing     list    [notebook, epoch, steps]: see `fal_agent.sharing`; [] when nothing is shared
    names       dict    name -> [start, stop, version]: values that came along, slices of the parts
    shared      list    those of `names` that come as `SharedObjects.encode` makes them
    farewells   dict    name -> part: what `SharedObjects.farewells` says of names that are shared no more
    held        dict    name -> version that the session is taken to hold; "*" for whichever
    aliases     dict    name -> [name in the session, version]: another name for a value that is here
    handles     list    names of `held` of which the notebook has a handle
    deleted     list    names that the notebook deleted
    binds       list    names that the cell is certain to bind if it ends well
    may_bind    list    names that the cell may bind
    returns     bool    bring back what the cell binds or changes
    wanted      list    names whose values are to come back in any case
    lists       bool    say what names there are
    resets      bool    forget all names
    exports     list    names of `held` whose values are to be put into files
    reads       list    [path, start, size]: a piece of such a file; [] for none
    unwatched   list    those of `names` that hold what is here already: changes in them stay
    limit       int     bytes; a larger value stays, and is described
    installed   list    requirement lines that cells of the session have installed, for all the notebook knows

Its reply is a dict, with the pickles of values in a list of buffers beside it:

    stale       list    names of `held` and `aliases` that are not so, "*" if `sharing` is not; the cell
                        did not run then
    lacks       list    lines of `installed` that are not installed here; the cell did not run then
    installed   list    lines that are, after the cell
    names       dict    name -> [start, stop], slices of the list of buffers, in the order they were made
    shared      list    those of `names` that come as `SharedObjects.encode` makes them
    farewells   dict    name -> buffer: what `SharedObjects.farewells` says of names that are shared no more
    plain       dict    name -> [start, stop]: those of `shared` that take earlier ones for granted, in full;
                        for a notebook that comes back to a run of one that has gone
    types       dict    name -> type of each name that comes back, for when it cannot be opened there
    handles     dict    name -> what `describe_value` says, of each that stays, or whose description changed
    modules     dict    name -> module that it stands for
    missing     list    wanted names that are not bound
    deleted     list    names that the cell deleted
    versions    dict    name -> version, of all that came, comes back or stays
    listed      dict    name -> what `describe_briefly` says, and its "version"; but for modules
    dropped     int     number of names that were forgotten
    exported    dict    name -> [path, bytes, ""], or ["", 0, why not]
    goes_on     bool    there are widgets, and threads or tasks that may speak through them from now on
"""

from __future__ import annotations

import os
import types
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import FalServerlessError
from fal_agent.failures import OpeningError
from fal_agent.namespaces import Dumped, load_named
from fal_agent.sharing import SharedObjects
from fal_agent.silence import silence
from fal_agent.worker import comms
from fal_agent.worker.collecting import Collector, Reply
from fal_agent.worker.exports import Exports
from fal_agent.worker.overlay import installed_lines
from fal_agent.worker.previews import describe_briefly, from_device
from fal_agent.worker.traces import Trace
from fal_agent.worker.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Look
    from fal_agent.worker.context import CallContext

__all__ = ["Sessions"]

_ANY = "*"
_NOTEBOOKS = 4  # that a session shares objects with at a time


class Sessions:
    """The sessions of one worker."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}

    def run(
        self, name: str, request: dict[str, Any], parts: Sequence[Buffer], call: CallContext, *, fresh: bool
    ) -> tuple[dict[str, Any], list[Buffer]]:
        """Run a cell in a session, which is made if there is none of that name.

        Args:
            name: of the session.
            request: see above.
            parts: data of the names that came along; `request` says which part belongs to which.
            call: takes what the cell shows.
            fresh: forget the session first.

        Returns:
            The reply and the buffers it refers to; see above.

        Raises:
            OpeningError: a value that came along cannot be opened here.
            BaseException: what the cell raises. Names bound until then stay.
        """
        if fresh:
            self._sessions.pop(name, None)
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = _Session()
        return session.run(request, parts, call)

    def forget_errors(self) -> None:
        """Let go of what only the frames of a cell's error hold: a function may need the memory."""
        for session in self._sessions.values():
            session.forget_error()

    def hear(self, name: str, message: dict[str, Any], buffers: Sequence[Buffer], call: CallContext) -> bool:
        """Deliver a front end's message to a widget of a session; of one that is gone nobody hears.

        Args:
            name: of the session.
            message: "action" ("open", "msg" or "close"; "collect" only gives threads and tasks a chance to
                speak), "parent" (its id), "metadata" and "content", as Jupyter has it.
            buffers: its binary buffers.
            call: takes what the widget's callbacks show.

        Returns:
            As `goes_on` of a cell's reply.
        """
        session = self._sessions.get(name)
        return session is not None and session.hear(message, buffers, call)

    def look(self, message: Look) -> Any:
        """Say what a session's names tell about a place in a cell; see `fal_agent.worker.looking`."""
        session = self._sessions.get(message.session)
        return None if session is None else session.look(message)

    def value(self, name: str, version: str) -> Any:
        """Give the value of a version in a session.

        Raises:
            LookupError: there is no such session, or no such value in it.
        """
        return self._sessions[name].value(version)


class _Session:
    """One namespace, with the shell that runs cells in it."""

    def __init__(self) -> None:
        self._shell = _make_shell()
        self._namespace: dict[str, Any] = self._shell.user_ns
        self._own = set(self._namespace)  # IPython's
        self._versions: dict[str, str] = {}
        self._watch = Watch(self._namespace)
        self._collector = Collector(self._namespace, self._watch)
        self._owed: set[str] = (
            set()
        )  # names that failed cells bound or changed: they come with the next reply
        self._shared: dict[str, tuple[int, SharedObjects]] = {}  # notebook -> epoch, what it has in common
        self._folder: Optional[str] = None
        self._exports = Exports()

    def value(self, version: str) -> Any:
        """Give the value of a version.

        Raises:
            LookupError: there is none.
        """
        for name, known in self._versions.items():
            if known == version and name in self._namespace:
                return self._namespace[name]
        raise LookupError(version)

    def run(
        self, request: dict[str, Any], parts: Sequence[Buffer], call: CallContext
    ) -> tuple[dict[str, Any], list[Buffer]]:
        """Run a cell; see `Sessions.run`."""
        reply = Reply()
        sharing = self._sharing(request["sharing"])
        reply.stale = self._untrue(request)
        if sharing is None and request["sharing"]:
            reply.stale.append(_ANY)
        reply.installed = installed_lines()
        reply.lacks = [line for line in request["installed"] if line not in reply.installed]
        if reply.stale or reply.lacks:
            return vars(reply), []
        self._shell.become_current()
        _begin(call, request)
        is_new = sharing is None or not sharing.steps
        try:
            with silence():
                arrived = self._take(request, parts, sharing)
        except OpeningError as error:
            if is_new or isinstance(error.__cause__, ModuleNotFoundError):
                raise
            reply.stale.append(_ANY)  # something that both had is not here any more: it is sent in full
            return vars(reply), []
        left: dict[str, Optional[Dumped]] = {}
        if request["code"].strip():
            left = self._execute(request, call, reply, sharing)
        reply.installed = installed_lines()
        if request["returns"]:
            left.update(dict.fromkeys(sorted(self._owed & self._namespace.keys())))
            reply.deleted += sorted(self._owed - self._namespace.keys())
            self._owed.clear()
        self._versions.update({name: uuid.uuid4().hex for name in left})
        back = {**dict.fromkeys(request["wanted"]), **(left if request["returns"] else {})}
        with silence():
            buffers = self._collector.collect(back, request, reply, sharing, call)
        for name in {*reply.names, *reply.handles, *reply.modules}:  # `_name` too, if it was asked for
            self._versions.setdefault(name, uuid.uuid4().hex)
        if not request["returns"]:
            self._watch_anew(left, apart=True)
        self._answer(request, reply, buffers, call)
        told = {*arrived, *left, *request["wanted"], *reply.handles}
        reply.versions = {name: version for name, version in self._versions.items() if name in told}
        return vars(reply), buffers

    def forget_error(self) -> None:
        """See `Sessions.forget_errors`."""
        self._shell.forget_error()

    def hear(self, message: dict[str, Any], buffers: Sequence[Buffer], call: CallContext) -> bool:
        """Deliver a message to a widget; see `Sessions.hear`."""
        self._shell.become_current()
        _begin(call, message)
        if message["action"] == "collect":
            with self._in_own_folder():
                self._shell.let_tasks_go_on(call)
            return self._goes_on()
        msg_type, parent = f"comm_{message['action']}", message["parent"]
        whole = {
            "header": {"msg_id": parent, "msg_type": msg_type},
            "parent_header": {},
            "msg_id": parent,
            "msg_type": msg_type,
            "metadata": message["metadata"],
            "content": message["content"],
            "buffers": [memoryview(buffer) for buffer in buffers],
        }
        with self._in_own_folder():
            self._shell.run_callback(lambda: comms.deliver(message["action"], whole), call)
        return self._goes_on()

    def _goes_on(self) -> bool:
        return comms.are_open() and bool(self._shell.goes_on)

    def look(self, message: Look) -> Any:
        """As `Sessions.look`."""
        from fal_agent.worker.looking import look

        return look(self._shell, message)

    # ------------------------------------------------------------ before the cell

    def _sharing(self, told: Sequence[Any]) -> Optional[SharedObjects]:
        """Give what a notebook shares with this session; None if it takes more to be shared than is."""
        if not told:
            return None
        notebook, epoch, steps = told
        known_epoch, sharing = self._shared.get(notebook, (None, None))
        if known_epoch == epoch and sharing is not None:
            return sharing if sharing.steps == steps else None
        if steps:
            return None
        sharing = SharedObjects(self._namespace, -1)
        self._shared.pop(notebook, None)
        while len(self._shared) >= _NOTEBOOKS:
            self._shared.pop(next(iter(self._shared)))
        self._shared[notebook] = epoch, sharing
        return sharing

    def _untrue(self, request: dict[str, Any]) -> list[str]:
        """Names that the notebook takes to be here in a version that is not, and did not send."""
        held = [name for name, version in request["held"].items() if not self._has(name, version)]
        aliases = [
            name
            for name, (target, version) in request["aliases"].items()
            if not (self._has(name, version) or self._has(target, version))
        ]
        return [name for name in (*held, *aliases) if name not in request["names"]]

    def _has(self, name: str, version: str) -> bool:
        return name in self._namespace and version in (_ANY, self._versions.get(name))

    def _take(
        self, request: dict[str, Any], parts: Sequence[Buffer], sharing: Optional[SharedObjects]
    ) -> set[str]:
        """Put what came along into the namespace; nothing of it if a value cannot be opened."""
        aliases = {
            name: target
            for name, (target, version) in request["aliases"].items()
            if not self._has(name, version)
        }
        values = {name: self._namespace[target] for name, target in aliases.items()}
        versions = {name: self._versions.get(target, "") for name, target in aliases.items()}
        if sharing is not None:
            for name, part in request["farewells"].items():
                sharing.decode(name, parts[part])
            sharing.forget(
                [*request["farewells"], *request["deleted"], *request["aliases"], *request["handles"]]
            )
        for name, (start, stop, version) in request["names"].items():
            if name in request["shared"] or not self._has(name, request["held"].get(name, version)):
                opening = sharing if name in request["shared"] else None
                values[name] = self._open(name, parts[start:stop], opening)
                versions[name] = version
            if sharing is not None and name not in request["shared"]:
                sharing.forget([name])
        for name in request["deleted"]:
            if name not in self._own:
                self._drop(name)
        self._namespace.update(values)
        self._versions.update(versions)
        self._owed -= {*values, *request["deleted"]}
        unwatched = {*request["aliases"], *request["unwatched"]}
        self._watch_anew({name for name in values if name not in unwatched})
        self._watch.forget(request["unwatched"])
        self._watch.note_new(
            name for name in request["held"] if name not in {*request["handles"], *request["unwatched"]}
        )
        return set(values)

    def _open(self, name: str, parts: Sequence[Buffer], sharing: Optional[SharedObjects]) -> Any:
        try:
            if sharing is not None:
                return sharing.decode(name, parts[0])
            return load_named(parts, self._namespace)
        except ModuleNotFoundError as error:
            detail = {"module": error.name or "?", "names": [], "variable": name}
            raise OpeningError("missing", f"{name!r} needs a module: {error}", detail) from error
        except Exception as error:
            raise OpeningError(
                "deserialization", f"{name!r} cannot be opened there: {type(error).__name__}: {error}"
            ) from error

    def _drop(self, name: str) -> None:
        self._namespace.pop(name, None)
        self._versions.pop(name, None)
        self._collector.forget(name)
        self._watch.forget([name])

    def _watch_anew(self, names: Iterable[str], *, apart: bool = False) -> None:
        """The notebook holds what these names stand for now; or (`apart`) it is not to hold it."""
        for name in names:
            if name in self._namespace:
                self._watch.note(name, apart=apart)

    # ------------------------------------------------------------ the cell

    def _execute(
        self, request: dict[str, Any], call: CallContext, reply: Reply, sharing: Optional[SharedObjects]
    ) -> dict[str, Optional[Dumped]]:
        """Run the code; give the names that it bound, or whose values it changed in place."""
        before = {name: Trace(value) for name, value in self._namespace.items()}
        with self._in_own_folder():
            error = self._shell.run_cell_of(request, call)
        bound = {
            name
            for name, value in self._namespace.items()
            if name not in self._own
            and name[:1] != "_"
            and (name not in before or not before[name].is_of(value, name in request["may_bind"]))
        }
        if error is None:  # a name may have got the very value that it had
            bound |= {name for name in request["binds"] if name in self._namespace}
        read = {*request["held"], *request["names"], *request["aliases"]}
        left: dict[str, Optional[Dumped]] = {
            **dict.fromkeys(sorted(bound)),
        }
        with silence():
            left.update(self._watch.changed(read, bound, sharing))
        deleted = sorted(set(before) - set(self._namespace))
        for name in deleted:
            self._drop(name)
        if error is not None:
            if request["returns"]:
                self._owed |= {*left, *deleted}
            try:
                raise error
            finally:
                del error  # it holds this frame, which must not hold it
        reply.deleted = deleted
        return left

    @contextmanager
    def _in_own_folder(self) -> Iterator[None]:
        """Run a cell where the session's last `%cd` led."""
        if self._folder is not None:
            with suppress(FileNotFoundError, NotADirectoryError):  # it was removed since
                os.chdir(self._folder)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):  # the cell removed the folder it was in
                self._folder = os.getcwd()  # noqa: PTH109 - a plain path for os.chdir

    # ------------------------------------------------------------ questions

    def _answer(
        self, request: dict[str, Any], reply: Reply, buffers: list[Buffer], call: CallContext
    ) -> None:
        """Do what a request asks for besides running a cell."""
        if request["lists"]:
            reply.listed = self._listed()
        if request["resets"]:
            reply.dropped = self._reset()
        for name in request["exports"]:
            reply.exported[name] = self._exports.put(
                self._versions[name], from_device(self._namespace[name]), call
            )
        if request["reads"]:
            buffers.append(self._exports.read(*request["reads"]))
        reply.goes_on = self._goes_on()

    def _listed(self) -> dict[str, dict[str, Any]]:
        """Say what names there are."""
        return {
            name: {**describe_briefly(value), "version": self._versions.get(name, "")}
            for name, value in sorted(self._namespace.items())
            if name not in self._own and name[:1] != "_" and not isinstance(value, types.ModuleType)
        }

    def _reset(self) -> int:
        """Forget all names but IPython's own; give how many there were."""
        self._shell.forget_outputs()
        names = [name for name in self._namespace if name not in self._own and name[:1] != "_"]
        for name in [name for name in self._namespace if name not in self._own]:
            self._drop(name)
        self._owed.clear()
        self._shared.clear()
        return len(names)


def _begin(call: CallContext, request: dict[str, Any]) -> None:
    """A session's call begins: widgets speak through it."""
    call.parent = request.get("parent", "")
    comms.hook()
    comms.speak_for(call)


def _make_shell() -> Any:
    try:
        import IPython  # noqa: F401 - shell.py cannot be imported without
    except ModuleNotFoundError:
        raise FalServerlessError(
            "cells need IPython on the host, and this environment has none; add ipython to its requirements"
        ) from None
    from fal_agent.worker.shell import make_shell

    return make_shell()
