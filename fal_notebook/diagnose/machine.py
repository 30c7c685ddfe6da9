"""The machine itself, step by step: shell, folder, disk, Python, uv, index, GPUs, clock, agent, forwarding.

Runs in the notebook. One shell script looks at what can be seen without an agent; then the agent is asked.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError, HostError
from fal_agent.paths import default_root
from fal_notebook.diagnose.checks import Check, size_text
from fal_notebook.hosts.base import CompletedCommand

if TYPE_CHECKING:
    from fal_notebook import config
    from fal_notebook.hosts.ssh import SSHHost
    from fal_notebook.hosts.ssh_link import SSHLink

__all__ = ["LEAST_DISK", "examine_here", "examine_there"]

LEAST_DISK = 500_000_000  # bytes; the agent and a small environment fit
ENOUGH_DISK = 10_000_000_000  # bytes; an environment with torch fits
CLOCK_SECONDS = 10.0  # by which clocks may differ without a word
MOST_LINES = 12  # of what a program on the machine said

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
printf 'clock=%s\n' "$(date +%s)"
noise=$( (unset SHLVL; exec "${{SHELL:-/bin/sh}}" -c : ) 2>&1 </dev/null | head -c 200 | tr '\n\r' '  ')
printf 'place=%s\n' "$place"
trial="$place/.fal-doctor-$$"
trouble=$( (umask 077; head -c 1000000 /dev/zero > "$trial") 2>&1 | tail -n 1)
if [ -f "$trial" ] && [ -z "$trouble" ]; then
  echo writable=yes
  printf '#!/bin/sh\nexit 0\n' > "$trial"; chmod 700 "$trial"
  "$trial" 2>/dev/null && echo executable=yes
fi
rm -f "$trial"
printf 'trouble=%s\n' "$trouble"
printf 'disk=%s\n' "$(df -Pk "$place" 2>/dev/null | tail -n 1)"
printf 'inodes=%s\n' "$(df -Pi "$place" 2>/dev/null | tail -n 1)"
printf 'python=%s\n' "$python"
[ -n "$python" ] && printf 'version=%s\n' "$("$python" -c "$version")"
[ -n "$python" ] || printf 'old=%s\n' "$(python3 --version 2>&1 | head -n 1)"
printf 'uv=%s\n' "$uv"
[ -n "$uv" ] && printf 'uv_version=%s\n' "$("$uv" --version 2>/dev/null | head -n 1)"
printf 'system=%s %s\n' "$(uname -s)" "$(uname -m)"
if grep -qi 0x10de /sys/bus/pci/devices/*/vendor 2>/dev/null || [ -e /dev/nvidia0 ]; then
  printf 'driver=%s\n' "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1 | head -n 1)"
  nvidia-smi -L >/dev/null 2>&1 || echo driver_fails=yes
fi
printf 'noise=%s\n' "$noise"
"""

# Asks the package index for something small, as an environment would, by whatever is there.
_INDEX_PROBE = r"""
uv={uv} python={python}
if [ -n "$uv" ] && [ -n "$python" ]; then
  echo cloudpickle | "$uv" pip compile --quiet --no-cache --no-header --python "$python" - >/dev/null
elif [ -n "$python" ]; then
  "$python" -c 'import sys, urllib.request
try: urllib.request.urlopen("https://pypi.org/simple/cloudpickle/", timeout=10)
except OSError as error: sys.exit(str(error))'
else
  curl -fsS -m 10 -o /dev/null https://pypi.org/simple/cloudpickle/
fi
"""


def examine_there(
    host: SSHHost, settings: config.HostSettings, ssh_command: str, timeout: float
) -> Iterator[Check]:
    """Examine a machine through the link to it; see `fal_notebook.diagnose.examine`.

    Args:
        host: connected.
        settings: its own.
        ssh_command: what to type to reach it.
        timeout: seconds that each step may take.
    """
    link = host.link

    def run(script: str) -> CompletedCommand:
        return link.run(script, timeout=timeout)

    failed = False
    for check in _examine(settings, run, ssh_command):
        failed = failed or not check.ok
        yield check
    if failed:
        return
    checks = list(_agent(host, settings.root or "~/.fal_notebook", ssh_command, timeout))
    yield from checks
    if checks[0].ok:
        yield _forwarding(link)


def examine_here(name: str, settings: config.HostSettings, timeout: float) -> Iterator[Check]:
    """Examine this machine; see `fal_notebook.diagnose.examine`."""
    from fal_notebook.hosts.registry import get_host

    failed = False
    for check in _examine(settings, lambda script: _run_here(script, timeout), ""):
        failed = failed or not check.ok
        yield check
    if not failed:
        yield from _agent(get_host(name), str(default_root()), "", timeout)


def _examine(settings: config.HostSettings, run: Run, ssh_command: str) -> Iterator[Check]:
    root, python, uv = settings.root or "~/.fal_notebook", settings.python or "", ""
    if settings.ssh is None:
        root, python, uv = str(default_root()), sys.executable, _own_uv()
    words = {key: shlex.quote(word) if word else "" for key, word in (("python", python), ("uv", uv))}
    began = time.time()
    try:
        done = run(_PROBE.format(root=shlex.quote(root), **words))
    except FalServerlessError as error:
        yield Check("shell", False, str(error), f"{ssh_command} true".strip())
        return
    facts = dict(line.partition("=")[::2] for line in done.stdout.decode("utf-8", "replace").splitlines())
    if "system" not in facts:
        text = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-500:]
        yield Check(
            "shell", False, f"a POSIX shell script did not run: {text}", "make `sh` work for this user"
        )
        return
    if settings.ssh is not None:
        yield _shell(facts)
    yield _folder(root, facts)
    yield _disk(facts, ssh_command)
    yield _python(settings.name, facts)
    yield _uv(facts)
    yield _index(facts, run)
    yield _driver(facts)
    if settings.ssh is not None:
        yield _clock(facts, began, time.time())


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
    place, trouble = facts.get("place", ""), _trouble(facts)
    another = "or choose another folder: root = in hosts.toml"
    if facts.get("writable") != "yes" and not _is_full(trouble):
        detail = f"{root} cannot be made: {place} is not writable" + (f" ({trouble})" if trouble else "")
        return Check("folder", False, detail, f"make {place} writable for this user, {another}")
    if facts.get("writable") == "yes" and facts.get("executable") != "yes":
        detail = f"programs cannot be started from {place}: it is mounted noexec"
        return Check("folder", False, detail, "choose another folder: root = in hosts.toml")
    return Check("folder", True, f"{root} can be written")


def _trouble(facts: dict[str, str]) -> str:
    """Why a file could not be written there, without the name of the program that says so."""
    return facts.get("trouble", "").rpartition(": ")[2]


def _is_full(trouble: str) -> bool:
    return "No space" in trouble or "quota" in trouble


def _disk(facts: dict[str, str], ssh_command: str) -> Check:
    fields, inodes = facts.get("disk", "").split(), facts.get("inodes", "").split()
    if len(fields) < 6 or not fields[3].isdigit():  # noqa: PLR2004 - the columns of `df -P`
        return Check("disk", True, f"`df` does not tell how much is free at {facts.get('place')}")
    free, mount = int(fields[3]) << 10, fields[5]
    detail = f"{size_text(free)} free on {mount}"
    listing = f"du -xh {facts.get('place')} | sort -h | tail"
    listing = f"{ssh_command} '{listing}'" if ssh_command else listing
    fix = f"{listing}   # and remove what is not needed; {size_text(ENOUGH_DISK)} are plenty"
    if _is_full(_trouble(facts)):
        return Check("disk", False, f"nothing more can be written there: {_trouble(facts)}; {detail}", fix)
    if len(inodes) >= 6 and inodes[1] not in {"0", "-"} and inodes[3] == "0":  # noqa: PLR2004
        return Check("disk", False, f"{detail}, but no inodes: it holds too many files", fix)
    if free < LEAST_DISK:
        return Check("disk", False, detail, fix)
    if free < ENOUGH_DISK:
        return Check("disk", True, f"{detail}: enough for small environments, not for one with torch", fix)
    return Check("disk", True, detail)


def _python(name: str, facts: dict[str, str]) -> Check:
    from fal_notebook.hosts import uv_binary

    if facts.get("python"):
        return Check("Python", True, f"{facts.get('version')} at {facts['python']} for the agent")
    old = facts.get("old", "")
    detail = "no Python 3.9 or newer with sqlite3" + (
        f" (there is {old})" if old.startswith("Python") else ""
    )
    system, _, machine = facts.get("system", "").partition(" ")
    if uv_binary.can_bring(system, machine):
        return Check(
            "Python", True, f"{detail}; one will be downloaded or brought along ({system} {machine})"
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


def _index(facts: dict[str, str], run: Run) -> Check:
    words = {key: shlex.quote(facts.get(key, "")) for key in ("uv", "python")}
    try:
        done = run(_INDEX_PROBE.format(**words))
    except FalServerlessError as error:
        done = CompletedCommand(1, b"", str(error).encode())
    if done.status == 0:
        return Check("index", True, "packages can be fetched from there")
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-MOST_LINES:]
    detail = "the package index is not in reach from there, so this notebook fetches packages and sends them"
    fix = (
        "allow the machine the way to the index, which is quicker, or name a proxy or mirror for uv there: "
        'index-url = "https://..." in ~/.config/uv/uv.toml'
    )
    return Check("index", True, "\n".join([f"{detail}:", *(f"  {line.strip()}" for line in said)]), fix)


def _driver(facts: dict[str, str]) -> Check:
    if "driver" not in facts:
        return Check("GPU driver", True, "no NVIDIA GPU is there, so none is needed")
    if facts.get("driver_fails") == "yes":
        detail = f"there is an NVIDIA GPU, but its driver does not answer: {facts['driver']}"
        fix = "nvidia-smi   # on the host, until it lists GPUs: install the driver, or reboot after an update"
        return Check("GPU driver", True, detail, fix)
    return Check("GPU driver", True, f"NVIDIA {facts['driver']}")


def _clock(facts: dict[str, str], began: float, ended: float) -> Check:
    if not facts.get("clock", "").isdigit():
        return Check("clock", True, "`date` does not tell")
    there = int(facts["clock"]) + 0.5  # it tells whole seconds
    difference = there - ended if there > ended else there - began if there < began else 0.0
    if abs(difference) <= CLOCK_SECONDS:
        return Check("clock", True, "agrees with this machine's")
    side = "ahead of" if difference > 0 else "behind"
    detail = f"is {abs(difference):.0f} s {side} this machine's: times in logs, and certificates, will be off"
    return Check("clock", True, detail, "sudo timedatectl set-ntp true   # on the one that is wrong")


def _forwarding(link: SSHLink) -> Check:
    if not link.forwarding_is_forbidden:
        return Check("forwarding", True, "connections to sockets pass through the server")
    return Check(
        "forwarding",
        True,
        "the server forbids connections to sockets; a command for each makes up for it, more slowly",
        "AllowStreamLocalForwarding yes   # in the server's sshd_config, by its administrator",
    )


def _agent(host: Any, root: str, ssh_command: str, timeout: float) -> Iterator[Check]:
    try:
        status = host.ask("status", timeout=timeout)
    except FalServerlessError as error:
        log = f"tail -n 50 {root}/run/*/agent.log"
        yield Check("agent", False, str(error), f"{ssh_command} '{log}'" if ssh_command else log)
        return
    yield Check("agent", True, _described(status))
    yield Check("GPUs", True, _gpus_described(status.get("gpus") or []))


def _described(status: dict[str, Any]) -> str:
    machine, agent = status.get("machine", {}), status.get("agent", {})
    memory = f"{size_text(machine['memory'])} of memory" if machine.get("memory") else "unknown memory"
    return (
        f"answers on {machine.get('hostname', 'the machine')}: {machine.get('cores', '?')} cores, {memory}, "
        f"Python {agent.get('python', '?')}, {len(status.get('workers', []))} workers"
    )


def _gpus_described(gpus: list[dict[str, Any]]) -> str:
    if not gpus:
        return "none"
    return "; ".join(f"{gpu.get('name')} ({size_text(gpu.get('memory_total') or 0)})" for gpu in gpus)
