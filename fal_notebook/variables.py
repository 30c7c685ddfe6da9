"""What a session holds, and moving names there and back by request: `%fal push`, `pull`, `vars`, `reset`.

Runs in the notebook. Nothing here starts a session that is not there, but `push`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError
from fal_notebook.cells import CellNames
from fal_notebook.exchange import Request
from fal_notebook.handles import Handle, bytes_as_text
from fal_notebook.session import session_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fal_notebook.hosts.base import Host
    from fal_notebook.session import Session

__all__ = ["NameNotFoundError", "Variable", "known_names", "pull", "push", "reset", "variables"]


class NameNotFoundError(FalServerlessError):
    """A name that was asked for is not there; the message says what is like it."""


@dataclass(frozen=True)
class Variable:
    """A name in a session.

    Attributes:
        name: the name.
        type: its qualified type: "numpy.ndarray".
        shape: of an array or a table, else None.
        dtype: text, or None.
        length: of a text or a container, else None.
        size: bytes, where that is known; else None.
        device: where a tensor lives, or None.
        here: what the notebook has of it: "value", "handle", "another" (something else), or "".
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    dtype: str | None
    length: int | None
    size: int | None
    device: str | None
    here: str


def push(
    namespace: dict[str, Any],
    names: Sequence[str],
    *,
    host: Host | str | None = None,
    session: str | None = None,
) -> dict[str, str]:
    """Send names of the notebook to a session, which is started if it is not there.

    Args:
        namespace: the notebook's.
        names: what to send.
        host: where to; None is the current host.
        session: its name; None is this kernel's own.

    Returns:
        What became of each name: its size as text, or "was there".

    Raises:
        NameNotFoundError: the notebook has no such name; nothing is sent then.
        FalSerializationError: one cannot be pickled; the message names it.
    """
    _check(names, namespace, "the notebook")
    there = session_on(host, session)
    sent: dict[str, int] = {}

    def ask() -> dict[str, Any] | None:
        request = there.names.request(CellNames(reads=frozenset(names)), namespace, returns=False)
        sent.clear()
        sent.update((name, size) for name, (_, size) in request.sent.items())
        return there.ask(request, namespace, f"push {', '.join(names)}")

    if ask() is None and ask() is None:  # it was started anew in between
        raise FalServerlessError(f"session {there.name!r} on {there.host.name!r} ended while it was sent to")
    return {name: bytes_as_text(sent[name]) if name in sent else "was there" for name in names}


def pull(
    namespace: dict[str, Any],
    names: Sequence[str],
    *,
    host: Host | str | None = None,
    session: str | None = None,
) -> dict[str, Any]:
    """Bring names of a session into the notebook, as values, however large they are.

    Args:
        namespace: the notebook's.
        names: what to bring; a name that the notebook has is overwritten.
        host: where from; None is the current host.
        session: its name; None is this kernel's own.

    Returns:
        The values by name.

    Raises:
        NameNotFoundError: the session has no such name; nothing is brought then.
        FalServerlessError: a value cannot be pickled, or the session is not there.
    """
    there = _existing(host, session)
    found = {variable.name for variable in _listed(there, namespace)}
    _check(names, found, f"session {there.name!r} on {there.host.name!r}")
    request = there.names.request_names(names, namespace)
    came = there.ask(request, namespace, f"pull {', '.join(names)}", in_full=True) or {}
    stayed = [name for name in names if isinstance(came.get(name), Handle)]
    if stayed:
        raise FalServerlessError(
            f"{', '.join(map(repr, stayed))} cannot be brought here from {there.host.name!r}: it cannot be "
            "pickled, or not be opened here; the notebook has a handle on it"
        )
    return {name: came[name] for name in names}


def variables(
    namespace: dict[str, Any], *, host: Host | str | None = None, session: str | None = None
) -> list[Variable]:
    """List the names of a session, but for modules; empty if there is no such session.

    Args:
        namespace: the notebook's.
        host: where; None is the current host.
        session: its name; None is this kernel's own.
    """
    there = session_on(host, session)
    return _listed(there, namespace) if there.is_there() else []


def reset(
    namespace: dict[str, Any],
    *,
    host: Host | str | None = None,
    session: str | None = None,
    restart: bool = False,
) -> tuple[int | None, list[str]]:
    """Take all names out of a session, or end it.

    Args:
        namespace: the notebook's, whose names stay as they are.
        host: where; None is the current host.
        session: its name; None is this kernel's own.
        restart: end its process too, with what is imported and cached there; the next cell starts another.

    Returns:
        How many names there were, None if its process was ended or there was none; and the names of
        the notebook's handles that stand for nothing now.
    """
    there = session_on(host, session)
    count = None
    if there.is_there():
        if restart:
            there.host.ask("stop", session=there.name)
        else:
            reply = there.ask_plainly(Request.make(resets=True), "reset")
            count = int(reply["dropped"])
    there.begin_anew()
    return count, there.handles_in(namespace)


def known_names(host: Host | str | None = None, session: str | None = None) -> list[str]:
    """The names that a session is taken to hold; nobody is asked."""
    return session_on(host, session).names.known_names()


def _existing(host: Host | str | None, session: str | None) -> Session:
    there = session_on(host, session)
    if not there.is_there():
        raise FalServerlessError(
            f"there is no session {there.name!r} on {there.host.name!r}: run a %%fal cell there, or %fal push"
        )
    return there


def _listed(there: Session, namespace: dict[str, Any]) -> list[Variable]:
    reply = there.ask_plainly(Request.make(lists=True), "vars")
    return [
        Variable(
            name=name,
            type=described["type"],
            shape=None if described["shape"] is None else tuple(described["shape"]),
            dtype=described["dtype"],
            length=described["length"],
            size=described["size"],
            device=described["device"],
            here=there.names.held_as(name, described["version"], namespace),
        )
        for name, described in reply["listed"].items()
    ]


def _check(names: Iterable[str], there: Iterable[str], where: str) -> None:
    known = list(there)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [item for item in known if item[:1] != "_"], n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise NameNotFoundError(f"there is no {name!r} in {where}{hint}")
