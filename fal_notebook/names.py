"""Which names of the notebook travel with a cell, and what comes of those that come back.

Runs in the notebook, without IPython. A name that a cell reads goes along if the notebook holds it
and the session does not hold that very value: both ends know a value by its version, which is the
digest of what travelled. Digests are taken anew for every cell, so that values changed in place are
noticed; what did not change does not travel again. Who wrote a name last is right.
"""

from __future__ import annotations

import importlib
import io
import re
import weakref
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.errors import FalSerializationError, FalServerlessError
from fal_notebook.display.figures import figures_stay_closed
from fal_notebook.handles import Handle
from fal_notebook.payload import pack_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fal_agent.framing import Buffer
    from fal_notebook.cells import CellNames

__all__ = ["Request", "SessionNames"]

_ANY = "*"
_LARGE = 1 << 20  # bytes that are hashed by several threads
_SHELLS_OWN = re.compile(r"In|Out|exit|quit|get_ipython|_+|_i+|_i?\d+|_oh|_ih|_dh")


@dataclass
class Request:
    """What travels with a cell; see `fal_agent.worker.session`.

    Attributes:
        content: the request itself.
        parts: the pickles of names, and their buffers; the request comes before them.
        sent: name -> digest, of what travels.
        unsure: name -> digest here, of those that a failed cell may have bound.
        inputs: name -> digest here, or version on the host, of what the cell reads.
    """

    content: dict[str, Any]
    parts: list[Buffer] = field(default_factory=list)
    sent: dict[str, str] = field(default_factory=dict)
    unsure: dict[str, str | None] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, parts: Sequence[Buffer], version: str) -> None:
        """Let a value travel."""
        start = len(self.parts) + 1  # the request itself is part 0
        self.content["names"][name] = [start, start + len(parts), version]
        self.parts += parts
        self.sent[name] = version


@dataclass
class _Known:
    """What is known of one name.

    Attributes:
        version: of the session's value.
        digest: of the notebook's value when the two agreed; None when the notebook had none of its own.
        is_here: whether the notebook had something under that name.
        value: gives the notebook's value of then, while that lives.
    """

    version: str
    digest: str | None = None
    is_here: bool = True
    value: Callable[[], Any] = lambda: None


class SessionNames:
    """What the notebook knows of the names in one session.

    Args:
        host: name of the host.
        session: name of the session.
        fetch: brings the value of a handle.
    """

    def __init__(self, host: str, session: str, fetch: Callable[[Handle], Any]) -> None:
        self._host, self._session, self._fetch = host, session, fetch
        self._known: dict[str, _Known] = {}
        self._unsure: dict[str, str | None] = {}  # names that a failed cell may have bound
        self.is_used = False  # whether a cell has been prepared

    # ------------------------------------------------------------ there

    def request(
        self, cell: CellNames, namespace: dict[str, Any], *, returns: bool, in_background: bool = False
    ) -> Request:
        """Gather what a cell needs.

        Args:
            cell: its names.
            namespace: the notebook's.
            returns: whether what it binds comes back.
            in_background: send everything, also what the session should have: nobody will be there
                to send it again if it has not. Values are copied, since they may change meanwhile.

        Raises:
            FalSerializationError: a name that the cell needs cannot be pickled; the message names it.
            FalServerlessError: a name stands for a value on another host.
        """
        self.is_used = True
        deleted = [name for name, known in self._known.items() if known.is_here and name not in namespace]
        request = Request({
            "names": {}, "held": {}, "aliases": {}, "deleted": deleted, "binds": sorted(cell.assured),
            "may_bind": sorted(cell.binds), "returns": returns, "wanted": [], "installed": [],
        })  # fmt: skip
        request.unsure = {name: d for name, d in self._unsure.items() if _digest_in(namespace, name) == d}
        request.content["wanted"] = sorted(request.unsure)
        for name in sorted(cell.reads & namespace.keys()):
            if _SHELLS_OWN.fullmatch(name):
                continue
            try:
                self._add(request, name, namespace[name], in_background=in_background)
            except FalServerlessError:
                if name not in cell.optional:
                    raise
        return request

    def _add(self, request: Request, name: str, value: Any, *, in_background: bool) -> None:
        if isinstance(value, Handle):
            request.inputs[name] = value.version
            self._add_handle(request, name, value)
            return
        version = None
        if name in request.unsure:
            version = _ANY
            if not in_background:
                request.content["held"][name] = version
                return
        parts = pack_value(value, name=name, snapshot=in_background)
        digest = request.inputs[name] = _digest(parts)
        known = self._known.get(name)
        if (version is None and known is not None) and (
            known.digest == digest or (known.value() is value and _is_unsteady(name, value, digest))
        ):
            version = known.version
        if version is not None:
            request.content["held"][name] = version
        if version is None or in_background:
            request.add(name, parts, digest)

    def _add_handle(self, request: Request, name: str, handle: Handle) -> None:
        if (handle.host, handle.session) != (self._host, self._session):
            raise FalServerlessError(
                f"{name!r} stayed on {handle.host!r} in session {handle.session!r}, and this cell runs on "
                f"{self._host!r} in session {self._session!r}; bring it here first: {name} = {name}.get()"
            )
        if handle.name == name:
            request.content["held"][name] = handle.version
        else:
            request.content["aliases"][name] = [handle.name, handle.version]

    # ------------------------------------------------------------ back

    def apply(
        self, reply: dict[str, Any], buffers: Sequence[Buffer], request: Request, namespace: dict[str, Any]
    ) -> dict[str, Any]:
        """Put what came back into the notebook; give it by name.

        Args:
            reply: see `fal_agent.worker.session`.
            buffers: beside it.
            request: what was asked.
            namespace: the notebook's.
        """
        self._settle(request)
        versions = reply["versions"]
        came: dict[str, Any] = {}
        for name, (start, stop) in reply["names"].items():
            came[name] = self._open(
                name, buffers[start:stop], reply["types"].get(name, "object"), versions[name]
            )
        for name, described in reply["handles"].items():
            came[name] = self._handle(name, described, versions[name])
        for name, module in reply["modules"].items():
            came[name] = self._import(name, module, versions[name])
        namespace.update(came)
        for name, version in versions.items():
            value = came.get(name)
            digest = None if isinstance(value, Handle) else _digest_in(namespace, name)
            if name not in came:
                digest = request.sent.get(name, digest)
            is_here = name in namespace
            self._known[name] = _Known(version, digest, is_here, _reference(namespace.get(name)))
        for name in reply["deleted"]:
            self._known.pop(name, None)
            if request.content["returns"]:
                namespace.pop(name, None)
        return came

    def forget(self, names: Iterable[str]) -> None:
        """The session does not hold these as was thought."""
        for name in names:
            self._known.pop(name, None)
            self._unsure.pop(name, None)

    def note_failure(self, cell: CellNames, request: Request, namespace: dict[str, Any]) -> None:
        """A cell raised: what it needed has arrived, and it may have bound some of its names."""
        self._settle(request)
        self._unsure = dict(request.unsure)
        for name, digest in request.sent.items():
            self._known[name] = _Known(digest, digest, value=_reference(namespace.get(name)))
        if request.content["returns"]:
            self._unsure.update((name, _digest_in(namespace, name)) for name in cell.binds)

    def _settle(self, request: Request) -> None:
        """A request has been heard."""
        self._unsure = {}
        for name in request.content["deleted"]:
            self._known.pop(name, None)

    def _open(self, name: str, parts: Sequence[Buffer], type_name: str, version: str) -> Any:
        try:
            with figures_stay_closed():
                return pickling.load(parts)
        except Exception as error:  # noqa: BLE001 - a class that is missing here, a device: it stays there then
            size = sum(len(part) for part in parts)
            why = f"cannot be opened here: {type(error).__name__}: {error}"
            return self._handle(name, {"type": type_name, "size": size, "repr": why}, version)

    def _import(self, name: str, module: str, version: str) -> Any:
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it was heard there
                return importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - missing or broken here: the name stands for the host's
            why = f"cannot be imported here: {type(error).__name__}: {error}"
            return self._handle(name, {"type": f"module {module}", "repr": why}, version)

    def _handle(self, name: str, described: dict[str, Any], version: str) -> Handle:
        return Handle(
            self._host, self._session, name, version=version, described=described, fetch=self._fetch
        )


def _digest_in(namespace: dict[str, Any], name: str) -> str | None:
    """The digest of what a name stands for; None if it is nothing that could travel."""
    value = namespace.get(name)
    if name not in namespace or isinstance(value, Handle):
        return None
    try:
        return _digest(pack_value(value, name=name, snapshot=False))
    except FalSerializationError:
        return None


def _is_unsteady(name: str, value: Any, digest: str) -> bool:
    """Whether a value's pickle differs each time, as that of a figure does: it cannot tell a change then."""
    return _digest(pack_value(value, name=name, snapshot=False)) != digest


def _reference(value: Any) -> Callable[[], Any]:
    """Give what gives a value while it lives; None afterwards, and for what cannot be referred to weakly."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: None


def _digest(parts: Sequence[Buffer]) -> str:
    """Give 32 hex digits (128 bits of BLAKE3) that name a value by its pickle."""
    from blake3 import blake3

    hasher = blake3(max_threads=blake3.AUTO) if sum(map(len, parts)) > _LARGE else blake3()
    for part in parts:
        hasher.update(b"%d:" % len(part))
        hasher.update(part)
    return hasher.hexdigest(length=16)
