"""The data folder of this very machine, without an agent.

Runs in the notebook, for the host that is its own process. The folder is the one that this machine's
agent uses too.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from fal_agent.mirror.folder import OWN_FOLDER, Mirror
from fal_agent.paths import default_root

if TYPE_CHECKING:
    from pathlib import Path

    from fal_agent.framing import Buffer

__all__ = ["Inbox"]


class Inbox:
    """Contents on their way into the data folder."""

    @property
    def _data(self) -> Path:
        return default_root() / "data"

    @property
    def _folder(self) -> Path:
        return self._data / OWN_FOLDER / "inbox"

    def put(self, name: str, data: Buffer) -> None:
        """Keep content under its name; it appears whole or not at all.

        Raises:
            OSError: the disk fails.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = self._folder / f".{name}-{uuid.uuid4().hex[:8]}"
        try:
            beside.write_bytes(data)
            beside.replace(self._folder / name)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def sync(self, directory: str, manifest: str, *, force: bool = False) -> dict[str, Any]:
        """Go on making a folder hold what a manifest says; see `Mirror.step`."""
        answer = Mirror(self._data, directory, self._arrived).step(manifest, force=force)
        if answer["state"] in ("done", "same"):
            (self._folder / manifest).unlink(missing_ok=True)
        return answer

    def _arrived(self, name: str) -> Path | None:
        path = self._folder / name
        return path if path.is_file() else None
