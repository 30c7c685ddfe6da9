"""Open what a pickle says of a value that is on this host already.

Runs wherever user code runs. A handle that travels in arguments, closures or containers becomes a
reference: to a value of a session, which is given as it is in that session's own process, and else
opened from the file where the session has put it; or to a blob that another host's value became.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent import pickling
from fal_agent.errors import FalServerlessError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer

__all__ = ["look_in", "open_reference", "read_parts", "split_parts", "write_parts"]

_COUNT = struct.Struct("<Q")

_session_value: Optional[Callable[[str, str], Any]] = None
_blob_folder: Optional[Path] = None


def look_in(*, sessions: Optional[Callable[[str, str], Any]] = None, blobs: Optional[Path] = None) -> None:
    """Say where this process finds what references mean.

    Args:
        sessions: gives the value of a version in a session of this process; raises LookupError.
        blobs: the folder of this host's blobs.
    """
    global _blob_folder, _session_value  # noqa: PLW0603 - one per process, as the references in pickles know no other way
    if sessions is not None:
        _session_value = sessions
    if blobs is not None:
        _blob_folder = blobs


def open_reference(session: str, version: str, path: str, name: str, problem: str) -> Any:
    """Give the value of a reference; pickles name this function.

    Args:
        session: that holds the value; "" if it came from another host.
        version: of the value.
        path: the file with its pickle, or the name of a blob; "" if there is none.
        name: what the value is called, for errors.
        problem: why it cannot be had in another process than its session's; "" if it can.

    Raises:
        FalServerlessError: it is gone, or cannot be had in this process.
    """
    if _session_value is not None:
        with suppress(LookupError):  # it is not in this process, or has another value now
            return _session_value(session, version)
    if problem:
        raise FalServerlessError(
            f"{name!r} lives in the process of its session, and cannot leave it ({problem}): use it in a "
            "%%fal cell there, or in a function with the same requirements"
        )
    file = Path(path) if "/" in path or _blob_folder is None else _blob_folder / path
    try:
        return pickling.load(read_parts(file))
    except FileNotFoundError:
        raise FalServerlessError(
            f"{name!r} is gone: the session that held it has ended; run the cell that makes it again"
        ) from None


def write_parts(file: Path, parts: Sequence[Buffer]) -> None:
    """Put a pickle and its buffers into a file, which appears whole or not at all.

    Raises:
        OSError: the disk has no room, or fails.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("wb") as target:
            target.write(_COUNT.pack(len(parts)) + b"".join(_COUNT.pack(len(part)) for part in parts))
            for part in parts:
                target.write(part)
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_parts(file: Path) -> list[Buffer]:
    """Give what `write_parts` wrote: views of the file, which may be written to and change nothing there.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as source:
        whole = memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY))
    return split_parts(whole)


def split_parts(whole: memoryview) -> list[Buffer]:
    """Divide the content of such a file."""
    (count,) = _COUNT.unpack_from(whole)
    sizes = [_COUNT.unpack_from(whole, _COUNT.size * (index + 1))[0] for index in range(count)]
    parts: list[Buffer] = []
    start = _COUNT.size * (count + 1)
    for size in sizes:
        parts.append(whole[start : start + size])
        start += size
    return parts
