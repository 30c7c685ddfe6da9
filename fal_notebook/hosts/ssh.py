"""A machine that answers to `ssh NAME`, prepared on first contact.

Runs in the notebook. Over one connection it looks what the machine has, brings our sources (and uv
and a Python where they are missing), starts the agent, and dials its Unix socket. Nothing listens on a port.
"""

from __future__ import annotations

import json
import shlex
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from fal_agent.errors import HostError, HostUnreachableError, LinkLostError
from fal_notebook import config
from fal_notebook.hosts import steps
from fal_notebook.hosts.agent_host import AgentHost, agent_answer, agent_options
from fal_notebook.hosts.archive import source_archive
from fal_notebook.hosts.bare import provide
from fal_notebook.hosts.client import AgentClient

if TYPE_CHECKING:
    from fal_notebook.config import HostSettings
    from fal_notebook.hosts.ssh_link import SSHLink

__all__ = ["SSHHost"]

_PART_SIZE = 64 << 10  # a small call waits for one part at most: 50 ms on a 10 Mbit/s line
_COMMAND_TIMEOUT = 60.0  # seconds

# Prints one JSON object: what the machine has. POSIX shell, since there may be no Python.
_PROBE = r"""
root={root}
case "$root" in "~/"*) root="$HOME/${{root#\~/}}";; esac
run="$root/run/{run}"
if [ -z "{anew}" ] && [ -S "$run/agent.sock" ] && [ -r "$run/python" ]; then
  printf '{{"root":"%s","python":"%s","socket":"%s"}}\n' "$root" "$(cat "$run/python")" "$run/agent.sock"
  exit
fi
python=
for candidate in {python} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 \
    /usr/bin/python3 /usr/local/bin/python3 "$root"/python/bin/python3 "$root"/pythons/*/bin/python3; do
  if "$candidate" -c 'import sys, sqlite3, fcntl; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1; then
    python=$(command -v "$candidate"); break
  fi
done
uv=
for candidate in "$root/bin/uv" uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
  if "$candidate" --version >/dev/null 2>&1; then uv=$candidate; break; fi
done
code=no; [ -d "$root/code/{digest}" ] && code=yes
printf '{{"root":"%s","python":"%s","uv":"%s","code":"%s","system":"%s","machine":"%s"}}\n' \
  "$root" "$python" "$uv" "$code" "$(uname -s)" "$(uname -m)"
"""

# Unpacks the sources beside their place and renames them, so that they appear whole or not at all.
_UNPACK = """
import os, shutil, sys, uuid, zipfile
archive, folder = sys.argv[1:]
beside = os.path.join(os.path.dirname(folder), "." + os.path.basename(folder) + "-" + uuid.uuid4().hex[:8])
os.makedirs(beside, 0o700)
try:
    with zipfile.ZipFile(archive) as file:
        file.extractall(beside)
    try:
        os.rename(beside, folder)
    except OSError:
        if not os.path.isdir(folder):
            raise
finally:
    shutil.rmtree(beside, ignore_errors=True)
os.unlink(archive)
"""


class SSHHost(AgentHost):
    """A machine reached over SSH.

    Args:
        name: what `ssh` knows it by: an alias of `~/.ssh/config`, a name, or "user@host:port"; or a
            name of the user's `hosts.toml`.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._link: SSHLink | None = None
        self._link_lock = threading.Lock()

    @property
    def link(self) -> SSHLink:
        """The SSH connection, made anew if there is none that works.

        Raises:
            HostError: the machine cannot be reached, or refuses.
        """
        from fal_notebook.hosts.links import open_link

        with self._link_lock:
            if self._link is None or not self._link.is_alive:
                if self._link is not None:
                    self._link.close()  # lets go of what a broken one still holds
                settings = config.load().host(self.name)
                self._link = open_link(settings.ssh or self.name, by=settings.link)
            return self._link

    def close(self) -> None:
        """Let go of the connection; what runs there goes on for its lease."""
        super().close()
        with self._link_lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def _is_away(self, error: HostError) -> bool:
        # What goes wrong over a connection that stands is the machine's own trouble.
        stands = self._link is not None and self._link.is_alive
        return isinstance(error, (HostUnreachableError, LinkLostError)) and not stands

    def _connect(self) -> AgentClient:
        known = self._link
        link = self.link
        try:
            return self._connect_over(link)
        except HostError as error:
            if link is not known or (link.is_alive and not isinstance(error, LinkLostError)):
                raise
        # The connection we had was breaking, and we are the first to find out.
        with self._link_lock:
            if self._link is link:
                self._link = None
        link.close()
        return self._connect_over(self.link)

    def _connect_over(self, link: SSHLink) -> AgentClient:
        settings = config.load().host(self.name)
        archive = source_archive()
        steps.tell("looking at the machine")
        facts = self._probe(link, settings, archive.digest)
        if "socket" in facts:
            with suppress(ConnectionRefusedError):  # it was killed; then everything is looked at
                return self._dial_agent(link, facts, archive.digest)
            facts = self._probe(link, settings, archive.digest, anew=True)
        if not facts["python"] or not facts["uv"]:
            steps.tell("bringing what the machine lacks")
            provide(link, self.name, facts)
        root, python = facts["root"], facts["python"]
        code = f"{root}/code/{archive.digest}"
        if facts["code"] != "yes":
            steps.tell("bringing the agent")
            self._bring_code(link, python, code, archive.data)
        steps.tell("starting the agent")
        facts["socket"] = self._start_agent(link, facts, archive.digest, settings)
        return self._dial_agent(link, facts, archive.digest)

    def _dial_agent(self, link: SSHLink, facts: dict[str, str], digest: str) -> AgentClient:
        link.dial_command = f"{_agent_command(facts, digest)} dial {{socket}}"
        stream = link.dial(facts["socket"])
        return AgentClient(stream, host_name=self.name, part_size=_PART_SIZE, dial=link.dial, heartbeat=True)

    def _probe(
        self, link: SSHLink, settings: HostSettings, digest: str, *, anew: bool = False
    ) -> dict[str, str]:
        """Look what the machine has; only whether the agent runs, if it does and that can be believed."""
        script = _PROBE.format(
            root=shlex.quote(settings.root or "~/.fal_notebook"),
            python=shlex.quote(settings.python) if settings.python else "",
            digest=digest,
            run=digest[:16],
            anew="yes" if anew or link.forwarding_is_forbidden else "",
        )
        done = link.run(script, timeout=_COMMAND_TIMEOUT)
        try:
            return dict(json.loads(done.stdout.decode().strip().splitlines()[-1]))
        except (ValueError, IndexError):
            text = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-1000:]
            raise HostUnreachableError(
                f"{self.name!r} could not be looked at; its shell said:\n{text}"
            ) from None

    def _bring_code(self, link: SSHLink, python: str, code: str, data: bytes) -> None:
        archive = f"{code}.zip"
        link.upload(archive, data)
        done = link.run(
            f"{shlex.quote(python)} - {shlex.quote(archive)} {shlex.quote(code)}",
            stdin=_UNPACK.encode(),
            timeout=_COMMAND_TIMEOUT,
        )
        if done.status != 0:
            text = done.stderr.decode("utf-8", "replace").strip()[-1000:]
            raise HostUnreachableError(f"the agent's sources could not be put on {self.name!r}:\n{text}")

    def _start_agent(self, link: SSHLink, facts: dict[str, str], digest: str, settings: HostSettings) -> str:
        words = ["start", "--root", facts["root"], "--digest", digest, *agent_options(settings)]
        command = f"{_agent_command(facts, digest)} {shlex.join(words)}"
        done = link.run(command, timeout=_COMMAND_TIMEOUT)
        return str(agent_answer(self.name, done.stdout, done.stderr)["socket"])


def _agent_command(facts: dict[str, str], digest: str) -> str:
    """Write the shell words that run the agent's program, to be followed by its own."""
    code = f"{facts['root']}/code/{digest}"
    return f"PYTHONPATH={shlex.quote(code)} exec {shlex.quote(facts['python'])} -m fal_agent"
