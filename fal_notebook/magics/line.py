"""`%fal`: hosts, what is on them, and what runs there. Parse, ask, show.

Runs in the notebook.
"""

from __future__ import annotations

import shlex
from functools import partial
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand

from fal_notebook.display.tables import Table, ago
from fal_notebook.magics.names import NAME_COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.apps import Apps
    from fal_notebook.attaching import RunList
    from fal_notebook.diagnose import Examination

__all__ = ["COMMANDS", "LineMagics"]

_MIB = 1 << 20


@magics_class
class LineMagics(Magics):  # type: ignore[misc] # IPython has no types
    """Holds `%fal`."""

    @no_var_expand  # type: ignore[untyped-decorator]
    @line_magic  # type: ignore[untyped-decorator]
    def fal(self, line: str) -> Any:
        """Show and choose hosts.

        %fal                             a live panel: hosts, devices, sessions, runs, apps, environments
        %fal connect NAME [--remember]   connect a host and send what follows there
        %fal hosts                       the hosts, and which is the current one
        %fal status [NAME]               the machine, its GPUs and workers
        %fal envs [NAME]                 the environments on a host
        %fal runs [NAME]                 the latest runs on a host
        %fal prune [NAME] [--days=7] [--gb=2]
                                         forget ended runs: older ones, and the oldest beyond so much
        %fal attach ID                   show a run of the current host again, and follow it
        %fal push NAME...                send names of the notebook to the session
        %fal pull NAME...                bring names of the session, whatever their size
        %fal vars                        the names of the session: types, shapes, sizes, devices
        %fal reset [--restart]           forget the session's names, or end its process
        %fal stop [NAME] [--all]         end this kernel's sessions on a host, or every worker
        %fal apps [NAME]                 the apps that a host serves
        %fal key                         the key that apps with app_auth="private" ask for
        %fal doctor [NAME]               check the way to a host, with the fix for what is wrong
        %fal help                        this text

        push, pull, vars and reset take --host NAME and --session NAME; without, they mean the current
        host, and this kernel's own session there.
        """
        try:
            command, *words = shlex.split(line) or ["panel"]
        except ValueError as error:
            raise UsageError(f"the line cannot be read: {error}") from None
        if command in NAME_COMMANDS:
            return _about_names(command, self.shell.user_ns, words)
        handler = COMMANDS.get(command)
        if handler is None:
            raise UsageError(f"%fal {command}: unknown; known are {', '.join([*COMMANDS, *NAME_COMMANDS])}")
        flags = {word for word in words if word.startswith("-")}
        names = [word for word in words if not word.startswith("-")]
        unknown = {flag for flag in flags if flag.partition("=")[0] not in _FLAGS.get(command, ())}
        if unknown or len(names) > 1:
            raise UsageError(f"%fal {command}: cannot use {' '.join([*unknown, *names[1:]])}; see %fal help")
        return handler(names[0] if names else None, flags)


def _about_names(command: str, namespace: dict[str, Any], words: list[str]) -> Any:
    from fal_notebook.variables import NameNotFoundError

    try:
        told = NAME_COMMANDS[command](namespace, words)
    except NameNotFoundError as error:
        raise UsageError(f"%fal {command}: {error}") from None
    return _Text(told) if isinstance(told, str) else told


def _panel(_name: str | None, _flags: set[str]) -> Table | None:
    from fal_notebook import display, panel
    from fal_notebook.display.stop_button import has_widgets

    if not (display.in_kernel() and has_widgets()):
        return panel.table()
    from fal_notebook.display.panel_view import PanelView
    from fal_notebook.display.publishing import running

    running.watch()
    if not running.is_looked_at:
        return panel.table()
    PanelView(panel.look, partial(panel.table, patient=False))
    return None


def _connect(name: str | None, flags: set[str]) -> str:
    from fal_notebook import display
    from fal_notebook.hosts import registry

    if name is None:
        raise UsageError("%fal connect NAME: name a host; %fal hosts lists those that are known")
    display.show_connections()
    host = registry.connect(name, remember="--remember" in flags)
    machine = host.ask("status")["machine"] if hasattr(host, "connect") else {}
    what = f": {machine['cores']} cores, {machine['memory'] // _MIB // 1024} GiB" if machine else ""
    return _Text(f"connected to {host.name}{what}")


def _hosts(_name: str | None, _flags: set[str]) -> Table:
    from fal_notebook.hosts import registry

    rows = [
        [
            "→" if info.is_current else "",
            info.name,
            info.address or "this machine",
            "yes" if info.is_connected else "",
        ]
        for info in registry.hosts()
    ]
    return Table(["", "host", "address", "connected"], rows)


def _status(name: str | None, _flags: set[str]) -> Table:
    status = _ask(name, "status")
    machine = status["machine"]
    rows = [
        ["machine", f"{machine['hostname']} ({machine['platform']})"],
        ["cores", str(machine["cores"])],
        ["memory", f"{machine['memory_free'] // _MIB:,} MiB free of {machine['memory'] // _MIB:,}"],
        ["disk", f"{machine['disk_free'] // _MIB:,} MiB free"],
    ]
    rows += [[f"GPU {gpu['index']}", _gpu(gpu)] for gpu in status["gpus"]]
    for worker in status["workers"]:
        doing = (
            ", ".join(run["label"] for run in worker["runs"]) or f"idle for {worker['idle_seconds']:.0f} s"
        )
        rows.append([f"worker {worker['pid']}", doing])
    return Table(["", ""], rows)


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['memory_used'] // _MIB:,} of {gpu['memory_total'] // _MIB:,} MiB in use"


def _environments(name: str | None, _flags: set[str]) -> Table:
    rows = [
        [
            info["name"],
            info["python"],
            str(info["packages"]),
            f"{info['bytes'] // _MIB:,} MiB",
            ago(info["last_used"]),
        ]
        for info in _ask(name, "environments")
    ]
    return Table(["environment", "Python", "packages", "size", "last used"], rows)


def _runs(name: str | None, _flags: set[str]) -> RunList:
    from fal_notebook.attaching import runs

    return runs(name, limit=30)


def _prune(name: str | None, flags: set[str]) -> str:
    from fal_notebook.attaching import prune

    limits = {}
    for flag in flags:
        word, _, value = flag.partition("=")
        try:
            limits[word.removeprefix("--")] = float(value)
        except ValueError:
            raise UsageError(f"%fal prune {flag}: give a number, as in {word}=1") from None
    return _Text(prune(name, **limits))


def _attach(run_id: str | None, _flags: set[str]) -> Any:
    from fal_notebook.attaching import attach

    if run_id is None:
        raise UsageError("%fal attach ID: name a run; %fal runs lists those that are known")
    return attach(run_id)


def _apps(name: str | None, _flags: set[str]) -> Apps:
    from fal_notebook import apps

    return apps.listed(name)


def _key(_name: str | None, _flags: set[str]) -> str:
    from fal_notebook.credentials import key_credentials, make_key

    key = key_credentials() or make_key()
    return _Text(f"Authorization: Key {key.key_id}:{key.key_secret}")


def _stop(name: str | None, flags: set[str]) -> str:
    from fal_notebook.session import forget_sessions, session_names

    if "--all" in flags:
        count = _ask(name, "stop", everything=True)["workers"]
    else:
        count = sum(_ask(name, "stop", session=session)["workers"] for session in session_names(name))
    forget_sessions(name)
    return _Text(f"ended {count} worker{'s' if count != 1 else ''}")


def _doctor(name: str | None, _flags: set[str]) -> Examination:
    from fal_notebook.diagnose import Examination, diagnose
    from fal_notebook.hosts import registry

    host_name = name or registry.current_host().name
    return Examination(host_name, diagnose(host_name, timeout=15.0))


def _help(_name: str | None, _flags: set[str]) -> str:
    import inspect

    return _Text(inspect.cleandoc(LineMagics.fal.__doc__ or ""))


def _ask(name: str | None, question: str, **arguments: Any) -> Any:
    from fal_notebook.hosts import registry

    return registry.get_host(name).ask(question, **arguments)


class _Text(str):
    """A string that a cell shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


COMMANDS: dict[str, Callable[[str | None, set[str]], Any]] = {
    "panel": _panel,
    "connect": _connect,
    "hosts": _hosts,
    "status": _status,
    "envs": _environments,
    "runs": _runs,
    "attach": _attach,
    "prune": _prune,
    "apps": _apps,
    "key": _key,
    "stop": _stop,
    "doctor": _doctor,
    "help": _help,
}
_FLAGS = {"connect": {"--remember"}, "stop": {"--all"}, "prune": {"--days", "--gb"}}
