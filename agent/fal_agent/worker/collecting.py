"""Make the reply to a notebook: the values that go back, and descriptions of those that stay.

Runs in a worker.
"""

from __future__ import annotations

import sys
import types
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.namespaces import Dumped, dump_named
from fal_agent.sharing import SHARED_LIMIT, SharedObjects
from fal_agent.worker.previews import describe_value, from_device, is_larger, type_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.worker.context import CallContext
    from fal_agent.worker.watch import Watch

__all__ = ["Collector", "Reply"]

_LOOKED_AT = 20  # items of a collection


@dataclass
class Reply:
    """What goes back to the notebook."""

    stale: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    installed: list[str] = field(default_factory=list)
    names: dict[str, list[int]] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    farewells: dict[str, int] = field(default_factory=dict)
    plain: dict[str, list[int]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    handles: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: int = 0
    exported: dict[str, list[Any]] = field(default_factory=dict)
    goes_on: bool = False


class Collector:
    """Collects values of one session.

    Args:
        namespace: the session's.
        watch: is told what the notebook gets.
    """

    def __init__(self, namespace: dict[str, Any], watch: Watch) -> None:
        self._namespace, self._watch = namespace, watch
        self._described: dict[str, dict[str, Any]] = {}  # what was said of the values that stay

    def forget(self, name: str) -> None:
        """A name stands for nothing any more."""
        self._described.pop(name, None)

    def collect(
        self,
        back: dict[str, Optional[Dumped]],
        request: dict[str, Any],
        reply: Reply,
        sharing: Optional[SharedObjects],
        call: CallContext,
    ) -> list[Buffer]:
        """Pickle the names that go back; describe those that are too large, or cannot, or hold a secret."""
        insists = not request["code"].strip() and bool(request["wanted"])  # also from a device's memory
        dumps: dict[str, Dumped] = {}
        for name, dumped in back.items():
            if name not in self._namespace:
                reply.missing.append(name)
                continue
            value = self._namespace[name]
            if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
                reply.modules[name] = value.__name__
                continue
            limit = 0 if _finalizes(value) and not insists else request["limit"]
            found = self._dump(from_device(value) if insists else value, limit, dumped)
            if found is None or (not insists and call.holds_secret(found.parts)):
                reply.handles[name] = self._described[name] = _described(value, call)
            else:
                dumps[name] = found
        self._describe_again(request["handles"], back, reply, call)
        self._watch.forget([*reply.handles, *reply.modules, *reply.deleted])
        buffers: list[Buffer] = []
        if sharing is not None:
            leaving = [*reply.handles, *reply.modules, *reply.deleted, *self._too_large(dumps)]
            for name, data in sharing.farewells(leaving).items():
                if not call.holds_secret([data]):  # else the counts of steps differ: both sides begin anew
                    reply.farewells[name] = len(buffers)
                    buffers.append(data)
            sharing.forget(leaving)
        count = 0 if sharing is None else sharing.count
        for name, dumped in dumps.items():
            is_copy = from_device(self._namespace[name]) is not self._namespace[name]
            if request["returns"] and not is_copy:
                self._watch.note(name, dumped)
            was_shared = sharing is not None and sharing.has(name)
            if is_copy and sharing is not None:
                sharing.forget([name])
            parts = self._parts(name, dumped, reply, None if is_copy else sharing, call)
            reply.names[name] = _place(buffers, parts)
            reply.types[name] = type_name(self._namespace[name])
            if name in reply.shared and sharing and (was_shared or not sharing.is_newer(name, count)):
                reply.plain[name] = _place(buffers, dumped.parts)
        return buffers

    def _dump(self, value: Any, limit: int, dumped: Optional[Dumped]) -> Optional[Dumped]:
        """Pickle a value; None when it cannot be, is too large, or lives on a device."""
        if is_larger(value, limit):
            return None
        if dumped is None:
            try:
                dumped = dump_named(value, self._namespace)
            except Exception:  # noqa: BLE001 - pickling runs the user's code; what cannot be pickled stays here
                return None
        return dumped if dumped.parts and dumped.size <= limit else None

    def _parts(
        self, name: str, dumped: Dumped, reply: Reply, sharing: Optional[SharedObjects], call: CallContext
    ) -> list[Buffer]:
        """Give what travels of a value that goes back."""
        if sharing is None:
            return dumped.parts
        data = b""
        if dumped.size <= SHARED_LIMIT:
            with suppress(Exception):  # it could be pickled; it just cannot be taken apart
                data = sharing.encode(name, self._namespace[name])
        if data and not call.holds_secret([data]):  # in what the name led to before
            reply.shared.append(name)
            return [data]
        sharing.forget([name])
        return dumped.parts

    def _too_large(self, dumps: dict[str, Dumped]) -> list[str]:
        return [name for name, dumped in dumps.items() if dumped.size > SHARED_LIMIT]

    def _describe_again(
        self, handles: Sequence[str], back: dict[str, Optional[Dumped]], reply: Reply, call: CallContext
    ) -> None:
        """Tell of values that stay what is not so any more."""
        for name in handles:
            if name in self._namespace and name not in back:
                described = _described(self._namespace[name], call)
                if described != self._described.get(name):
                    reply.handles[name] = self._described[name] = described


def _place(buffers: list[Buffer], parts: Sequence[Buffer]) -> list[int]:
    """Add parts to the buffers; give where they are."""
    start = len(buffers)
    buffers += parts
    return [start, len(buffers)]


def _finalizes(value: Any) -> bool:
    """Whether an object of a cell's own class, or the first ones in a collection, has a `__del__`.

    It stays: a copy would be finalised too, and what both sides share lives until the cell is over.
    """
    items = value.values() if isinstance(value, dict) else value
    inner = islice(items, _LOOKED_AT) if isinstance(value, (list, tuple, dict, set)) else ()
    return any(
        type(item).__module__ == "__main__" and hasattr(type(item), "__del__") for item in (value, *inner)
    )


def _described(value: Any, call: CallContext) -> dict[str, Any]:
    described = describe_value(value)
    return described if call.masker is None else call.masker.mask_all(described)
