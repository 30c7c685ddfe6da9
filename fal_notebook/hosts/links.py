"""Which program carries the link to a machine: paramiko, or OpenSSH for what paramiko cannot do.

Runs in the notebook; both are imported on first use only.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fal_notebook.prompting import default_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from fal_notebook.hosts.ssh_link import SSHLink
    from fal_notebook.prompting import Prompt

__all__ = ["open_link"]

_told: set[tuple[str, str]] = set()  # for which machine and which reason it was said


def open_link(
    name: str,
    *,
    by: str | None = None,
    prompt: Prompt | None = None,
    ssh_config: Path | None = None,
    timeout: float = 15.0,
) -> SSHLink:
    """Connect to a machine that answers to `ssh NAME`.

    Args:
        name: an alias of the SSH configuration, a host name, or `user@host:port`.
        by: "paramiko" or "openssh"; None: paramiko, unless the configuration or the server asks for what only
            the OpenSSH program can do, which is said once.
        prompt: asked about a new host key, passphrases and passwords; by default the person at the
            terminal or notebook, or nobody.
        ssh_config: the configuration to read instead of the user's and the system's; also named by
            `$FAL_SSH_CONFIG`.
        timeout: seconds for the connection to be made, and for the server to greet.

    Raises:
        HostUnreachableError: no SSH server could be reached.
        HostKeyError: the machine's key is unknown and was not accepted, or is not the known one.
        AuthenticationError: the server did not let the user in.
        LinkLostError: the connection broke during the login; another try may get in.
        ConfigurationError: the configuration cannot be read or understood.
    """
    prompt = prompt or default_prompt()
    if by != "openssh":
        _import_when_used(
            "invoke"
        )  # paramiko does, which takes half of its time, and uses nothing of it here
        from fal_notebook.hosts import paramiko_link
        from fal_notebook.hosts.ssh_connect import NeedsOpenSSHError

        try:
            return paramiko_link.open_link(
                name, prompt=prompt, ssh_config=ssh_config, timeout=timeout, alone=by == "paramiko"
            )
        except NeedsOpenSSHError as need:
            if shutil.which("ssh") is None and need.otherwise is not None:
                raise need.otherwise from None
            reason = need.reason
        if (name, reason) not in _told:
            _told.add((name, reason))
            prompt.tell(f"{name!r} is connected to by the ssh program, because {reason}")
    from fal_notebook.hosts import openssh_link

    return openssh_link.open_link(name, prompt=prompt, ssh_config=ssh_config, timeout=timeout)


def _import_when_used(name: str) -> None:
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None:
        sys.modules[name] = stub = _WhenUsed(name)
        stub.__spec__ = spec


class _WhenUsed(ModuleType):
    """Stands for a module that is imported when somebody looks into it, not by whoever says `import`."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)
