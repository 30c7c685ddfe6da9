"""What a folder shall hold: the list that `sync_dir` sends, and the rules for what may be in it.

Runs in the notebook, which makes manifests, and in the agent, which follows them. Whatever is read
here has passed the rules: no path leaves the folder, and no link does.

A file's content is named by its pieces: the BLAKE3 hash of each `PIECE_SIZE` bytes. A piece travels
by itself, so that a transfer that broke goes on where it was, and what is appended to a large file
travels without the rest.
"""

from __future__ import annotations

import json
import posixpath
import re
from dataclasses import dataclass, field
from typing import Any

from fal_agent.errors import ProtocolError

__all__ = ["PIECE_SIZE", "FileEntry", "Manifest", "is_inside", "piece_blob"]

PIECE_SIZE = 32 << 20  # bytes of each piece but the last, which is the rest

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file: its permission bits, its size in bytes, and the hashes of its pieces in order."""

    mode: int
    size: int
    pieces: tuple[str, ...]

    def piece_length(self, index: int) -> int:
        """Bytes of a piece."""
        return min(PIECE_SIZE, self.size - index * PIECE_SIZE)


@dataclass
class Manifest:
    """What a folder shall hold. Paths are relative and POSIX; undecodable bytes are surrogates.

    Attributes:
        files: path -> file.
        links: path -> target of a symbolic link, relative to the link's own folder.
        keep: paths that could not be looked at: what an earlier manifest put there, or below, stays.
    """

    files: dict[str, FileEntry] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Write the manifest; the same content always gives the same bytes."""
        files = [[path, *_plain(self.files[path])] for path in sorted(self.files)]
        content = {"files": files, "links": sorted(self.links.items()), "keep": sorted(self.keep)}
        return json.dumps(content, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            ProtocolError: it is none, or a path or a link in it leaves the folder.
        """
        try:
            content = json.loads(data)
            files = {
                path: FileEntry(int(mode), int(size), tuple(pieces))
                for path, mode, size, pieces in content["files"]
            }
            manifest = cls(files, dict(content["links"]), list(content["keep"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"this is no manifest: {error!r}") from None
        manifest.check()
        return manifest

    def check(self) -> None:
        """Refuse what no folder can hold.

        Raises:
            ProtocolError: a path is not inside of the folder or lies below a file, a link leaves the
                folder, or a file's pieces do not make up its size.
        """
        for path in (*self.files, *self.links, *self.keep):
            if not is_inside(path):
                raise ProtocolError(f"{path!r} is not a path inside of the folder")
        for path, target in self.links.items():
            _check_link(path, target)
        for path, entry in self.files.items():
            count = -(-entry.size // PIECE_SIZE)
            digests = all(isinstance(piece, str) and _DIGEST.fullmatch(piece) for piece in entry.pieces)
            if entry.size < 0 or len(entry.pieces) != count or not digests:
                raise ProtocolError(f"{path!r} has {entry.size} bytes in {len(entry.pieces)} pieces")
        for path in (*self.files, *self.links):
            above = posixpath.dirname(path)
            while above:
                if above in self.files or above in self.links:
                    raise ProtocolError(f"{path!r} lies below {above!r}, which is no folder")
                above = posixpath.dirname(above)


def piece_blob(digest: str) -> str:
    """Name of the blob in which a piece travels. It is used up there, so no call's blobs share it."""
    return f"sync-{digest}"


def is_inside(path: Any) -> bool:
    """Whether this is a path that stays inside of the folder it is relative to, written plainly."""
    if not isinstance(path, str) or not path or "\0" in path:
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def _check_link(path: str, target: Any) -> None:
    if not isinstance(target, str) or not target or "\0" in target:
        raise ProtocolError(f"{path!r} is a link to {target!r}")
    end = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    if target.startswith("/") or _leaves(end):
        raise ProtocolError(f"{path!r} is a link to {target!r}, which leaves the folder")


def _leaves(path: str) -> bool:
    return path == ".." or path.startswith(("../", "/"))


def _plain(entry: FileEntry) -> list[Any]:
    return [entry.mode, entry.size, list(entry.pieces)]
