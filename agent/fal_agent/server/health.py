"""Ask a runner of an app how it is, over its Unix socket.

Runs in a thread of the agent.
"""

from __future__ import annotations

import http.client
import socket
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from fal_agent.wire import HealthPolicy

__all__ = ["AGENT_HEADER", "check_health"]

AGENT_HEADER = "x-fal-agent"
_LIMIT = 64 << 10  # bytes of an answer that are read


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def check_health(path: str, policy: HealthPolicy, agent_secret: str) -> Optional[str]:
    """Give what is wrong with a runner; None when it is well.

    Args:
        path: its socket.
        policy: which endpoint to ask, and how long to wait.
        agent_secret: proves that the request is the agent's.
    """
    connection = _UnixConnection(path, policy.timeout)
    try:
        connection.request(
            policy.method if policy.path else "GET",
            policy.path or "/health",
            headers={AGENT_HEADER: agent_secret},
        )
        answer = connection.getresponse()
        answer.read(_LIMIT)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return None if answer.status // 100 == 2 else f"status {answer.status}"  # noqa: PLR2004 - 2xx
