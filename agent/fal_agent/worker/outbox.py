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
from typing import Dict, List, Sequence, Union

from fal_agent.framing import Buffer
from fal_agent.wire import INLINE_LIMIT, Data

__all__ = ["Outbox", "open_data"]


class Outbox:
    """Where a worker puts data that is too large for a frame."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def pack(self, parts: Sequence[Buffer]) -> "tuple[Data, List[Buffer]]":
        """Give the references of `parts` and the buffers that go in the frame."""
        if sum(len(part) for part in parts) <= INLINE_LIMIT and len(parts) < 1024:
            return list(range(len(parts))), list(parts)
        refs: Data = []
        buffers: List[Buffer] = []
        for part in parts:
            if len(part) <= 4096 and len(buffers) < 32:
                refs.append(len(buffers))
                buffers.append(part)
            else:
                refs.append(self._put(part))
        return refs, buffers

    def _put(self, part: Buffer) -> str:
        name = f"out-{uuid.uuid4().hex}"
        view = memoryview(part)
        fd = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            while view:
                view = view[os.write(fd, view[: 64 << 20]) :]
        except OSError:
            (self._folder / name).unlink()
            raise
        finally:
            os.close(fd)
        return name


def open_data(data: Data, buffers: Sequence[bytes], blobs: Dict[str, str]) -> "List[Union[bytes, memoryview]]":
    """Give the bytes that each reference of `data` stands for.

    Args:
        data: references.
        buffers: raw buffers of the frame.
        blobs: file of each blob.
    """
    parts: List[Union[bytes, memoryview]] = []
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
