"""Put values of a session into files, for other processes of the host, and for other hosts.

Runs in a worker. The files lie in the worker's outbox, which goes with the worker.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.references import write_parts

if TYPE_CHECKING:
    from fal_agent.worker.context import CallContext

__all__ = ["Exports"]


class Exports:
    """The files of one session."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[list[int], Path]] = {}  # version -> mark of the value, file

    def put(self, version: str, value: Any, call: CallContext) -> list[Any]:
        """Have a value in a file, as it is now.

        Args:
            version: names the value.
            value: what goes there; one that has not changed since the last time is there already.
            call: whose outbox takes it.

        Returns:
            Path, bytes, and ""; or "", 0, and why it cannot be.
        """
        try:
            parts = pickling.dump_parts(value)
        except Exception as error:  # noqa: BLE001 - pickling runs the user's code
            return ["", 0, f"it cannot be pickled: {type(error).__name__}: {error}"]
        mark = [hash(bytes(part)) for part in parts]
        known, file = self._files.get(version, ([], Path()))
        if known != mark or not file.exists():
            if known:
                file.unlink(missing_ok=True)
            file = Path(call.task.outbox) / f"kept-{uuid.uuid4().hex}"
            try:
                write_parts(file, parts)
            except OSError as error:
                return ["", 0, f"it cannot be put on the disk there: {error}"]
            self._files[version] = mark, file
        return [str(file), file.stat().st_size, ""]

    def read(self, path: str, start: int, size: int) -> bytes:
        """Give a piece of such a file.

        Raises:
            OSError: it is none of ours, or gone.
        """
        if Path(path) not in [file for _, file in self._files.values()]:
            raise FileNotFoundError(path)
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(size)
