"""Which names of the notebook travel with a cell, and what comes of those that come back.

Runs in the notebook, without IPython. A name that a cell reads goes along if the notebook holds it
and the session does not hold that very value: both ends know a value by its version, which is the
digest of what travelled. Digests are taken anew for every cell, so that values changed in place are
noticed; what did not change does not travel again. Who wrote a name last is right. The rules are in
`docs/names.md`.
"""

from __future__ import annotations

import importlib
import io
import re
import uuid
import weakref
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.errors import FalServerlessError
from fal_agent.namespaces import Dumped, load_named
from fal_agent.sharing import SHARED_LIMIT, SharedObjects
from fal_notebook import local_modules
from fal_notebook.display.figures import figures_stay_closed
from fal_notebook.exchange import Known, Request, digest_in, digest_of, reference_to
from fal_notebook.handles import Handle, unopened
from fal_notebook.payload import copied, pack_named
from fal_notebook.trips import Trip, going_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fal_agent.framing import Buffer
    from fal_notebook.cells import CellNames
    from fal_notebook.hosts.base import Host

__all__ = ["SessionNames", "told_in_full"]

_ANY = "*"
_SMALL = 16 << 10  # bytes; a smaller value that both sides hold is compared for every cell
_KEPT_FETCHED = 64
_SHELLS_OWN = re.compile(r"In|Out|exit|quit|get_ipython|_+|_i+|_i?\d+|_oh|_ih|_dh")


class SessionNames:
    """What the notebook knows of the names in one session.

    Args:
        host: the host.
        session: name of the session.
        keeper: looks after the handles.
        announce: is told the name and the bytes of each value before it travels.
    """

    def __init__(
        self,
        host: Host,
        session: str,
        keeper: Any,
        announce: Callable[[str, int], None] = lambda _name, _size: None,
    ) -> None:
        self._goal, self._session, self._keeper, self._announce = host, session, keeper, announce
        self._host = host.name
        self._known: dict[str, Known] = {}
        self._unsure: dict[str, str | None] = {}  # names that a failed cell may have bound
        self._fetched: dict[str, str] = {}  # digest -> version of what handles brought
        self._brought: dict[str, Callable[[], Any]] = {}  # version -> gives that, while it lives
        self._id, self._epoch = uuid.uuid4().hex, 0
        self._shared: SharedObjects | None = None
        self._unreferenced: list[str] = []  # names there that only handles stood for, which are gone
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
        request = Request.make(binds=sorted(cell.assured), may_bind=sorted(cell.binds), returns=returns)
        request.unsure = {name: d for name, d in self._unsure.items() if digest_in(namespace, name)[0] == d}
        with (
            pickling.sending_by_value(local_modules.follow_edits()),
            going_to(self._goal, self._session) as trip,
        ):
            dumps = self._gather(request, cell, namespace, trip)
            request.content["deleted"] = self._gone(namespace, dumps)
            self._add_aliases(request, namespace)
            shared = None
            if not in_background:
                apart = request.content["unwatched"]
                large = [name for name, it in dumps.items() if it.size > SHARED_LIMIT or name in apart]
                shared = self._sharing(request, namespace, large)
            for name, dumped in dumps.items():
                self._add(request, name, namespace, dumped, shared, in_background=in_background)
        return request

    def request_of(self, handle: Handle) -> Request:
        """Ask for the value of a handle.

        Raises:
            FalServerlessError: it is gone.
        """
        name = self._place_of(handle)
        return Request.make(held={name: handle.version}, handles=[name], wanted=[name])

    def request_owed(self, namespace: dict[str, Any]) -> Request:
        """Ask for what a cell that failed has bound or changed."""
        request = Request.make(returns=True)
        self._sharing(request, namespace)
        return request

    def request_names(self, names: Sequence[str], namespace: dict[str, Any]) -> Request:
        """Ask for names that the session holds, whatever the notebook has under them."""
        request = Request.make(returns=True, wanted=list(names))
        self._sharing(request, namespace)
        return request

    def known_names(self) -> list[str]:
        """Names that the session is taken to hold."""
        return sorted(self._known)

    def held_as(self, name: str, version: str, namespace: dict[str, Any]) -> str:
        """Say what the notebook has of a name in the session; see `fal_notebook.variables.Variable`."""
        if name not in namespace:
            return ""
        known = self._known.get(name)
        if known is None or known.version != version:
            return "another"
        if isinstance(namespace[name], Handle):
            return "handle"
        return "value" if digest_in(namespace, name)[0] == known.digest else "another"

    def note_fetched(self, handle: Handle, value: Any, namespace: dict[str, Any]) -> None:
        """A handle's value was brought here: whoever binds it need not send it back."""
        digest, _ = digest_in({**namespace, handle.name: value}, handle.name)
        if digest is not None:
            self._fetched[digest] = handle.version
            self._brought[handle.version] = reference_to(value)
            for kept in (self._fetched, self._brought):
                if len(kept) > _KEPT_FETCHED:
                    del kept[next(iter(kept))]

    def _sharing(
        self, request: Request, namespace: dict[str, Any], large: Sequence[str] = ()
    ) -> SharedObjects:
        """Say what is shared; names that are shared no more (`large` ones too) tell what changed before."""
        if self._shared is None or self._shared.namespace is not namespace:
            self._epoch += 1
            self._shared = SharedObjects(namespace, 1)
        content = request.content
        content["sharing"] = [self._id, self._epoch, self._shared.steps]
        leaving = [*content["deleted"], *content["aliases"], *content["handles"], *large]
        for name, data in self._shared.farewells(leaving).items():
            request.parts.append(data)
            content["farewells"][name] = len(request.parts)
        self._shared.forget(leaving)
        return self._shared

    def _gather(
        self, request: Request, cell: CellNames, namespace: dict[str, Any], trip: Trip
    ) -> dict[str, Dumped]:
        """Pickle what the cell reads, what functions in that use, and small values that both sides hold."""
        small = {
            name for name, known in self._known.items() if known.digest is not None and known.size <= _SMALL
        }
        waiting = [*sorted(cell.reads | small, reverse=True)]
        seen: set[str] = set()
        dumps: dict[str, Dumped] = {}
        while waiting:
            name = waiting.pop()
            if name in seen or name not in namespace or _SHELLS_OWN.fullmatch(name):
                continue
            seen.add(name)
            is_unread = name in small and name not in cell.reads
            try:
                if self._is_own(namespace[name]):
                    self._add_handle(request, name, namespace[name])
                    continue
                handles = len(trip.seen)
                trip.made.clear()
                dumped = pack_named(namespace[name], name=name, namespace=namespace)
            except FalServerlessError:
                if name in cell.optional or is_unread:
                    continue
                raise
            if is_unread and self._is_as_known(name, namespace, dumped, digest_of(dumped.parts)):
                continue
            dumps[name] = dumped
            if len(trip.seen) > handles:  # what handles in it stand for is the session's own, or large
                request.content["unwatched"].append(name)
                request.bringing[name], trip.waiting = trip.waiting, []
            waiting += dumped.needs
        return dumps

    def _is_as_known(self, name: str, namespace: dict[str, Any], dumped: Dumped, digest: str) -> bool:
        """Whether the session has the value that a name stands for here, pickled and with its digest."""
        known, value = self._known.get(name), namespace[name]
        if known is None:
            return False
        if known.digest == digest and self._is_shared_as_it_was(name, value):
            return True
        if known.digest is None and self._fetched.get(digest) == known.version:
            known.digest, known.size = digest, dumped.size
            return True
        # A value whose pickle differs each time, as that of a figure does, cannot tell whether it changed.
        return (
            known.value() is value
            and not isinstance(value, Handle)
            and digest_in(namespace, name)[0] != digest
        )

    def _is_shared_as_it_was(self, name: str, value: Any) -> bool:
        """Whether a name leads to the objects that it led to: an equal list may be another one."""
        shared = self._shared
        if (
            shared is None
            or type(value) in pickling.ATOMS
            or not (shared.has(name) and shared.is_quick(name))
        ):
            return True  # as far as its pickle tells
        try:
            return shared.is_current(name, value)
        except Exception:  # noqa: BLE001 - it cannot be taken apart, which is told elsewhere if it matters
            return False

    def _gone(self, namespace: dict[str, Any], dumps: dict[str, Dumped]) -> list[str]:
        """Names that the notebook deleted, or that stand for something else here, where a handle was."""
        unreferenced, self._unreferenced[:] = list(self._unreferenced), []
        return unreferenced + [
            name
            for name, known in self._known.items()
            if known.is_here
            and (
                name not in namespace
                or (known.digest is None and name not in dumps and self._is_replaced(known, namespace[name]))
            )
        ]

    def _is_replaced(self, known: Known, value: Any) -> bool:
        """Whether a name that had a handle stands for something else."""
        brought = self._brought.get(known.version)
        return not isinstance(value, Handle) and (brought is None or brought() is not value)

    def _add(
        self,
        request: Request,
        name: str,
        namespace: dict[str, Any],
        dumped: Dumped,
        shared: SharedObjects | None,
        *,
        in_background: bool,
    ) -> None:
        digest, version = digest_of(dumped.parts), None
        request.inputs[name] = digest
        if name in request.unsure:
            version = _ANY
        elif self._is_as_known(name, namespace, dumped, digest):
            version = self._known[name].version
        if version is not None:
            request.content["held"][name] = version
            if not in_background:
                return
        for bring in request.bringing.get(name, ()):
            bring()
        self._announce(name, dumped.size)
        is_apart = dumped.size > SHARED_LIMIT or name in request.content["unwatched"]
        if shared is not None and not is_apart:
            try:
                data = shared.encode(name, namespace[name])
            except Exception:  # noqa: BLE001 - it could be pickled; it just cannot be taken apart
                shared.forget([name])
            else:
                request.add(name, [data], digest, dumped.size)
                request.content["shared"].append(name)
                return
        elif shared is not None:
            shared.forget([name])
        request.add(name, copied(dumped.parts) if in_background else dumped.parts, digest, dumped.size)

    def _add_handle(self, request: Request, name: str, handle: Handle) -> None:
        request.content["handles"].append(name)
        request.inputs[name] = handle.version
        place = self._place_of(handle)
        if place == name:
            request.content["held"][name] = handle.version
        else:
            request.content["aliases"][name] = [place, handle.version]

    def _is_own(self, value: Any) -> bool:
        """Whether this is a handle of the session; one of another travels as its value."""
        return isinstance(value, Handle) and (value.host, value.session) == (self._host, self._session)

    def _add_aliases(self, request: Request, namespace: dict[str, Any]) -> None:
        """Let other names of handles keep their values there, whatever becomes of the first names."""
        for name, value in list(namespace.items()):
            if not self._is_own(value) or name in request.content["handles"] or _SHELLS_OWN.fullmatch(name):
                continue
            place = self._place_of(value)
            if place in self._known and place != name:
                request.content["aliases"][name] = [place, value.version]
                request.content["handles"].append(name)

    def _place_of(self, handle: Handle) -> str:
        """A name that stands for a handle's value there."""
        names = (name for name, known in self._known.items() if known.version == handle.version)
        found = sorted(names, key=lambda name: name != handle.name)
        return found[0] if found else handle.name

    # ------------------------------------------------------------ back

    def apply(
        self,
        reply: dict[str, Any],
        buffers: Sequence[Buffer],
        request: Request,
        namespace: dict[str, Any],
        *,
        is_own: bool = True,
    ) -> dict[str, Any]:
        """Put what came back into the notebook; give it by name.

        Args:
            reply: see `fal_agent.worker.session`.
            buffers: beside it.
            request: what was asked.
            namespace: the notebook's.
            is_own: it answers this notebook, and not one that has gone.
        """
        self._settle(request)
        versions = reply["versions"]
        shared = self._shared if request.content["sharing"] and is_own else None
        if not is_own:  # what that one had in common with the session is told in full, too
            shared, reply = SharedObjects(namespace, 1), told_in_full(reply)
        if shared is not None:
            for name, buffer in reply["farewells"].items():
                shared.decode(name, buffers[buffer])
            shared.forget([*reply["farewells"], *reply["handles"], *reply["modules"], *reply["deleted"]])
        came: dict[str, Any] = {}
        for name, (start, stop) in reply["names"].items():
            parts = buffers[start:stop]
            if shared is not None and name not in reply["shared"]:
                shared.forget([name])
            try:
                came[name] = self._open(name, parts, namespace, shared if name in reply["shared"] else None)
            except Exception as error:  # noqa: BLE001 - opening runs the user's code; then it stays there
                told = unopened(reply["types"].get(name), parts, error)
                came[name] = self._handle(name, told, versions[name])
        for name, described in reply["handles"].items():
            came[name] = self._handle(name, described, versions[name], namespace.get(name))
        for name, module in reply["modules"].items():
            came[name] = self._import(name, module, versions[name])
        namespace.update(came)
        for name, version in versions.items():
            self._note(name, version, request, namespace, has_come=name in came)
        for name in reply["deleted"]:
            self._known.pop(name, None)
            if request.content["returns"]:
                namespace.pop(name, None)
        return came

    def _note(
        self, name: str, version: str, request: Request, namespace: dict[str, Any], *, has_come: bool
    ) -> None:
        """Know what both sides hold under a name."""
        if not has_come and name in request.sent:
            digest, size = request.sent[name]
        else:
            digest, size = digest_in(namespace, name)  # type: ignore[assignment]
        value = reference_to(namespace.get(name))
        self._known[name] = Known(version, digest, size, name in namespace, value)

    def forget(self, names: Iterable[str]) -> None:
        """The session does not hold these as was thought."""
        for name in names:
            self._known.pop(name, None)
            self._unsure.pop(name, None)
        self._shared = None

    def note_failure(self, cell: CellNames, request: Request, namespace: dict[str, Any]) -> None:
        """A cell raised: what it needed has arrived, and it may have bound some of its names."""
        self._settle(request)
        self._unsure = dict(request.unsure)
        for name, (digest, size) in request.sent.items():
            self._known[name] = Known(digest, digest, size, value=reference_to(namespace.get(name)))
        if request.content["returns"]:
            self._unsure.update((name, digest_in(namespace, name)[0]) for name in cell.binds)

    def _settle(self, request: Request) -> None:
        """A request has been heard."""
        self._unsure = {}
        for name in request.content["deleted"]:
            self._known.pop(name, None)

    def _open(
        self, name: str, parts: Sequence[Buffer], namespace: dict[str, Any], shared: SharedObjects | None
    ) -> Any:
        with figures_stay_closed():
            if shared is None:
                return load_named(parts, namespace)
            try:
                return shared.decode(name, parts[0])
            except BaseException:
                self._shared = None  # it is not known what was done of it: both sides begin anew
                raise

    def _import(self, name: str, module: str, version: str) -> Any:
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it was heard there
                return importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - missing or broken here: the name stands for the host's
            why = f"cannot be imported here: {type(error).__name__}: {error}"
            return self._handle(name, {"type": f"module {module}", "repr": why}, version)

    def _handle(self, name: str, described: dict[str, Any], version: str, before: Any = None) -> Handle:
        if isinstance(before, Handle) and before.version == version:
            before.describe(described)  # other names may stand for it too
            return before
        return Handle(
            self._host, self._session, name, version=version, described=described, keeper=self._keeper
        )

    def take_handle(self, name: str, place: str, described: dict[str, Any], version: str) -> Handle:
        """Make a handle on a value that the session got under a name that the notebook does not have.

        The value is let go with the handle, when the next cell runs.
        """
        handle = self._handle(name, described, version)
        self._known[place] = Known(version, is_here=False)
        weakref.finalize(handle, self._unreferenced.append, place)
        return handle

    def names_of(self, handle: Handle) -> list[str]:
        """All names that a handle's value has in the session."""
        return [name for name, known in self._known.items() if known.version == handle.version] or [
            handle.name
        ]

    def drop(self, names: Iterable[str]) -> None:
        """The session has deleted these."""
        for name in names:
            self._known.pop(name, None)
            if self._shared is not None:
                self._shared.forget([name])


def told_in_full(reply: dict[str, Any]) -> dict[str, Any]:
    """Read a session's reply as one who has nothing in common with it: what its notebook had is told, too."""
    plain = reply["plain"]
    shared = [name for name in reply["shared"] if name not in plain]
    return {**reply, "names": {**reply["names"], **plain}, "shared": shared, "farewells": {}}
