"""`%fal` without more: the hosts, what is on them, who occupies them, and what can be done about it.

Runs in the notebook. Only hosts that are connected are asked. What is found is the same for the live panel of
a notebook (`display/panel_view.py`) and for the table of a terminal.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessException
from fal_agent.wire import Interrupt
from fal_notebook.display.phases import duration, size
from fal_notebook.display.tables import Table, ago
from fal_notebook.hosts import registry

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Action", "Row", "Section", "look", "table"]

_RUNS = 8  # of a host that are shown, the latest
_PATIENCE = 10.0  # seconds for a host's answer
_MEASURE_EVERY, _MEASURE_PATIENCE = 30.0, 300.0  # seconds between two measurements of sizes, and for one
_ACTIVE = ("building", "queued", "running")


_environments_of: dict[
    str, tuple[float, list[dict[str, Any]]]
] = {}  # by host: when it was asked, and what it said
_measuring: set[str] = set()  # hosts that are being asked


@dataclass(frozen=True)
class Action:
    """Something that can be done about a row.

    Attributes:
        label: a word for a button.
        do: does it; called in a thread of its own.
        is_final: it cannot be undone, so a person is asked twice.
    """

    label: str
    do: Callable[[], object]
    is_final: bool = False


@dataclass(frozen=True)
class Row:
    """One thing on a host.

    Attributes:
        key: the same as long as it is the same thing.
        kind: "device", "session", "run", "app" or "environment".
        text: what there is to say.
        actions: what can be done.
    """

    key: str
    kind: str
    text: str
    actions: tuple[Action, ...] = ()


@dataclass(frozen=True)
class Section:
    """One host.

    Attributes:
        name: of the host.
        text: what there is to say of the machine.
        is_current: whether calls go there.
        actions: what can be done.
        rows: what is on it.
    """

    name: str
    text: str
    is_current: bool
    actions: tuple[Action, ...] = ()
    rows: list[Row] = field(default_factory=list)


def look(*, patient: bool = False) -> list[Section]:
    """Look at every host that is connected; the others are only named.

    Args:
        patient: wait for the sizes of environments, which may take a minute when there are many; else they
            are measured in the background, and are those of a while ago.
    """
    return [_section(info, patient) for info in registry.hosts() if info.name != "inline"]


def table(*, patient: bool = True) -> Table:
    """Everything as a table, for where there are no buttons; `patient` is as in `look`."""
    rows: list[list[str]] = []
    for section in look(patient=patient):
        rows.append([f"{'→ ' if section.is_current else ''}{section.name}", "", section.text])
        rows += [["", row.kind, row.text] for row in section.rows]
    return Table(["host", "", "what is there"], rows)


def _section(info: registry.HostInfo, patient: bool) -> Section:
    connect = Action("Connect", partial(registry.connect, info.name))
    address = [info.address] if info.address else []
    if not info.is_connected:
        return Section(info.name, " · ".join([*address, "not connected"]), info.is_current, (connect,))
    host: Any = registry.get_host(info.name)
    try:
        status = host.ask("status", timeout=_PATIENCE)
        rows = [
            *_devices(status),
            *_sessions(host, status),
            *_apps(host),
            *_runs(host),
            *_environments(_measured(host, patient), host, status),
        ]
    except (FalServerlessException, OSError) as error:
        return Section(info.name, f"does not answer: {error}", info.is_current, (connect,))
    actions = () if info.is_current else (Action("Use", partial(registry.use, info.name)),)
    text = " · ".join([*address, _machine(status["machine"])])
    return Section(info.name, text, info.is_current, actions, rows)


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['hostname']}: {machine['cores']} cores, {size(machine['memory_free'])} of "
        f"{size(machine['memory'])} of memory free, {size(machine['disk_free'])} of disk free"
    )


def _devices(status: dict[str, Any]) -> list[Row]:
    """The GPUs, and who occupies them."""
    rows = []
    for gpu in status["gpus"]:
        mine = [worker for worker in status["workers"] if gpu["index"] in (worker["devices"] or ())]
        held = [_doing(worker) for worker in mine]
        pids = {worker["pid"] for worker in mine}
        held += [f"process {pid}" for pid, _ in gpu["processes"] if pid not in pids]
        used = f"{size(gpu['memory_used'])} of {size(gpu['memory_total'])} in use"
        text = f"GPU {gpu['index']} · {gpu['name']} · {used} · {', '.join(held) or 'free'}"
        rows.append(Row(f"gpu {gpu['index']}", "device", text))
    return rows


def _doing(worker: dict[str, Any]) -> str:
    labels = ", ".join(run["label"] for run in worker["runs"])
    idle = worker["idle_seconds"]
    return labels or (f"idle for {duration(idle)}" if idle is not None else "starting")


def _sessions(host: Any, status: dict[str, Any]) -> list[Row]:
    rows = []
    for worker in status["workers"]:
        for name in worker["sessions"]:
            stop = Action("Stop", partial(host.ask, "stop", session=name), is_final=True)
            text = f"{name} · {_doing(worker)} · process {worker['pid']}"
            rows.append(Row(f"session {name}", "session", text, (stop,)))
    return rows


def _apps(host: Any) -> list[Row]:
    rows = []
    for app in host.ask("apps", timeout=_PATIENCE):
        stop = Action("Stop", partial(host.ask, "app_stop", name=app["name"]), is_final=True)
        count = app["runners"]
        load = f"{count} {'runner' if count == 1 else 'runners'}, {app['in_flight']} requests in flight"
        text = f"{app['name']} · {app['state']} · {load}"
        rows.append(Row(f"app {app['name']}", "app", text, (stop,)))
    return rows


def _runs(host: Any) -> list[Row]:
    rows = []
    for run in host.ask("runs", timeout=_PATIENCE, limit=_RUNS):
        if run["kind"] == "app":
            continue
        run_id, state = run["run_id"], run["state"]
        actions = [Action("Attach", partial(_attach, host, run_id))]
        if state in _ACTIVE:
            actions.insert(0, Action("Interrupt", partial(_interrupt, host, run_id)))
        text = f"{run_id} · {state} · {run['label']} · {ago(run['submitted_at'])}"
        rows.append(Row(f"run {run_id}", "run", text, tuple(actions)))
    return sorted(rows, key=lambda row: len(row.actions) == 1)  # those that go on come first


def _measured(host: Any, patient: bool) -> list[dict[str, Any]] | None:
    """The environments of a host, as they were at most half a minute ago; None while nothing is known."""
    measured_at, known = _environments_of.get(host.name, (0.0, None))
    if time.monotonic() - measured_at < _MEASURE_EVERY and known is not None:
        return known
    if patient:
        _measure(host)
        return _environments_of[host.name][1]
    if host.name not in _measuring:
        _measuring.add(host.name)
        threading.Thread(target=_measure_aside, args=(host,), name="fal-measure", daemon=True).start()
    return known


def _measure(host: Any) -> None:
    found = host.ask("environments", timeout=_MEASURE_PATIENCE)
    _environments_of[host.name] = (time.monotonic(), found)


def _measure_aside(host: Any) -> None:
    try:
        _measure(host)
    except (FalServerlessException, OSError):  # the next look says what is wrong with the host
        return
    finally:
        _measuring.discard(host.name)


def _delete(host: Any, name: str) -> None:
    host.ask("remove_environment", name=name)
    _environments_of.pop(host.name, None)


def _environments(infos: list[dict[str, Any]] | None, host: Any, status: dict[str, Any]) -> list[Row]:
    if infos is None:
        return [Row("environments", "environment", "measuring…")]
    used = {worker["environment"] for worker in status["workers"]}
    rows = []
    for info in infos:
        name = info["name"]
        delete = Action("Delete", partial(_delete, host, name), is_final=True)
        said = [name, f"Python {info['python']}", f"{info['packages']} packages", size(info["bytes"])]
        said.append("in use" if name in used else f"used {ago(info['last_used'])}")
        text = " · ".join(said) if info["complete"] else f"{name} · being built"
        removable = info["complete"] and name not in used
        rows.append(Row(f"environment {name}", "environment", text, (delete,) if removable else ()))
    return rows


def _interrupt(host: Any, run_id: str) -> None:
    host.connect().send_if_open(Interrupt(run_id))


def _attach(host: Any, run_id: str) -> None:
    from fal_notebook.attaching import attach

    attach(run_id, host=host)
