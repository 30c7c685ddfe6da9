"""Come back to runs: those of a host, whoever started them, and what one has said and gives.

Runs in the notebook. A host's journal has each run with its output from the first line, and goes on
recording it while nobody looks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.errors import FalServerlessError
from fal_agent.namespaces import load_named
from fal_agent.sharing import SharedObjects
from fal_notebook import display
from fal_notebook.display.phases import duration, size
from fal_notebook.display.tables import Table, ago
from fal_notebook.handles import Handle, unopened
from fal_notebook.hosts.base import ShowsRuns
from fal_notebook.hosts.registry import get_host
from fal_notebook.names import told_in_full
from fal_notebook.run import Run, load_result

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host, Received

__all__ = ["Pruned", "RunInfo", "RunList", "attach", "prune", "runs"]

_SEARCHED = 1_000  # runs of a host among which one is looked for by the beginning of its id


@dataclass(frozen=True)
class RunInfo:
    """What a host knows of one run.

    Attributes:
        run_id: what `fal.attach` takes.
        host: the host's name.
        label: the function's name, or the first line of the cell.
        kind: "function", "map", "cell" or "app".
        state: "queued", "building", "running", "done", "failed", "cancelled", "lost" or "lease" (that ended).
        error: how it failed, in a line.
        submitted_at, started_at, finished_at: seconds since the Unix epoch, by the host's clock.
        bytes: of what it has said.
        result_bytes: of what it gave; None if it gave nothing, or that is not kept any more.
        session: that a cell ran in; empty for all else.
    """

    run_id: str
    host: str
    label: str
    kind: str
    state: str
    error: str | None
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    bytes: int
    result_bytes: int | None = None
    session: str = ""

    def attach(self) -> Run:
        """Show the run again; see `fal.attach`."""
        return attach(self.run_id, host=self.host)


class RunList(list[RunInfo]):
    """Runs, the newest first; a notebook shows them as a table."""

    def table(self) -> Table:
        """What is shown of them."""
        heading = ["run", "state", "age", "host", "what", "result"]
        rows = [[i.run_id, _state(i), ago(i.submitted_at), i.host, i.label, _size(i)] for i in self]
        return Table(heading, rows)

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()


def _state(info: RunInfo) -> str:
    """The state, with how long the run took or has been going on."""
    if info.started_at is None:
        return info.state
    seconds = max(0.0, (info.finished_at or time.time()) - info.started_at)
    return f"{info.state}, {duration(seconds)}"


def _size(info: RunInfo) -> str:
    return "" if info.result_bytes is None else size(info.result_bytes)


def runs(host: Host | str | None = None, *, limit: int = 100) -> RunList:
    """List the latest runs on a host, newest first.

    Args:
        host: a host, the name of one, or None for the current one.
        limit: how many at most.

    Raises:
        FalServerlessError: the host keeps no runs.
        HostError: the host cannot be reached.
    """
    where = get_host(host)
    records = where.ask("runs", limit=limit)
    names = [name for name in RunInfo.__dataclass_fields__ if name != "host"]
    return RunList(RunInfo(host=where.name, **{name: record[name] for name in names}) for record in records)


@dataclass(frozen=True)
class Pruned:
    """What was forgotten on a host.

    Attributes:
        runs: how many.
        bytes: that their output and results took, about.
    """

    runs: int
    bytes: int

    def __str__(self) -> str:
        return f"forgot {self.runs} run{'s' * (self.runs != 1)} with {size(self.bytes)} of output and results"


def prune(host: Host | str | None = None, *, days: float = 7.0, gb: float = 2.0) -> Pruned:
    """Forget runs that have ended on a host, with their output and results.

    A host does this every minute, for those that ended more than 7 days ago and the oldest beyond 2 GiB of
    output; this is for keeping less. Runs that go on stay.

    Args:
        host: a host, the name of one, or None for the current one.
        days: those that ended longer ago are forgotten; 0 for all.
        gb: of the others, that may stay; the oldest go first.

    Raises:
        FalServerlessError: the host keeps no runs, or a number is negative.
        HostError: the host cannot be reached.
    """
    where = get_host(host)
    if days < 0 or gb < 0:
        raise FalServerlessError(f"days={days:g}, gb={gb:g}: give numbers of at least 0")
    if not isinstance(where, ShowsRuns):
        raise FalServerlessError(f"{where.name!r} is this very process, and keeps no runs")
    done = where.ask("prune_runs", timeout=600.0, max_age_seconds=days * 86400, max_bytes=int(gb * 1e9))
    return Pruned(done["runs"], done["bytes"])


def attach(run_id: str, *, host: Host | str | None = None) -> Run:
    """Show a run that was started before, by this notebook or another one: its output from the first line on.

    The output appears in the place of the cell that calls this, also what is yet to come. The run itself is
    not touched by any of it, and whoever started it still sees it too.

    Args:
        run_id: what `fal.runs()` and `%fal runs` show; its beginning is enough.
        host: a host, the name of one, or None for the current one.

    Returns:
        The run: `.result()` waits for its value, or for a cell a dict of the names that it brought back, in
        which a handle stands for what is too large or cannot be pickled; `.interrupt()`, `.cancel()` and
        `.kill()` end it.

    Raises:
        FalServerlessError: the host does not know the run, or several runs have such ids.
        HostError: the host cannot be reached.
    """
    where = get_host(host)
    if not isinstance(where, ShowsRuns):
        raise FalServerlessError(f"{where.name!r} is this very process, and keeps no runs")
    info = _find(where, run_id)
    decode = partial(_names_of, info) if info.kind == "cell" else load_result
    return Run.attached(
        where, info.run_id, label=info.label, decode=decode, on_event=display.background(info.label)
    )


def _find(where: Any, run_id: str) -> RunInfo:
    found = [info for info in runs(where, limit=_SEARCHED) if info.run_id.startswith(run_id)]
    exact = [info for info in found if info.run_id == run_id]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found:
        raise FalServerlessError(f"{where.name!r} knows no run {run_id!r}; %fal runs lists those it knows")
    listed = ", ".join(info.run_id for info in found[:5])
    raise FalServerlessError(f"{len(found)} runs on {where.name!r} have ids that begin so: {listed}")


def _names_of(info: RunInfo, received: Received) -> dict[str, Any]:
    """Give the names that a cell brought back, and what they stand for: handles, for what stayed there."""
    reply, buffers = told_in_full(pickling.load(received.data[:1])), received.data[1:]
    namespace: dict[str, Any] = {}
    shared = SharedObjects(namespace, 1)  # nothing
    stayed: dict[str, dict[str, Any]] = dict(reply["handles"])
    for name, (start, stop) in reply["names"].items():
        parts, is_shared = buffers[start:stop], name in reply["shared"]
        try:
            namespace[name] = shared.decode(name, parts[0]) if is_shared else load_named(parts, namespace)
        except Exception as error:  # noqa: BLE001 - opening runs the user's code; the other names are there
            stayed[name] = unopened(reply["types"].get(name), parts, error)
    for name, described in stayed.items():
        namespace[name] = Handle(
            info.host, info.session, name, version=reply["versions"][name], described=described, keeper=None
        )
    return namespace
