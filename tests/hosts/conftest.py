"""What tests of links share: programs that listen on a server's Unix sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.socket_server import socket_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.sshd import SSHServer


@pytest.fixture(scope="module")
def sock(server: SSHServer) -> Iterator[str]:
    """Path of a socket on the module's `server`, with `tests.support.socket_server` behind it."""
    server.public.chmod(0o777)
    with socket_server(server.public / "server.sock") as path:
        yield path
