"""What the notebook asks of a session, and what it knows of each name there.

Runs in the notebook.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalSerializationError
from fal_notebook.handles import Handle
from fal_notebook.payload import pack_named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer

__all__ = ["Known", "Request", "digest_in", "digest_of", "reference_to"]

_LARGE = 1 << 20  # bytes that are hashed by several threads


@dataclass
class Request:
    """What travels with a cell; see `fal_agent.worker.session`.

    Attributes:
        content: the request itself.
        parts: the pickles of names, and their buffers; the request comes before them.
        sent: name -> (digest, bytes), of what travels.
        unsure: name -> digest here, of those that a failed cell may have bound.
        inputs: name -> digest here, or version on the host, of what the cell reads.
        bringing: name -> what brings the values of other hosts' handles in it, if it travels.
    """

    content: dict[str, Any]
    parts: list[Buffer] = field(default_factory=list)
    sent: dict[str, tuple[str, int]] = field(default_factory=dict)
    unsure: dict[str, str | None] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    bringing: dict[str, list[Callable[[], None]]] = field(default_factory=dict)

    @classmethod
    def make(cls, **content: Any) -> Request:
        """Make a request that asks for nothing but what is given."""
        empty: dict[str, Any] = {
            "sharing": [], "names": {}, "shared": [], "farewells": {}, "held": {}, "aliases": {},
            "handles": [], "deleted": [], "binds": [], "may_bind": [], "returns": False, "wanted": [],
            "lists": False, "resets": False, "exports": [], "reads": [], "unwatched": [], "installed": [],
        }  # fmt: skip
        return cls({**empty, **content})

    def add(self, name: str, parts: Sequence[Buffer], version: str, size: int) -> None:
        """Let a value travel."""
        start = len(self.parts) + 1  # the request itself is part 0
        self.content["names"][name] = [start, start + len(parts), version]
        self.parts += parts
        self.sent[name] = version, size


@dataclass
class Known:
    """What is known of one name.

    Attributes:
        version: of the session's value.
        digest: of the notebook's value when the two agreed; None when the notebook had none of its own.
        size: bytes of the notebook's value, pickled.
        is_here: whether the notebook had something under that name.
        value: gives the notebook's value of then, while that lives.
    """

    version: str
    digest: str | None = None
    size: int = 0
    is_here: bool = True
    value: Callable[[], Any] = lambda: None


def digest_in(namespace: dict[str, Any], name: str) -> tuple[str | None, int]:
    """The digest and bytes of what a name stands for; None if it is nothing that could travel."""
    value = namespace.get(name)
    if name not in namespace or isinstance(value, Handle):
        return None, 0
    try:
        dumped = pack_named(value, name=name, namespace=namespace)
    except FalSerializationError:
        return None, 0
    return digest_of(dumped.parts), dumped.size


def reference_to(value: Any) -> Callable[[], Any]:
    """Give what gives a value while it lives; None afterwards, and for what cannot be referred to weakly."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: None


def digest_of(parts: Sequence[Buffer]) -> str:
    """Give 32 hex digits (128 bits of BLAKE3) that name a value by its pickle."""
    from blake3 import blake3

    hasher = blake3(max_threads=blake3.AUTO) if sum(map(len, parts)) > _LARGE else blake3()
    for part in parts:
        hasher.update(b"%d:" % len(part))
        hasher.update(part)
    return hasher.hexdigest(length=16)
