"""Keep the data of functions by digest, so that a warm call need not bring it again.

Runs in the agent, which never opens it. Bounded: what was not used for longest goes first, and a
client is asked to send it again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.wire import Data

__all__ = ["FunctionStore", "extract"]


class FunctionStore:
    """Functions' data in memory.

    Args:
        limit: bytes of raw buffers to keep.
    """

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, tuple[Data, list[bytes]]] = OrderedDict()
        self._size = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def put(self, digest: str, data: Data, buffers: Sequence[bytes]) -> None:
        """Keep a function: `data` refers to `buffers` of the same frame."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return
        refs, own = extract(data, buffers)
        self._kept[digest] = (refs, own)
        self._size += sum(len(buffer) for buffer in own)
        while self._size > self._limit and len(self._kept) > 1:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._size -= sum(len(buffer) for buffer in dropped)

    def data(self, digest: str, *, offset: int) -> tuple[Data, list[bytes]]:
        """Give a function's references and buffers, for a frame that has `offset` buffers already.

        Raises:
            KeyError: it is not kept.
        """
        self._kept.move_to_end(digest)
        refs, buffers = self._kept[digest]
        return [ref + offset if isinstance(ref, int) else ref for ref in refs], buffers


def extract(data: Data, buffers: Sequence[bytes]) -> tuple[Data, list[bytes]]:
    """Give `data` with its references counted from 0, and just the buffers it refers to.

    Raises:
        IndexError: it refers to a buffer that is not there.
    """
    refs: Data = []
    own: list[bytes] = []
    for ref in data:
        if isinstance(ref, int):
            refs.append(len(own))
            own.append(buffers[ref])
        else:
            refs.append(ref)
    return refs, own
