"""Say which other hosts could give what one host has not got.

Runs in the notebook. Asks those that are connected already, and briefly: nobody is connected for it.
"""

from __future__ import annotations

import contextlib
from typing import Any

from fal_agent.errors import FalServerlessException
from fal_notebook.hosts import registry

__all__ = ["elsewhere"]

PATIENCE = 2.0  # seconds that a host may take to answer


def elsewhere(resources: dict[str, Any], refused_by: str) -> list[str]:
    """Tell what the other hosts say to a call that one has refused.

    Args:
        resources: what the call asks for: the fields of `fal_agent.wire.Resources`.
        refused_by: name of the host that cannot give it.

    Returns:
        One line for each host, those that can run it first; none where no other host is connected.
    """
    able, unable = [], []
    for host in registry.connected():
        if host.name == refused_by:
            continue
        with contextlib.suppress(OSError, FalServerlessException):  # it has gone: then it can give nothing
            lacking = host.ask("lacking", timeout=PATIENCE, resources=resources)
            if lacking is None:
                able.append(f"{host.name!r} can run it: host={host.name!r}")
            else:
                unable.append(f"{host.name!r} cannot either: {lacking}")
    return able + unable
