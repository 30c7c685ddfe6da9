"""Make a folder below the data root hold what a manifest says.

Runs in the agent (and in the notebook's process for the host that is this process). Everything that
takes room is done in a folder of our own first; then files are renamed into place, so a full disk or
a crash leaves each file as it was or as it shall be, never half of it.

A record says what was put there. What remote code made itself is not in it, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import ResourceError
from fal_agent.mirror.apply import Change
from fal_agent.mirror.manifests import Manifest, is_inside
from fal_agent.mirror.record import Record
from fal_agent.mirror.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["OWN_FOLDER", "Mirror"]

OWN_FOLDER = ".fal/sync"  # below the data root: the records, and what is on its way
SPARE_BYTES = 100 << 20  # of the disk that stay free
_NAMED = 20  # paths in one answer
_PAGE_PIECES, _PAGE_BYTES = 8192, 1 << 30  # that are asked for at a time


class Mirror:
    """One folder below the data root.

    Args:
        data: the data root; made if need be.
        directory: the folder, relative to it and POSIX; "" for the root itself.
        take: gives the file of a blob that has arrived, or None.

    Raises:
        ValueError: the folder is not below the data root, or a link on the way to it leads out.
    """

    def __init__(self, data: Path, directory: str, take: Callable[[str], Optional[Path]]) -> None:
        if directory and not is_inside(directory):
            raise ValueError(f"{directory!r} is not a folder below /data")
        if (directory + "/").startswith(OWN_FOLDER + "/"):
            raise ValueError(f"/data/{OWN_FOLDER} is where sync_dir keeps its records; choose another folder")
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = Path(os.path.realpath(data))
        self.folder = _resolve(self.root, directory)
        self._directory, self._take = directory, take
        self._own = self.root / OWN_FOLDER
        key = hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]
        self._record_path = self._own / f"{key}.json"

    def step(self, name: str, *, force: bool = False) -> dict[str, Any]:
        """Go as far towards a manifest as what has arrived allows.

        Args:
            name: the manifest's blob, named by its content.
            force: take nothing that is here as right: everything is sent anew.

        Returns:
            "state" is "busy" (another step is at work), "same" (all is there already), "manifest" (it has
            not arrived), "missing" ("pieces", some of those to be sent, and "bytes" of all of them), or
            "done" ("changed" and "removed", numbers of paths, "changed_there", paths that the manifest
            dropped but were changed there since, and stay, and "unnamed", how many more of them). With
            "path", the folder.

        Raises:
            ProtocolError: the manifest is none.
            ResourceError: there is no room, or what remote code made is in the way.
            OSError: the disk fails.
        """
        self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked() as locked:
            if not locked:
                return self._answer("busy")
            record = Record.load(self._record_path)
            if force:
                record.distrust()
            elif record.manifest == name and record.is_intact(self.folder):
                return self._answer("same")
            source = self._take(name)
            if source is None:
                return self._answer("manifest")
            manifest = Manifest.from_bytes(source.read_bytes())
            self._check_own(manifest)
            try:
                return self._advance(manifest, name, record, force=force)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ResourceError(f"the disk of {self.folder} is full; free some space there") from error

    def _advance(self, manifest: Manifest, name: str, record: Record, *, force: bool) -> dict[str, Any]:
        intact = record.intact_files(self.folder)
        stage = Stage(self._own / "staged", manifest, intact, self.folder)
        if force:
            stage.clear()
            record.save(self._record_path)
        change = Change(self.folder, manifest, record, intact)
        change.check()
        missing = stage.gather(self._take)
        if missing:
            self._check_room(sum(missing.values()) + stage.copied_bytes())
            return self._answer("missing", pieces=_page(missing), bytes=sum(missing.values()))
        self._check_room(stage.copied_bytes())
        ready = stage.prepare()
        change.apply(ready, name, self._record_path)
        stage.finish()
        return self._answer(
            "done",
            changed=change.changed,
            removed=change.removed,
            changed_there=change.changed_there[:_NAMED],
            unnamed=len(change.changed_there[_NAMED:]),
        )

    def _answer(self, state: str, **more: Any) -> dict[str, Any]:
        return {"state": state, "path": str(self.folder), **more}

    def _check_own(self, manifest: Manifest) -> None:
        if self._directory and not f"{OWN_FOLDER}/".startswith(f"{self._directory}/"):
            return
        inner = OWN_FOLDER[len(self._directory) + 1 if self._directory else 0 :]
        for path in (*manifest.files, *manifest.links):
            if (path + "/").startswith(inner + "/") or inner.startswith(path + "/"):
                raise ValueError(
                    f"{path!r} would be where sync_dir keeps its records; rename it, or ignore it"
                )

    def _check_room(self, needed: int) -> None:
        free = max(0, shutil.disk_usage(self._own).free - SPARE_BYTES)
        if needed > free:
            raise ResourceError(
                f"{self.folder} needs {needed:,} bytes more and the disk has room for {free:,}; "
                "free some space there. Nothing in the folder was changed"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the data root's lock if nobody else does, be it a thread or another process."""
        descriptor = os.open(self._own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)


def _resolve(root: Path, directory: str) -> Path:
    """The folder itself; what remote code linked elsewhere below the data root is followed."""
    real = Path(os.path.realpath(root / directory))
    if real != root and root not in real.parents:
        raise ValueError(
            f"/data/{directory} leads through a link to {real}, out of the data folder {root}; "
            "remove the link there, or choose another folder"
        )
    if real.exists() and not real.is_dir():
        raise ValueError(f"/data/{directory} is a file on the host, not a folder; remove it there")
    return real


def _page(missing: dict[str, int]) -> list[str]:
    """The first pieces, as many as one answer and the disk's waiting room bear."""
    page: list[str] = []
    total = 0
    for digest, size in missing.items():
        page.append(digest)
        total += size
        if len(page) >= _PAGE_PIECES or total >= _PAGE_BYTES:
            break
    return page
