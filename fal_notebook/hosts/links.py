"""Which program carries the link to a machine: paramiko, or OpenSSH for what paramiko cannot do.

Runs in the notebook; both are imported on first use only.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

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
        ConfigurationError: the configuration cannot be read or understood.
    """
    from fal_notebook.hosts import openssh_link, paramiko_link
    from fal_notebook.hosts.ssh_connect import NeedsOpenSSHError

    prompt = prompt or default_prompt()
    if by != "openssh":
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
    return openssh_link.open_link(name, prompt=prompt, ssh_config=ssh_config, timeout=timeout)
