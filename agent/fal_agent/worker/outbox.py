"""How data enters and leaves a worker: small in the frame, large through files beside the blobs.

Runs in a worker. A file in the outbox is complete before the message that names it is sent; the
agent then takes it over. Blobs are mapped copy-on-write, so an argument of gigabytes is neither
copied nor shared.
"""

from __future__ import annotations

import mmap
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Union

from fal_agent.wire import INLINE_LIMIT, Data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer

__all__ = ["Outbox", "open_data"]


_MAX_PARTS = 1024  # that go in one frame
_SMALL, _MAX_SMALL = 4096, 32  # bytes and number of the parts that stay in the frame beside large ones


class Outbox:
    """Where a worker puts data that is too large for a frame."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def pack(self, parts: Sequence[Buffer]) -> tuple[Data, list[Buffer]]:
        """Give the references of `parts` and the buffers that go in the frame."""
        if sum(map(len, parts)) <= INLINE_LIMIT and len(parts) <= _MAX_PARTS:
            return list(range(len(parts))), list(parts)
        refs: Data = []
        buffers: list[Buffer] = []
        for part in parts:
            if len(part) <= _SMALL and len(buffers) < _MAX_SMALL:
                refs.append(len(buffers))
                buffers.append(part)
            else:
                refs.append(self._put(part))
        return refs, buffers

    def _put(self, part: Buffer) -> str:
        name = f"out-{uuid.uuid4().hex}"
        path = Path(self._folder, name)
        view = memoryview(part)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            while view:
                view = view[os.write(fd, view[: 64 << 20]) :]
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)
        return name


def open_data(data: Data, buffers: Sequence[bytes], blobs: dict[str, str]) -> list[Union[bytes, memoryview]]:
    """Give the bytes that each reference of `data` stands for.

    Args:
        data: references.
        buffers: raw buffers of the frame.
        blobs: file of each blob.
    """
    parts: list[Union[bytes, memoryview]] = []
    for ref in data:
        if isinstance(ref, int):
            parts.append(buffers[ref])
            continue
        with Path(blobs[ref]).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                parts.append(b"")
            else:
                parts.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))
    return parts
