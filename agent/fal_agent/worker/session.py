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
    names       dict    name -> [start, stop, version]: values that came along, slices of the parts
    held        dict    name -> version that the session is taken to hold; "*" for whichever
    aliases     dict    name -> [name in the session, version]: another name for a value that is here
    deleted     list    names that the notebook deleted
    binds       list    names that the cell is certain to bind if it ends well
    may_bind    list    names that the cell may bind
    returns     bool    bring back what the cell binds
    wanted      list    names whose values are to come back in any case
    limit       int     bytes; a larger value stays, and is described
    installed   list    requirement lines that cells of the session have installed, for all the notebook knows

Its reply is a dict, with the pickles of values in a list of buffers beside it:

    stale       list    names of `held` and `aliases` that are not so; the cell did not run then
    lacks       list    lines of `installed` that are not installed here; the cell did not run then
    installed   list    lines that are, after the cell
    names       dict    name -> [start, stop], slices of the list of buffers
    types       dict    name -> type of each name that comes back, for when it cannot be opened there
    handles     dict    name -> what `describe_value` says, of each that stays
    modules     dict    name -> module that it stands for
    missing     list    wanted names that are not bound
    deleted     list    names that the cell deleted
    versions    dict    name -> version, of all that came, comes back or stays
"""

from __future__ import annotations

import os
import sys
import types
import uuid
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from fal_agent import pickling
from fal_agent.errors import FalServerlessError
from fal_agent.failures import OpeningError
from fal_agent.silence import silence
from fal_agent.worker import comms
from fal_agent.worker.overlay import installed_lines
from fal_agent.worker.previews import describe_value, from_device, is_larger, type_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.worker.context import CallContext

__all__ = ["Sessions"]

_ANY = "*"
_ATOMS = (int, float, complex, bool, type(None))


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

    def hear(self, name: str, message: dict[str, Any], buffers: Sequence[Buffer], call: CallContext) -> None:
        """Deliver a front end's message to a widget of a session; of one that is gone nobody hears.

        Args:
            name: of the session.
            message: "action" ("open", "msg" or "close"), "parent" (its id) and "content", as Jupyter has it.
            buffers: its binary buffers.
            call: takes what the widget's callbacks show.
        """
        session = self._sessions.get(name)
        if session is not None:
            session.hear(message, buffers, call)


@dataclass
class _Reply:
    """What goes back to the notebook."""

    stale: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    installed: list[str] = field(default_factory=list)
    names: dict[str, list[int]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    handles: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


class _Session:
    """One namespace, with the shell that runs cells in it."""

    def __init__(self) -> None:
        self._shell = _make_shell()
        self._namespace: dict[str, Any] = self._shell.user_ns
        self._own = set(self._namespace)  # IPython's
        self._versions: dict[str, str] = {}
        self._folder: Optional[str] = None

    def run(
        self, request: dict[str, Any], parts: Sequence[Buffer], call: CallContext
    ) -> tuple[dict[str, Any], list[Buffer]]:
        """Run a cell; see `Sessions.run`."""
        reply = _Reply()
        reply.stale = self._untrue(request)
        reply.installed = installed_lines()
        reply.lacks = [line for line in request["installed"] if line not in reply.installed]
        if reply.stale or reply.lacks:
            return vars(reply), []
        self._shell.become_current()
        _begin(call, request)
        with silence():
            arrived = self._take(request, parts)
        bound = self._execute(request, call, reply) if request["code"].strip() else set()
        reply.installed = installed_lines()
        wanted = dict.fromkeys([*request["wanted"], *(sorted(bound) if request["returns"] else ())])
        insists = not request["code"].strip()
        with silence():
            buffers = self._collect(wanted, request["limit"], reply, call, insists=insists)
        for name in {*reply.names, *reply.handles, *reply.modules}:  # `_name` too, if it was asked for
            self._versions.setdefault(name, uuid.uuid4().hex)
        told = {*arrived, *bound, *wanted}
        reply.versions = {name: version for name, version in self._versions.items() if name in told}
        return vars(reply), buffers

    def forget_error(self) -> None:
        """See `Sessions.forget_errors`."""
        self._shell.forget_error()

    def hear(self, message: dict[str, Any], buffers: Sequence[Buffer], call: CallContext) -> None:
        """Deliver a message to a widget; see `Sessions.hear`."""
        self._shell.become_current()
        _begin(call, message)
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

    # ------------------------------------------------------------ before the cell

    def _untrue(self, request: dict[str, Any]) -> list[str]:
        """Names that the notebook takes to be here in a version that is not, and did not send."""
        held = [(name, name, version) for name, version in request["held"].items()]
        aliases = [(name, target, version) for name, (target, version) in request["aliases"].items()]
        return [
            name
            for name, target, version in (*held, *aliases)
            if name not in request["names"] and not self._has(target, version)
        ]

    def _has(self, name: str, version: str) -> bool:
        return name in self._namespace and version in (_ANY, self._versions.get(name))

    def _take(self, request: dict[str, Any], parts: Sequence[Buffer]) -> set[str]:
        """Put what came along into the namespace; nothing of it if a value cannot be opened."""
        aliases = request["aliases"]
        values = {name: self._namespace[target] for name, (target, _) in aliases.items()}
        versions = {name: self._versions.get(target, version) for name, (target, version) in aliases.items()}
        for name, (start, stop, version) in request["names"].items():
            if not self._has(name, request["held"].get(name, version)):
                values[name], versions[name] = _open(name, parts[start:stop]), version
        for name in request["deleted"]:
            if name not in self._own:
                self._namespace.pop(name, None)
                self._versions.pop(name, None)
        self._namespace.update(values)
        self._versions.update(versions)
        return set(values)

    # ------------------------------------------------------------ the cell

    def _execute(self, request: dict[str, Any], call: CallContext, reply: _Reply) -> set[str]:
        """Run the code; give the names that it bound."""
        before = {name: _Trace(value) for name, value in self._namespace.items()}
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
        self._versions.update(dict.fromkeys(bound, uuid.uuid4().hex))
        reply.deleted = sorted(set(before) - set(self._namespace))
        for name in reply.deleted:
            self._versions.pop(name, None)
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame, which must not hold it
        return bound

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

    # ------------------------------------------------------------ after the cell

    def _collect(
        self, wanted: Iterable[str], limit: int, reply: _Reply, call: CallContext, *, insists: bool
    ) -> list[Buffer]:
        """Pickle the names that go back; describe those that are too large, or cannot, or hold a secret.

        Args:
            wanted: the names.
            limit: bytes of one value.
            reply: takes what is found.
            call: knows the secrets.
            insists: the value itself is asked for, also from a device's memory.
        """
        buffers: list[Buffer] = []
        for name in wanted:
            if name not in self._namespace:
                reply.missing.append(name)
                continue
            value = self._namespace[name]
            if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
                reply.modules[name] = value.__name__
                continue
            parts = _dump(from_device(value) if insists else value, limit)
            if parts is None or (not insists and call.holds_secret(parts)):
                described = describe_value(value)
                reply.handles[name] = described if call.masker is None else call.masker.mask_all(described)
            else:
                reply.names[name] = [len(buffers), len(buffers) + len(parts)]
                reply.types[name] = type_name(value)
                buffers += parts
        return buffers


class _Trace:
    """Tells whether a name still stands for a value, without keeping that: `del` frees it at once."""

    __slots__ = ("_id", "_ref")

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._ref: Any = weakref.ref(value)
        except TypeError:
            # What is small is kept. A list or the like leaves its address, which another may have got since.
            self._ref = (lambda: value) if isinstance(value, _ATOMS) else None

    def is_of(self, value: Any, may_be_new: bool) -> bool:
        """Whether this is the value; `may_be_new` says that the name may have been bound again."""
        if self._ref is None:
            return self._id == id(value) and not may_be_new
        return self._ref() is value


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


def _open(name: str, parts: Sequence[Buffer]) -> Any:
    try:
        return pickling.load(parts)
    except ModuleNotFoundError as error:
        detail = {"module": error.name or "?", "names": [], "variable": name}
        raise OpeningError("missing", f"{name!r} needs a module: {error}", detail) from error
    except Exception as error:
        raise OpeningError(
            "deserialization", f"{name!r} cannot be opened there: {type(error).__name__}: {error}"
        ) from error


def _dump(value: Any, limit: int) -> Optional[list[Buffer]]:
    """Pickle a value; None when it cannot be, is too large, or lives on a device."""
    if is_larger(value, limit):
        return None
    try:
        parts = pickling.dump_parts(value)
    except Exception:  # noqa: BLE001 - pickling runs the user's code; what cannot be pickled stays here
        return None
    return parts if sum(len(part) for part in parts) <= limit else None
