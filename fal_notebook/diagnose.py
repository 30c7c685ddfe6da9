"""Check, step by step, that a host can run calls, and say what to type where it cannot.

Runs in the notebook. A check that fails names its remedy; the steps that it makes impossible are left
out, so that the last line is always the one to act on.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fal_agent.errors import (
    AuthenticationError,
    ConfigurationError,
    FalServerlessError,
    HostError,
    HostKeyError,
)
from fal_agent.paths import default_root
from fal_notebook import config
from fal_notebook.hosts.base import CompletedCommand

__all__ = ["Check", "diagnose", "examine", "size_text"]

LEAST_DISK = 2 << 30  # bytes; a small environment fits, one with torch does not

Run = Callable[[str], CompletedCommand]

# Prints "key=value" lines about the machine. POSIX shell, since there may be no Python.
_PROBE = r"""
root={root}
case "$root" in "~/"*) root="$HOME/${{root#\~/}}";; esac
place=$root
while [ ! -e "$place" ]; do place=$(dirname "$place"); done
python=
for candidate in {python} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 \
    /usr/bin/python3 /usr/local/bin/python3 "$root/python/bin/python3"; do
  if "$candidate" -c 'import sys, sqlite3, fcntl; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1; then
    python=$(command -v "$candidate"); break
  fi
done
uv=
for candidate in {uv} "$root/bin/uv" uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
  if "$candidate" --version >/dev/null 2>&1; then uv=$(command -v "$candidate"); break; fi
done
version='import platform; print(platform.python_version())'
noise=$( (unset SHLVL; exec "${{SHELL:-/bin/sh}}" -c : ) 2>&1 </dev/null | head -c 200 | tr '\n\r' '  ')
printf 'place=%s\n' "$place"
[ -d "$place" ] && [ -w "$place" ] && [ -x "$place" ] && echo writable=yes
printf 'disk=%s\n' "$(df -Pk "$place" 2>/dev/null | tail -n 1)"
printf 'python=%s\n' "$python"
[ -n "$python" ] && printf 'version=%s\n' "$("$python" -c "$version")"
[ -n "$python" ] || printf 'old=%s\n' "$(python3 --version 2>&1 | head -n 1)"
printf 'uv=%s\n' "$uv"
[ -n "$uv" ] && printf 'uv_version=%s\n' "$("$uv" --version 2>/dev/null | head -n 1)"
printf 'system=%s %s\n' "$(uname -s)" "$(uname -m)"
printf 'noise=%s\n' "$noise"
"""


@dataclass(frozen=True)
class Check:
    """One step of an examination.

    Attributes:
        name: what was looked at, in a word or two.
        ok: whether calls can run as far as this goes.
        detail: what was found.
        fix: what to do about it, mostly a command to type; "" if there is nothing to do.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""


def diagnose(host_name: str, *, timeout: float = 30.0) -> list[Check]:
    """Examine a host; see `examine`."""
    return list(examine(host_name, timeout=timeout))


def examine(host_name: str, *, timeout: float = 30.0) -> Iterator[Check]:
    """Examine a host step by step: settings, connection, folder, disk, Python, uv, agent, GPUs.

    Args:
        host_name: "local", a name of `hosts.toml`, or any name that ssh knows.
        timeout: seconds that each step may take.

    Returns:
        The checks as they are done; the first that fails is among the last.
    """
    path = shlex.quote(str(config.config_folder() / "hosts.toml"))
    fix = f"edit {path}"
    try:
        known = config.load()
        fix = "fal-notebook hosts   # lists the names that are known"
        settings = known.host(host_name)
    except FalServerlessError as error:
        yield Check("settings", False, str(error), fix)
        return
    if host_name == "inline":
        yield Check("agent", True, "not needed: calls run in this process")
    elif settings.ssh is None:
        yield from _examine_machine(host_name, settings, lambda script: _run_here(script, timeout), timeout)
    else:
        yield from _examine_ssh(host_name, settings, timeout)


def _examine_ssh(name: str, settings: config.HostSettings, timeout: float) -> Iterator[Check]:
    from fal_notebook.hosts.links import open_link

    address = settings.ssh or name
    began = time.monotonic()
    try:
        link = open_link(address, by=settings.link, timeout=timeout)
    except FalServerlessError as error:
        yield _refused(address, error)
        return
    try:
        yield Check("name", True, f"ssh knows where {address!r} is")
        yield Check("port", True, "an SSH server answers there")
        yield Check("host key", True, "it is the one that is known")
        yield Check("login", True, f"accepted; connecting took {time.monotonic() - began:.1f} s")
        yield from _examine_machine(name, settings, lambda script: link.run(script, timeout=timeout), timeout)
    finally:
        link.close()


def _refused(address: str, error: FalServerlessError) -> Check:
    """The step of a connection that failed; the error's own words say at which machine, of several."""
    quoted = shlex.quote(address)
    if isinstance(error, HostKeyError):
        last = str(error).splitlines()[-1]  # of a changed key: the command that forgets the old one
        forget = last.strip() if last.startswith(" ") else f"ssh {quoted} true"
        return Check("host key", False, str(error), f"{forget}   # once the fingerprint is confirmed")
    if isinstance(error, AuthenticationError):
        return Check("login", False, str(error), f"ssh-copy-id {quoted}")
    if isinstance(error, ConfigurationError):
        return Check("settings", False, str(error), f"ssh -G {quoted}   # shows what ssh makes of them")
    if _is_about_names(error):
        fix = f"ssh -G {quoted} | grep -i ^hostname   # then correct HostName in ~/.ssh/config"
        return Check("name", False, str(error), fix)
    return Check(
        "port", False, str(error), f"ssh -v {quoted} true   # is the machine on, its network in reach?"
    )


def _is_about_names(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (socket.gaierror, UnicodeError)):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------- the machine


def _examine_machine(name: str, settings: config.HostSettings, run: Run, timeout: float) -> Iterator[Check]:
    root, python, uv = settings.root or "~/.fal_notebook", settings.python or "", ""
    if settings.ssh is None:
        root, python, uv = str(default_root()), sys.executable, _own_uv()
    words = {name: shlex.quote(word) if word else "" for name, word in (("python", python), ("uv", uv))}
    try:
        done = run(_PROBE.format(root=shlex.quote(root), **words))
    except FalServerlessError as error:
        yield Check("shell", False, str(error), f"ssh {shlex.quote(settings.ssh or name)} true")
        return
    facts = dict(line.partition("=")[::2] for line in done.stdout.decode("utf-8", "replace").splitlines())
    if "system" not in facts:
        text = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-500:]
        yield Check(
            "shell", False, f"a POSIX shell script did not run: {text}", "make `sh` work for this user"
        )
        return
    checks = [_folder(root, facts), _disk(name, facts), _python(name, facts), _uv(facts)]
    if settings.ssh is not None:
        checks.insert(0, _shell(facts))
    yield from checks
    if all(check.ok for check in checks):
        yield from _agent(name, root, timeout)


def _run_here(script: str, timeout: float) -> CompletedCommand:
    try:
        done = subprocess.run(
            ["/bin/sh"], input=script.encode(), capture_output=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"/bin/sh of this machine could not look around: {error}") from error
    return CompletedCommand(done.returncode, done.stdout, done.stderr)


def _own_uv() -> str:
    """The uv that was installed with this package; "" without one."""
    try:
        import uv

        return uv.find_uv_bin()
    except (ImportError, FileNotFoundError):
        return ""


def _shell(facts: dict[str, str]) -> Check:
    noise = facts.get("noise", "").strip()
    if not noise:
        return Check("shell", True, "starts without printing anything")
    return Check(
        "shell",
        True,
        f"prints {noise!r} when it starts, which fal_notebook passes over",
        "print only in interactive shells (scp and rsync stumble over it): "
        "begin the start-up file with  case $- in *i*) ;; *) return;; esac",
    )


def _folder(root: str, facts: dict[str, str]) -> Check:
    place = facts.get("place", "")
    if facts.get("writable") == "yes":
        return Check("folder", True, f"{root} can be written")
    fix = f"make {place} writable for this user, or choose another folder: root = in hosts.toml"
    return Check("folder", False, f"{root} cannot be made: {place} is not writable", fix)


def _disk(name: str, facts: dict[str, str]) -> Check:
    fields = facts.get("disk", "").split()
    if len(fields) < 6 or not fields[3].isdigit():  # noqa: PLR2004 - the columns of `df -P`
        return Check("disk", True, f"`df` does not tell how much is free at {facts.get('place')}")
    free, mount = int(fields[3]) << 10, fields[5]
    detail = f"{size_text(free)} free on {mount}"
    if free >= LEAST_DISK:
        return Check("disk", True, detail)
    fix = f"make {size_text(LEAST_DISK)} free there; `fal-notebook envs {name}` lists what environments take"
    return Check("disk", False, detail, fix)


def _python(name: str, facts: dict[str, str]) -> Check:
    if facts.get("python"):
        return Check("Python", True, f"{facts.get('version')} at {facts['python']} for the agent")
    old = facts.get("old", "")
    detail = "no Python 3.9 or newer with sqlite3" + (
        f" (there is {old})" if old.startswith("Python") else ""
    )
    fix = f'install python3, or name one: python = "/path/to/python3" under [hosts."{name}"] in hosts.toml'
    return Check("Python", False, detail, fix)


def _uv(facts: dict[str, str]) -> Check:
    from fal_notebook.hosts import uv_binary

    if facts.get("uv"):
        return Check("uv", True, f"{facts.get('uv_version')} at {facts['uv']}")
    system, _, machine = facts.get("system", "").partition(" ")
    if uv_binary.can_bring(system, machine):
        return Check("uv", True, f"not there; it will be brought along ({system} {machine})")
    fix = "python3 -m pip install --user uv   # on the host"
    return Check("uv", False, f"not there, and none can be brought to {system} {machine}", fix)


def _agent(name: str, root: str, timeout: float) -> Iterator[Check]:
    from fal_notebook.hosts.registry import get_host

    try:
        status = get_host(name).ask("status", timeout=timeout)
    except FalServerlessError as error:
        log = f"tail -n 50 {root}/run/*/agent.log"
        fix = log if name in config.LOCAL_NAMES else f"ssh {shlex.quote(name)} '{log}'"
        yield Check("agent", False, str(error), fix)
        return
    yield Check("agent", True, _described(status))
    yield Check("GPUs", True, _gpus_described(status.get("gpus") or []))


def _described(status: dict[str, Any]) -> str:
    machine, agent = status.get("machine", {}), status.get("agent", {})
    memory = size_text(machine["memory"]) if machine.get("memory") else "unknown memory"
    return (
        f"answers on {machine.get('hostname', 'the machine')}: {machine.get('cores', '?')} cores, {memory}, "
        f"Python {agent.get('python', '?')}, {len(status.get('workers', []))} workers"
    )


def _gpus_described(gpus: list[dict[str, Any]]) -> str:
    if not gpus:
        return "none"
    return "; ".join(f"{gpu.get('name')} ({size_text(gpu.get('memory_total') or 0)})" for gpu in gpus)


def size_text(size: float) -> str:
    """A number of bytes for a person: "512 B", "1.5 GB"; units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004 - the step between units
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"  # noqa: PLR2004
        size /= 1000
    return f"{size:.1f} TB"
