"""Keep the functions that came to a worker, and open them for each call.

Runs in a worker. A call must find what its function captured as it was sent, whatever the call
before did to it; so a function is unpickled anew for each call, unless the notebook has seen that
nothing in it can change.
"""

from __future__ import annotations

import mmap
import pickletools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Optional

from fal_agent import pickling
from fal_agent.failures import OpeningError
from fal_agent.runtime.fingerprints import fingerprint
from fal_agent.worker.versions import check_pydantic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fal_agent.framing import Buffer

__all__ = ["Shelf", "UnknownFunctionError"]


class UnknownFunctionError(OpeningError, KeyError):
    """A function was called by its digest alone, but its data is not kept any more."""

    def __init__(self, digest: str) -> None:
        super().__init__(
            "agent", f"this worker let go of function {digest[:12]}; call it again and it will be sent again"
        )


class Shelf:
    """The functions of one worker, and the values that their setup functions made.

    Args:
        limit: bytes of functions' data to keep in memory; the one used longest ago goes first. Data
            that lies in files counts little.
    """

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._size = 0
        self._parts: OrderedDict[str, tuple[list[Buffer], int]] = OrderedDict()
        self._opened: dict[str, Any] = {}
        self._setups: dict[str, _Setup] = {}
        self._setup_of: dict[str, _Setup] = {}
        self._lock = threading.RLock()

    def function(
        self, digest: str, parts: Optional[Sequence[Buffer]], reusable: bool, *, pydantic: str = ""
    ) -> tuple[Callable[..., Any], Optional[Callable[[], Any]]]:
        """Give a function and its setup function, if it has one.

        Args:
            digest: names the data.
            parts: the data; None when this worker has it.
            reusable: the function captured nothing that can change, so it may be opened just once.
            pydantic: version of pydantic in the notebook, if it is used there.

        Raises:
            OpeningError: the data cannot be opened here.
            UnknownFunctionError: `parts` is None and the data is not kept.
        """
        if reusable and digest in self._opened:
            return self._opened[digest]  # type: ignore[no-any-return]
        kept = self.keep(digest, parts)
        check_pydantic(pydantic, kept)
        opened = _open(kept)
        if reusable:
            self._opened[digest] = opened
        return opened

    def setup_value(self, digest: str, setup: Callable[[], Any]) -> Any:
        """Give what a setup function made; it runs once, whichever functions have it.

        Args:
            digest: of the function that has it.
            setup: the setup function.

        Raises:
            Exception: what the setup function raises; it will run again then.
        """
        with self._lock:
            known = self._setup_of.get(digest)
            if known is None:
                known = self._setups.setdefault(fingerprint(setup), _Setup())
                self._setup_of[digest] = known
        return known.value(setup)

    def keep(self, digest: str, parts: Optional[Sequence[Buffer]]) -> Sequence[Buffer]:
        """Keep the data of a function, so that calls that come without it find it; give what is kept.

        Raises:
            UnknownFunctionError: `parts` is None and the data is not kept.
        """
        with self._lock:
            if digest in self._parts:
                self._parts.move_to_end(digest)
                return self._parts[digest][0]
            if parts is None:
                raise UnknownFunctionError(digest)
            kept = [_read_only(part) for part in parts]
            size = sum(_weight(part) for part in kept)
            self._parts[digest] = kept, size
            self._size += size
            while self._size > self._limit and len(self._parts) > 1:
                old, (_, freed) = self._parts.popitem(last=False)
                self._size -= freed
                self._opened.pop(old, None)
                self._setup_of.pop(old, None)
            return kept


class _Setup:
    """The value of one setup function."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: list[Any] = []

    def value(self, setup: Callable[[], Any]) -> Any:
        while not self._lock.acquire(timeout=0.2):  # so that an interrupt is seen while another call runs it
            continue
        try:
            if not self._values:
                self._values.append(setup())
            return self._values[0]
        finally:
            self._lock.release()


def _read_only(part: Buffer) -> Buffer:
    """Keep what one call does to an array from being seen by the next: unpickling copies it."""
    return part.toreadonly() if isinstance(part, memoryview) else part


def _weight(part: Buffer) -> int:
    if isinstance(part, memoryview) and isinstance(part.obj, mmap.mmap):
        return 256
    return len(part)


def _open(parts: Sequence[Buffer]) -> tuple[Callable[..., Any], Optional[Callable[[], Any]]]:
    try:
        function, setup = pickling.load(parts)
    except ModuleNotFoundError as error:
        module = error.name or "?"
        detail = {"module": module, "names": sorted(names_used(parts[0], module))}
        raise OpeningError("missing", str(error), detail) from error
    except Exception as error:
        raise OpeningError(
            "deserialization", f"the function cannot be opened there: {type(error).__name__}: {error}"
        ) from error
    return function, setup


def names_used(data: Buffer, module: str) -> set[str]:
    """Give the names that a pickle takes from a module or from what is below it."""
    names = set()
    for found, name in _globals(bytes(data)):
        if found == module or found.startswith(f"{module}."):
            names.add(name)
    return names


def _globals(data: bytes) -> Iterator[tuple[str, str]]:
    """Give the (module, name) pairs that a pickle looks up."""
    memo: list[Any] = []
    argument: Any
    last: list[Any] = [None, None]  # the last two strings that were pushed
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"):
            last = [last[1], argument]
        elif opcode.name == "MEMOIZE":
            memo.append(last[1])
        elif opcode.name in ("BINGET", "LONG_BINGET") and argument < len(memo):
            last = [last[1], memo[argument]]
        elif opcode.name == "STACK_GLOBAL" and all(isinstance(item, str) for item in last):
            yield last[0], last[1]
