"""The command `fal-notebook`: what one wants to know or stop without opening a notebook.

Runs in a terminal, as a process of its own; the only file that imports typer. The exit status is 0
if all is well and 1 if a check failed or a host could not be asked.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fal_agent.errors import FalServerlessException
from fal_notebook import config, diagnose
from fal_notebook.diagnose import size_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fal_notebook.hosts.base import Host

__all__ = ["app", "main"]

app = typer.Typer(
    name="fal-notebook",
    help="Run notebook cells and functions on your own machines over SSH.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_HostName = Annotated[
    str,
    typer.Argument(metavar="HOST", help="A name that ssh knows, or `local`; default: the default host."),
]
_Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")]


def main() -> None:
    """Run the command; errors of ours are one message, not a traceback."""
    try:
        app()
    except FalServerlessException as error:
        typer.echo(f"fal-notebook: {error}", err=True)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fal_notebook import __version__

        typer.echo(f"fal-notebook {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(
    host: _HostName = "",
    timeout: _Timeout = 30.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the checks as JSON, when all are done.")
    ] = False,
) -> None:
    """Check that a host can run cells.

    Goes the way from the settings to an agent that answers: name, port, host key, login, shell, folder,
    disk, Python, uv, package index, GPUs. What to do about a check that failed stands below it; the exit
    status is then 1.
    """
    name = host or _default_name()
    checks = []
    for check in diagnose.examine(name, timeout=timeout):
        checks.append(check)
        if not as_json:
            typer.echo(diagnose.as_text(check))
    if as_json:
        typer.echo(json.dumps(diagnose.as_json(name, checks), indent=2))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def hosts() -> None:
    """List the hosts that are known here.

    These are this machine, those of the settings, and those of ssh; none is connected to.
    """
    settings = config.load()
    default = _default_name()
    rows = []
    for name in dict.fromkeys([*config.known_host_names(), default]):
        known = settings.host(name)
        source = "settings" if name in settings.hosts else "this machine" if known.ssh is None else "ssh"
        rows.append(["*" if name == default else "", name, known.ssh or "-", source, ", ".join(known.labels)])
    _print_table(["", "NAME", "ADDRESS", "FROM", "LABELS"], rows)
    typer.echo(f"* the default; settings: {settings.path}")


@app.command()
def status(host: _HostName = "", timeout: _Timeout = 30.0) -> None:
    """Show a host's machine, GPUs and workers."""
    answer = _host(host).ask("status", timeout=timeout)
    machine, agent = answer["machine"], answer["agent"]
    typer.echo(
        f"{machine['hostname']}: {machine['cores']} cores, {size_text(machine['memory'])} of memory with "
        f"{size_text(machine['memory_free'])} free, {size_text(machine['disk_free'])} free on disk"
    )
    typer.echo(
        f"agent: process {agent['pid']}, Python {agent['python']}, started {_ago(agent['started_at'])}"
    )
    for gpu in answer["gpus"]:
        used, total = size_text(gpu["memory_used"]), size_text(gpu["memory_total"])
        typer.echo(f"GPU {gpu['index']}: {gpu['name']}, {used} of {total} in use")
    rows = [
        [
            str(worker["pid"]),
            worker["environment"],
            ", ".join(worker["sessions"]),
            ", ".join(map(str, worker["devices"] or [])),
            ", ".join(run["label"] for run in worker["runs"]) or f"idle for {worker['idle_seconds']:.0f} s",
        ]
        for worker in answer["workers"]
    ]
    if rows:
        _print_table(["PROCESS", "ENVIRONMENT", "SESSIONS", "GPUS", "DOES"], rows)
    else:
        typer.echo("no workers")


@app.command()
def envs(host: _HostName = "", timeout: _Timeout = 30.0) -> None:
    """List a host's environments and their sizes."""
    found = _host(host).ask("environments", timeout=timeout)
    rows = [
        [
            environment["name"],
            environment["python"],
            str(environment["packages"]),
            size_text(environment["bytes"]),
            _ago(environment["last_used"]),
            "" if environment["complete"] else "incomplete",
        ]
        for environment in found
    ]
    if rows:
        _print_table(["NAME", "PYTHON", "PACKAGES", "SIZE", "LAST USED", ""], rows)
    else:
        typer.echo("no environments")


@app.command()
def stop(
    host: _HostName = "",
    session: Annotated[str, typer.Option(help="End only the workers of this session of cells.")] = "",
    agent: Annotated[bool, typer.Option("--agent", help="End the agent as well.")] = False,
    timeout: _Timeout = 30.0,
) -> None:
    """End a host's workers.

    What they run, and what they hold in memory, is lost.
    """
    target = _host(host)
    arguments: dict[str, Any] = {"session": session} if session else {"everything": True}
    ended = target.ask("stop", timeout=timeout, **arguments)["workers"]
    typer.echo(f"{target.name}: ended {ended} {'worker' if ended == 1 else 'workers'}")
    if agent:
        target.ask("shutdown", timeout=timeout)
        typer.echo(f"{target.name}: the agent ends")


def _default_name() -> str:
    return config.load().default or "local"


def _host(name: str) -> Host:
    from fal_notebook.hosts.registry import get_host

    return get_host(name or _default_name())


def _ago(moment: float | None) -> str:
    """How long ago a moment was, in seconds since the epoch, for a person."""
    if not moment:
        return "never"
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
