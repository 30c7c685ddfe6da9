"""Come back to the run of a cell whose notebook vanished, when that cell is run again.

Runs in the notebook. It happens only if nobody was shown how the newest run of that very cell ended, the
notebook that started it is not connected any more, it goes on or has ended by itself, and the names that
the cell reads have the values of then. What falls short of this is told, and the cell runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fal_notebook.hosts.base import ShowsRuns
from fal_notebook.hosts.client import client_id

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from fal_notebook.hosts.base import Host

__all__ = ["EarlierRun", "cell_key", "find_earlier", "forget_earlier", "told"]

_GOING_ON = ("queued", "building", "running")
_ENDED_BY_ITSELF = ("done", "failed")

_found: dict[tuple[str, str], dict[str, EarlierRun]] = {}  # by host and notebook: runs by key


@dataclass(frozen=True)
class EarlierRun:
    """The newest run of a cell, whose outcome nobody was shown.

    Attributes:
        run_id: what `fal.attach` takes.
        session: that it runs in.
        state: see `fal_notebook.RunInfo`.
        error: how it failed, in a line.
        inputs: versions of the names that it read.
        is_watched: another notebook is connected that waits for it.
        submitted_at, finished_at: seconds since the Unix epoch, by the host's clock.
    """

    run_id: str
    session: str
    state: str
    error: str | None
    inputs: dict[str, str]
    is_watched: bool
    submitted_at: float
    finished_at: float | None

    @property
    def is_worth_showing(self) -> bool:
        """Whether it goes on, or ended by itself."""
        return self.state in (*_GOING_ON, *_ENDED_BY_ITSELF)

    def other_inputs(self, inputs: Mapping[str, str]) -> list[str]:
        """Names that have other values now; those that the notebook does not hold now do not count."""
        return sorted(name for name, version in inputs.items() if self.inputs.get(name) != version)


def cell_key(
    namespace: Mapping[str, Any], code: str, options: argparse.Namespace, *, folder: str | None
) -> str:
    """Name a cell of this notebook, on this machine, by what it says and asks for: "notebook:cell".

    Args:
        namespace: the notebook's.
        code: the cell.
        options: of its line.
        folder: that it runs in, on the host.
    """
    path = namespace.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME") or ""
    notebook = [socket.gethostname(), os.getuid() if hasattr(os, "getuid") else 0, os.path.abspath(str(path))]  # noqa: PTH100
    asked = {name: value for name, value in vars(options).items() if name != "again"}
    return f"{_digest(notebook)}:{_digest([code.strip(), asked, folder])}"


def find_earlier(host: Host, key: str) -> EarlierRun | None:
    """Look for the run of a cell; the host is asked once, for all cells of the notebook.

    What is found is given once: whoever runs the cell yet again wants it to run.
    """
    if not isinstance(host, ShowsRuns):
        return None
    notebook = key.partition(":")[0]
    known = _found.get((host.name, notebook))
    if known is None:
        known = _found[host.name, notebook] = _ask(host, notebook)
    earlier = known.pop(key, None)
    if earlier is not None and earlier.is_watched:  # that was then
        earlier = _ask(host, notebook).get(key)
    return earlier


def forget_earlier(host_name: str) -> None:
    """Ask the host again the next time: a run was left there."""
    for key in [key for key in _found if key[0] == host_name]:
        del _found[key]


def _ask(host: Host, notebook: str) -> dict[str, EarlierRun]:
    names = EarlierRun.__dataclass_fields__
    return {
        record["key"]: EarlierRun(**{name: record[name] for name in names})
        for record in host.ask("cells", notebook=notebook, client_id=client_id())
    }


def told(earlier: EarlierRun, host_name: str, others: list[str]) -> str:
    """Say in a line what becomes of an earlier run, now that its cell is run again.

    Args:
        earlier: the run.
        host_name: where it is.
        others: names that have other values now.
    """
    began = _clock(earlier.submitted_at)
    way = f"`%fal attach {earlier.run_id}` shows it"
    if not earlier.is_worth_showing:
        reason = f": {earlier.error}" if earlier.error else ""
        return f"The run of this cell from {began} did not come to its end{reason}. It starts anew; {way}.\n"
    if earlier.is_watched:
        return f"This cell also runs in another notebook, since {began}; {way}. It starts anew here.\n"
    if others:
        values = ", ".join(map(repr, others))
        return f"A run of this cell from {began} had another value of {values}; {way}. It starts anew.\n"
    if earlier.finished_at is None:
        return (
            f"This cell has been running on {host_name} since {began}, and its notebook has gone: this is "
            "that run. `%%fal --again` starts it anew.\n"
        )
    return (
        f"This cell ran on {host_name} from {began} to {_clock(earlier.finished_at)}, and nobody was there "
        "to see its end: this is that run. `%%fal --again` starts it anew.\n"
    )


def _clock(moment: float) -> str:
    """A moment as people say it: the date only if it was another day."""
    then = time.localtime(moment)
    is_today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M", then)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
