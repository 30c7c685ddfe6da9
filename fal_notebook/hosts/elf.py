"""The little that must be known of ELF files to take an interpreter to another machine.

Runs in the notebook, on 64-bit little-endian files, as all platforms have that we bring things to.
"""

from __future__ import annotations

import re
import struct

__all__ = ["glibc_needed", "is_elf", "with_origin_path"]

_MAGIC = b"\x7fELF\x02\x01"
_LOAD, _DYNAMIC = 1, 2  # kinds of segments
_END, _STRINGS, _RPATH, _RUNPATH = 0, 5, 15, 29  # tags of the dynamic section
_PROGRAM_HEADER = struct.Struct(
    "<IIQQQQQQ"
)  # kind, flags, offset, address, physical, in file, in memory, align
_ENTRY = struct.Struct("<qQ")
_GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)")


def is_elf(data: bytes) -> bool:
    """Whether these are the bytes of such a file."""
    return data[: len(_MAGIC)] == _MAGIC


def glibc_needed(data: bytes) -> tuple[int, int]:
    """Give the oldest glibc that has all that a file asks of it; (0, 0) if it asks nothing."""
    return max(((int(major), int(minor)) for major, minor in _GLIBC.findall(data)), default=(0, 0))


def with_origin_path(program: bytes, path: str = "$ORIGIN/../lib") -> bytes | None:
    """Give a program that looks for libraries relative to itself, and so do the libraries that it loads.

    Args:
        program: an ELF file that was linked with a path to look for libraries.
        path: the new one.

    Returns:
        The program; None if it has no such path, or one that is shorter.
    """
    data = bytearray(program)
    offset, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    headers = [_PROGRAM_HEADER.unpack_from(data, offset + 56 * number) for number in range(count)]
    dynamic = next((header[2] for header in headers if header[0] == _DYNAMIC), None)
    if dynamic is None:
        return None
    strings, found = None, None
    while (entry := _ENTRY.unpack_from(data, dynamic))[0] != _END:
        if entry[0] == _STRINGS:
            strings = _file_offset(headers, entry[1])
        elif entry[0] in (_RPATH, _RUNPATH):
            found = dynamic, entry[1]
        dynamic += _ENTRY.size
    if strings is None or found is None:
        return None
    place, start = found[0], strings + found[1]
    room = data.index(b"\0", start) - start
    if len(path) > room:
        return None
    data[start : start + room] = path.encode().ljust(room, b"\0")
    # DT_RPATH counts for what is loaded later too, which DT_RUNPATH does not.
    _ENTRY.pack_into(data, place, _RPATH, found[1])
    return bytes(data)


def _file_offset(headers: list[tuple[int, ...]], address: int) -> int | None:
    for kind, _, offset, start, _, size, _, _ in headers:
        if kind == _LOAD and start <= address < start + size:
            return offset + address - start
    return None
