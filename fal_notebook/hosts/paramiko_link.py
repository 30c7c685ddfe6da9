"""Links that paramiko carries.

Runs in the notebook. With the `ssh_*` modules beside it this is the only code that knows paramiko; import
it on first use, because paramiko is slow to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fal_notebook.hosts.ssh_config_files import config_files
from fal_notebook.hosts.ssh_connect import connect
from fal_notebook.hosts.ssh_link import SSHLink
from fal_notebook.prompting import default_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from fal_notebook.prompting import Prompt

__all__ = ["open_link"]


def open_link(
    name: str,
    *,
    prompt: Prompt | None = None,
    ssh_config: Path | None = None,
    timeout: float = 15.0,
    alone: bool = True,
) -> SSHLink:
    """Connect to a machine that answers to `ssh NAME`.

    Args:
        name: an alias of the SSH configuration, a host name, or `user@host:port`.
        prompt: asked about a new host key, passphrases and passwords; by default the person at the
            terminal or notebook, or nobody.
        ssh_config: the configuration to read instead of the user's and the system's; also named by
            `$FAL_SSH_CONFIG`.
        timeout: seconds for the connection to be made, and for the server to greet.
        alone: do what can be done; else what only OpenSSH can do is a NeedsOpenSSHError.

    Raises:
        HostUnreachableError: no SSH server could be reached.
        HostKeyError: the machine's key is unknown and was not accepted, or is not the known one.
        AuthenticationError: the server did not let the user in.
        LinkLostError: the connection broke during the login; another try may get in.
        ConfigurationError: the configuration cannot be read or understood.
    """
    files = config_files(ssh_config)
    return SSHLink(connect(name, prompt or default_prompt(), files, timeout=timeout, alone=alone))
